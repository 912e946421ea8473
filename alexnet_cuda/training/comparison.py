"""Several networks trained on one recipe, with equal settings, and what each of them costs and reaches."""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..data import ImageSet, atomic_path, load_images, write_text
from ..data.module import ImageData
from ..model import AlexNet, model_summary
from ..reports.charts import BLUE, ORANGE, blank
from ..reports.tables import to_csv
from .classifier import build
from .evaluation import best_device, device_name, load_weights
from .main import main
from .recipe import Recipe, RecipeError, load_recipe, read_yaml

COLUMNS = ("model", "accuracy", "top5", "parameters", "macs", "seconds", "images_per_second", "error", "run")
MACHINE = ("accelerator", "devices", "nodes", "workers", "output")  # may differ in a run that is taken over
MEASURE_SECONDS = 2.0


def compare(
    models: Sequence[str], name: str, config: Path | None, values: Mapping[str, Any], folder: Path, console: Console
) -> int:
    """Trains every model on the recipe `name`, in `folder`/MODEL, and leaves compare.csv, .json and .png in `folder`.

    Runs that `folder` already holds are taken over where they ended, and gone on with where they did not. A model that
    fails has the reason in its row, and the others go on.

    Args:
        models: variants of AlexNet, and torchvision/NAME; each once.
        values: of the recipe, the same for all; `size` is for torchvision's.

    Returns:
        0, 1 where a model failed, or 130 after Ctrl-C.

    Raises:
        RecipeError: an unknown model or value, more than one device, or a run in `folder` with other values.
        DataError: data that cannot be read.
    """
    recipes = _recipes(list(dict.fromkeys(models)), name, config, values, folder)
    images = load_images(next(iter(recipes.values())))
    errors: dict[str, str] = {}
    for i, (model, recipe) in enumerate(recipes.items()):
        run = Path(str(recipe.output))
        if _ended(run):
            console.print(f"{model}: the run in {run} is taken over", soft_wrap=True, highlight=False)
            continue
        console.rule(f"{i + 1} of {len(recipes)}: {model}")
        try:
            resume = run if (run / "checkpoints" / "last.ckpt").exists() else None
            code = main(None if resume else name, None, {} if resume else _values(recipe), resume, not resume, console)
        except Exception as error:  # whatever it is, it is this model's
            errors[model] = str(error).splitlines()[0] if str(error) else type(error).__name__
            console.print(f"[bold red]{model} failed:[/] {escape(errors[model])}", soft_wrap=True, highlight=False)
            continue
        if code:
            console.print("the same command goes on with this comparison")
            return code
    with console.status("measuring inference"):
        rows = [_row(model, recipe, images, errors.get(model)) for model, recipe in recipes.items()]
    rows.sort(key=lambda row: -(row["accuracy"] or 0))
    _write(rows, name, folder)
    _print(rows, name, len(images.test.labels), console)
    console.print(f"Comparison: {folder / 'compare.png'}, compare.csv, compare.json", soft_wrap=True, highlight=False)
    return 1 if errors else 0


def macs(recipe: Recipe, classes: int) -> int:
    """Multiply-accumulates of the recipe's network for one image: of convolutions, linear layers and attention."""
    with torch.device("meta"):
        model = build(recipe, classes)
        if isinstance(model, AlexNet):
            return sum(layer.macs for layer in model_summary(model))
        from torch.utils.flop_counter import FlopCounterMode

        x = torch.empty(1, recipe.channels, recipe.input_size, recipe.input_size)
        with FlopCounterMode(display=False) as counter:  # not in inference mode: attention would run as one op there
            model.eval()(x)
    return counter.get_total_flops() // 2


@torch.inference_mode()
def images_per_second(model: torch.nn.Module, recipe: Recipe, images: ImageSet) -> float:
    """Test images that the network classifies in a second, in batches of the recipe's size; loading is not counted."""
    data, device = ImageData(images, recipe), best_device()
    model.to(device).eval()
    count, seconds = 0, 0.0
    for i, (x, labels) in enumerate(data.test_dataloader()):
        x = x.reshape(-1, *x.shape[-3:]).to(device)
        if i == 0:
            model(data.normalise(x))  # the first call allocates and chooses algorithms
        _wait(device)
        started = time.perf_counter()
        model(data.normalise(x))
        _wait(device)
        seconds += time.perf_counter() - started
        count += len(labels)
        if seconds > MEASURE_SECONDS:
            break
    return count / seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _recipes(
    models: list[str], name: str, config: Path | None, values: Mapping[str, Any], folder: Path
) -> dict[str, Recipe]:
    """Every model's recipe, checked before anything is trained."""
    if "variant" in values:
        raise RecipeError("variant is what a comparison compares: name the models instead")
    peers = [model for model in models if model.startswith("torchvision/")]
    equal = {"channels": 3} if peers else {}  # torchvision's networks take nothing else
    recipes = {}
    for model in models:
        own = {key: value for key, value in values.items() if key != "size" or model in peers or not peers}
        run = folder / model.replace("/", "-")
        recipe = load_recipe(name, config, {**equal, **own, "variant": model, "output": str(run)})
        recipe.require_one_device("a comparison")
        recipes[model] = recipe.replace({"devices": "1"})
        if (run / "config.yaml").exists():
            _check_equal(recipe, run)
    return recipes


