"""Images per second of each recipe's loader alone, with its augmentation and normalisation, and of its training step.

Both run in turn, three times each, on the same threads; the medians are printed as a Markdown table. A set that is not
in --data is left out.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F

from alexnet_cuda.data import load_images
from alexnet_cuda.data.module import ImageData
from alexnet_cuda.errors import DataError
from alexnet_cuda.recipe import load_recipe
from alexnet_cuda.training.classifier import Classifier, parameter_groups
from alexnet_cuda.training.run import keep_freed_memory, precision

SETS = {"digits": "", "mnist": "", "cifar10": "cifar10", "flowers17": "flowers17", "bike-ship": "bike_ship"}


def rate(step: Callable[[], int], seconds: float) -> float:
    """Images per second of `step`, which returns how many it did, after one call."""
    step()
    began, images = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        images += step()
    return images / passed


def measure(name: str, variant: str | None, data: Path, seconds: float) -> list[str]:
    values: dict[str, Any] = {"data_path": str(data / SETS[name])} if name != "digits" else {}
    recipe = load_recipe(name, None, values | ({"variant": variant} if variant else {}))
    images = load_images(recipe)
    module = Classifier(recipe, images.classes)
    loader, normalise = ImageData(images, recipe).train_dataloader(), ImageData(images, recipe).normalise

    def batches() -> Any:
        epoch = 0
        while True:
            loader.sampler.set_epoch(epoch)
            yield from loader
            epoch += 1

    source = batches()
    load = lambda: len(normalise(next(source)[0]))
    x, labels = next(source)
    x = normalise(x)
    optimiser = torch.optim.AdamW(parameter_groups(module.model, recipe), 1e-6, fused=True)
    half = precision(recipe) == "bf16-mixed"

    def step() -> int:
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = F.cross_entropy(module(x), labels)
        loss.backward()
        optimiser.step()
        return len(x)

    loads, steps = zip(*((rate(load, seconds), rate(step, seconds)) for _ in range(3)))
    a, b = statistics.median(loads), statistics.median(steps)
    return [
        name,
        f"`{recipe.variant}`",
        f"{recipe.batch_size}",
        precision(recipe),
        f"{a:,.0f}",
        f"{b:,.0f}",
        f"{a / b:.1f}",
    ]


def main(arguments: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", type=Path, required=True, help="folder of the data sets: MNIST/, cifar10/, ...")
    flags.add_argument("--seconds", type=float, default=4.0, help="time of one measurement")
    args = flags.parse_args(arguments)
    keep_freed_memory()
    facts = common.machine("cpu")
    print(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, commit {facts['commit']}\n")
    head = ["recipe", "network", "batch", "precision", "loader, images/s", "step, images/s", "loader / step"]
    print(f"| {' | '.join(head)} |\n|---|---|---:|---|---:|---:|---:|")
    for name, variant in [*((name, None) for name in SETS), ("mnist", "cifar"), ("flowers17", "cifar")]:
        try:
            print(f"| {' | '.join(measure(name, variant, args.data, args.seconds))} |", flush=True)
        except DataError as error:
            print(error, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
