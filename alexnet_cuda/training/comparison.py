"""Several networks trained on one recipe: their recipes, and what each costs and reaches."""

import itertools
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..classify import best_device
from ..data import ImageSet
from ..data.module import ImageData
from ..errors import RecipeError
from ..files import read_metrics, read_rows
from ..networks import build
from ..recipe import MACHINE, Recipe, load_recipe, read_recipe, resume_rule, takes_sizes
from ..weights import load_weights

COLUMNS = ("model", "seed", "accuracy", "top5", "parameters", "macs", "seconds", "images_per_second", "error", "run")
MEASURE_SECONDS = 2.0


def comparison_recipes(
    models: Sequence[str], name: str, config: Path | None, values: Mapping[str, Any], folder: Path, seeds: int = 1
) -> list[Recipe]:
    """The recipes of every model, one for each of so many seeds, with equal settings, one device and the run folder
    `folder`/MODEL, or MODEL-seedN from the second on. Raises RecipeError for an unknown model or value, more than one
    device, or a run in `folder` with other values."""
    if "variant" in values:
        raise RecipeError("variant is what a comparison compares: name the models instead")
    peers = any(model.startswith("torchvision/") for model in models)
    equal = {"channels": 3} if peers else {}  # torchvision's networks take no other number
    sized = [model for model in models if takes_sizes(model)]
    recipes = []
    for n, model in itertools.product(range(seeds), models):  # all models with one seed, then with the next
        own = {key: value for key, value in values.items() if key != "size" or model in sized or not sized}
        run = folder / (re.sub("[/:,]", "-", model) + (f"-seed{n}" if n else ""))
        recipe = load_recipe(name, config, {**equal, **own, "variant": model, "output": str(run)})
        recipe.require_one_device("a comparison")
        recipe = recipe.replace({"devices": "1", "seed": recipe.seed + n})
        recipes.append(recipe)
        old = read_recipe(run / "config.yaml") if (run / "config.yaml").exists() else recipe
        for key in old.changes(recipe):
            if resume_rule(key) != MACHINE or key == "data_path":  # other data would be another comparison
                was, now = getattr(old, key), getattr(recipe, key)
                raise RecipeError(f"{run} was trained with {key} {was}, not {now}: give another --output, or remove it")
    return recipes


def comparison_rows(recipes: Sequence[Recipe], images: ImageSet, errors: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row with COLUMNS for every run, the most accurate first; without figures where `errors` has a reason for the
    run folder."""
    rows = []
    for recipe in recipes:
        error = errors.get(str(recipe.output))
        run = Path(str(recipe.output))
        row = _row(recipe.variant, run, {} if error else read_metrics(run)) | {"error": error}
        if error is None:
            network, _, classes = load_weights(run)
            row["macs"] = macs(recipe, len(classes))
            row["images_per_second"] = round(images_per_second(network, recipe, images), 1)
        rows.append(row)
    return sorted(rows, key=lambda row: -(row["accuracy"] or 0))


def finished_rows(runs: Mapping[str, Path]) -> list[dict[str, Any]]:
    """A row with COLUMNS for every finished run, by its name, the most accurate first. Only its config.yaml,
    metrics.json and per_class.csv are read, so no inference is timed. Raises RecipeError for a folder without them."""
    rows: list[dict[str, Any]] = []
    for name, run in runs.items():
        if lacking := [file for file in ("config.yaml", "metrics.json", "per_class.csv") if not (run / file).exists()]:
            raise RecipeError(f"{run} holds no finished run: {lacking[0]} is missing")
        recipe = read_recipe(run / "config.yaml")
        metrics = read_metrics(run)
        if lacking := [key for key in ("test/accuracy", "parameters") if key not in metrics]:
            raise RecipeError(f"{run / 'metrics.json'} has no {lacking[0]!r}")
        classes = len(read_rows(run / "per_class.csv"))
        with torch.device("meta"):
            parameters = sum(p.numel() for p in build(recipe, max(classes, 1)).parameters())
        if parameters != metrics["parameters"]:
            raise RecipeError(f"{run / 'per_class.csv'} lists {classes} classes, not those of the network")
        rows.append(_row(name, run, metrics) | {"macs": macs(recipe, classes)})
    return sorted(rows, key=lambda row: -(row["accuracy"] or 0))


def _row(model: str, run: Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """COLUMNS with what metrics.json has of them."""
    figures = {key: metrics.get(key) for key in ("seed", "parameters", "seconds")}
    figures |= {"accuracy": metrics.get("test/accuracy"), "top5": metrics.get("test/top5")}
    return dict.fromkeys(COLUMNS) | {"model": model, "run": str(run)} | figures


def macs(recipe: Recipe, classes: int) -> int:
    """Multiply-accumulates of the recipe's network for one image: of convolutions, linear layers and attention."""
    with torch.device("meta"):
        model = build(recipe, classes)
        x = torch.empty(1, recipe.channels, recipe.input_size, recipe.input_size)
        with FlopCounterMode(display=False) as counter:  # not in inference mode: attention would run as one op there
            model.eval()(x)
    return counter.get_total_flops() // 2


@torch.inference_mode()
def images_per_second(model: torch.nn.Module, recipe: Recipe, images: ImageSet) -> float:
    """Test images that the network classifies in a second, in batches of the recipe's size; loading is not counted."""
    data, device = ImageData(images, recipe), best_device()
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    model.to(device).eval()
    count, seconds = 0, 0.0
    for i, (x, labels) in enumerate(data.test_dataloader()):
        x = x.reshape(-1, *x.shape[-3:]).to(device)
        if i == 0:
            model(data.normalise(x))  # the first call allocates and chooses algorithms
        synchronise()
        started = time.perf_counter()
        model(data.normalise(x))
        synchronise()
        seconds += time.perf_counter() - started
        count += len(labels)
        if seconds > MEASURE_SECONDS:
            break
    return count / seconds