def _check_equal(recipe: Recipe, run: Path) -> None:
    old = Recipe().replace(read_yaml(run / "config.yaml"))
    for key in (field.name for field in dataclasses.fields(Recipe) if field.name not in MACHINE):
        if (was := getattr(old, key)) != (now := getattr(recipe, key)):
            raise RecipeError(f"{run} was trained with {key} {was}, not {now}: give another --output, or remove it")


def _ended(run: Path) -> bool:
    return (run / "metrics.json").exists() and (run / "weights.safetensors").exists()


def _values(recipe: Recipe) -> dict[str, Any]:
    """All values, so that the run needs no configuration file."""
    return {key: value for key, value in dataclasses.asdict(recipe).items() if key != "name"}


def _row(model: str, recipe: Recipe, images: ImageSet, error: str | None) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"model": model, "error": error, "run": recipe.output}
    if error is None:
        run = Path(str(recipe.output))
        metrics = json.loads((run / "metrics.json").read_text())
        network, _, classes = load_weights(run)
        row |= {
            "accuracy": metrics["test/accuracy"],
            "top5": metrics.get("test/top5"),
            "parameters": metrics["parameters"],
            "macs": macs(recipe, len(classes)),
            "seconds": metrics["seconds"],
            "images_per_second": round(images_per_second(network, recipe, images), 1),
        }
    return row


def _write(rows: list[dict[str, Any]], name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "compare.csv", to_csv(rows))
    facts = {"recipe": name, "device": device_name(), "models": rows}
    write_text(folder / "compare.json", json.dumps(facts, indent=2) + "\n")
    with atomic_path(folder / "compare.png") as temporary:
        chart(rows, f"{name}: {len(rows)} networks, equal settings, {device_name()}").savefig(temporary, dpi=150)


# Column: heading in the table, heading in the chart, how its values are written.
FIGURES = {
    "accuracy": ("accuracy", "test accuracy", lambda v: f"{v:.2%}"),
    "top5": ("top-5", "top-5 accuracy", lambda v: f"{v:.2%}"),
    "parameters": ("params", "parameters", lambda v: f"{v / 1e6:,.2f} M"),
    "macs": ("MACs", "multiply-accumulates", lambda v: f"{v / 1e6:,.1f} M"),
    "seconds": ("train s", "seconds of training", lambda v: f"{v:,.1f}"),
    "images_per_second": ("img/s", "inference, images/s", lambda v: f"{v:,.0f}"),
}


def chart(rows: list[dict[str, Any]], title: str) -> Figure:
    """A line of bars for every model, the best first; failed models have a line without bars."""
    keys = [key for key in FIGURES if key != "top5" and any(row[key] is not None for row in rows)]
    figure = blank(2.4 + 2.1 * max(1, len(keys)), 1.3 + 0.42 * len(rows))
    figure.suptitle(title, size=11)
    colours = [ORANGE if row["model"].startswith("torchvision/") else BLUE for row in rows]
    for i, axis in enumerate(figure.subplots(1, max(1, len(keys)), squeeze=False)[0]):
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.set_xticks([])
        axis.set_yticks(range(len(rows)), [row["model"] for row in rows] if i == 0 else [""] * len(rows))
        axis.tick_params(axis="y", length=0)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        if not keys:
            axis.text(0.5, 0.5, "every model failed", transform=axis.transAxes, ha="center")
            continue
        _, heading, write = FIGURES[keys[i]]
        values = [row[keys[i]] for row in rows]
        bars = axis.barh(range(len(rows)), [value or 0 for value in values], 0.62, color=colours)
        axis.bar_label(bars, ["failed" if value is None else write(value) for value in values], padding=4, size=9)
        axis.set_xlim(0, 1.75 * max(value or 0 for value in values) or 1)  # leaves room for the longest bar's number
        axis.set_title(heading, size=10, loc="left")
    return figure


def _print(rows: list[dict[str, Any]], name: str, tested: int, console: Console) -> None:
    keys = [key for key in FIGURES if any(row[key] is not None for row in rows)]
    # narrow enough for 80 columns
    table = Table(title=f"{name}: {len(rows)} networks on {tested:,} held-out images", box=SIMPLE_HEAD, pad_edge=False,
                  padding=(0, 1, 0, 0))  # fmt: skip
    table.add_column("model", overflow="fold")
    for key in keys:
        table.add_column(FIGURES[key][0], justify="right")
    for row in rows:
        if row["error"] is None:
            table.add_row(row["model"], *(FIGURES[key][2](row[key]) for key in keys))
        else:
            table.add_row(row["model"], *(["[red]failed[/]"] if keys else []))
    console.print(table)
    for row in rows:
        if row["error"] is not None:
            console.print(f"[red]{row['model']} failed:[/] {escape(row['error'])}", soft_wrap=True, highlight=False)
