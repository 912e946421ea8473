"""Why the source's flower network learns and its validation does not: five epochs, as it trains, in four arms.

    python docs/results/flowers17-source/reproduce.py DIR        (DIR/flowers17/jpg holds the images)

The source: flowers_bn, Adam at Keras' rate 0.001, batches of 64, 1,088 images and 272 for validation, no augmentation,
pixels divided by 255 by the loader and again by the notebook, BatchNorm with Keras' momentum .99. The arms: that
momentum (.01 as torch counts) or torch's .1; divided twice or once. Each epoch is validated twice: with the running
averages, and with each batch's own statistics, as in training. Writes result.json and arms.png beside this file.
"""

import copy
import json
import sys
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn
from torchvision.transforms import v2

from alexnet_cuda.data import load_images
from alexnet_cuda.data.module import Normalise
from alexnet_cuda.files import write_text
from alexnet_cuda.networks import build
from alexnet_cuda.recipe import load_recipe
from alexnet_cuda.reports import charts
from alexnet_cuda.training.evaluation import device_name, versions

HERE, EPOCHS, BATCH = Path(__file__).resolve().parent, 5, 64


def arm(images, momentum: float, divided: int) -> list[dict]:
    torch.manual_seed(0)
    recipe = load_recipe("flowers17", None, {"mean": [0], "std": [255 ** (divided - 1)]})
    normalise, model = Normalise(recipe), build(recipe, len(images.classes))
    for norm in norms(model):
        norm.momentum = momentum
    squash = v2.Resize((recipe.input_size, recipe.input_size), antialias=True)
    x, x_test = (torch.stack([squash(image) for image in split.images]) for split in (images.train, images.test))
    adam, rows = torch.optim.Adam(model.parameters(), 1e-3, eps=1e-7), []
    for epoch in range(EPOCHS):
        right = 0
        batches = torch.randperm(len(x)).split(BATCH)
        for b in track(batches, f"momentum {momentum}, divided {divided}x, epoch {epoch + 1}", transient=True):
            with torch.autocast("cpu", torch.bfloat16):
                scores = model.train()(normalise(x[b]))
            adam.zero_grad()
            F.cross_entropy(scores.float(), images.train.labels[b]).backward()
            adam.step()
            right += int((scores.argmax(1) == images.train.labels[b]).sum())
        row = {"epoch": epoch + 1, "training": right / len(x)}
        for name, own in (("running", False), ("own", True)):
            row[name] = validate(model, normalise, x_test, images.test.labels, own)
        rows.append(row)
        print(momentum, divided, row, flush=True)
    return rows


@torch.no_grad()
def validate(model: nn.Module, normalise: Normalise, x: Tensor, labels: Tensor, own_statistics: bool) -> float:
    twin = copy.deepcopy(model).eval()  # a copy: these batches must not move the averages
    for norm in norms(twin):
        norm.train(own_statistics)
    mixed = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    right = sum(int((twin(normalise(x[b])).argmax(1) == labels[b]).sum()) for b in mixed.split(BATCH))
    return right / len(x)


def norms(model: nn.Module) -> list[nn.BatchNorm1d | nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]


def draw(arms: list[dict]) -> None:
    figure = charts.blank(11, 3.4)
    lines = {
        "training": ("training batches", charts.GREY),
        "running": ("validation, running averages", charts.VERMILION),
        "own": ("validation, each batch's own statistics", charts.BLUE),
    }
    for axis, result in zip(figure.subplots(1, 4, sharey=True), arms, strict=True):
        for key, (name, colour) in lines.items():
            points = [(row["epoch"], row[key]) for row in result["epochs"]]
            axis.plot(*zip(*points, strict=True), "o-", color=colour, label=name)
        kind = "Keras'" if result["momentum"] == 0.01 else "torch's"
        axis.set(title=f"{kind} momentum, divided {'twice' if result['divided'] == 2 else 'once'}", xlabel="epoch")
        axis.set(ylim=(0, 1), xticks=range(1, EPOCHS + 1))
        axis.axhline(1 / 17, color=charts.GREY, linewidth=0.8, linestyle=":")
    figure.axes[0].set_ylabel("images right (dotted: by chance)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(HERE / "arms.png")


def main(data: str) -> None:
    images = load_images(load_recipe("flowers17", None, {"data_path": data}))
    arms = [
        {"momentum": momentum, "divided": divided, "epochs": arm(images, momentum, divided)}
        for divided in (2, 1)
        for momentum in (0.01, 0.1)
    ]
    result = {"arms": arms, "device": device_name(), "precision": "bfloat16 autocast", "versions": versions()}
    write_text(HERE / "result.json", json.dumps(result, indent=2) + "\n")
    with matplotlib.rc_context(charts.STYLE):
        draw(arms)


if __name__ == "__main__":
    main(sys.argv[1])
