"""All that a run folder shows of a finished run: pictures, the per-class table and report.html."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from rich.console import Console
from torch import nn

from ..data import ImageSet, atomic_path, write_text
from . import cards, charts, page, tables

if TYPE_CHECKING:
    from ..training.evaluation import Predictions
    from ..training.recipe import Recipe


def write_report(
    folder: Path, recipe: "Recipe", images: ImageSet, model: nn.Module, predictions: "Predictions", metrics: dict
) -> list[Path]:
    """Writes report.html, per_class.csv and the pictures of a run to its folder; returns the paths, in this order.

    `predictions` are what `model`, which is left in evaluation mode, says of the test split; `metrics` is what
    metrics.json holds. The curves come from the folder's metrics.csv.
    """
    with Console().status("drawing the report"), matplotlib.rc_context(charts.STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a class name in a script that the font lacks
        return _write(folder, recipe, images, model.eval(), predictions, metrics)


def _write(
    folder: Path, recipe: "Recipe", images: ImageSet, model: nn.Module, predictions: "Predictions", metrics: dict
) -> list[Path]:
    title, classes = f"{recipe.name}, {recipe.variant}", images.classes
    p, labels = predictions.probabilities.nan_to_num(0), predictions.labels
    counts = charts.confusion_counts(p.argmax(1), labels, len(classes))
    rows, history = tables.per_class(p, labels, classes), charts.read_rows(folder / "metrics.csv")
    seen, known = cards.Seen(images, recipe), (classes, p, labels)
    wrong, right = cards.worst(p, labels, 20), cards.surest(p, labels, 20)
    looked_at = (wrong[:3] + right + wrong[3:])[:8]
    one = (right or wrong)[0]
    filters = cards.filters(model, grey=seen[one].shape[0] == 1)
    found = page.Findings(
        folder, recipe, images, metrics, history, rows, tables.confused_pairs(counts, classes), filters,
        sample=[cards.predicted(i, seen, *known) for i in cards.sample(labels, 40)],
        worst=[cards.predicted(i, seen, *known) for i in wrong],
        surest=[cards.predicted(i, seen, *known) for i in right],
        attention=cards.attention(model, looked_at, seen, *known),
        answers=cards.answers(model, looked_at[:4], seen, filters),
        maps=cards.maps(model, one, seen),
    )  # fmt: skip
    error = metrics.get("test/calibration_error", float("nan"))
    drawn = {
        "curves": charts.curves(history, title),
        "throughput": charts.throughput(history, title),
        "confusion_matrix": charts.confusion_matrix(counts, classes, title),
        "calibration": charts.calibration(p, labels, error, title),
    }
    pictures = {name: figure for name, figure in drawn.items() if figure is not None}
    for name in drawn.keys() - pictures:
        (folder / f"{name}.png").unlink(missing_ok=True)  # of the run that this one replaces
    html = page.html(found, {name: page.svg(figure) for name, figure in pictures.items()})
    mistakes = f"the {len(wrong)} worst mistakes, then" if wrong else "no mistake;"
    pictures |= {
        "predictions": cards.gallery(found.sample, f"{title}: test images drawn by chance, predicted class"),
        "best_worst": cards.gallery(found.worst + found.surest, f"{title}: {mistakes} the surest right answers"),
        "filters": cards.gallery(filters, f"{title}: the {len(filters)} filters of the first layer", 16, 0.7),
        "feature_maps": cards.sheet(found.maps, f"{title}: the strongest channels of every layer", 0.75, names=True),
        "grad_cam": cards.gallery(found.attention, f"{title}: what speaks for a class (Grad-CAM)", 6),
    }
    paths = [folder / f"{name}.png" for name in pictures]
    for path, figure in zip(paths, pictures.values()):
        with atomic_path(path) as temporary:
            figure.savefig(temporary)
    write_text(folder / "per_class.csv", tables.to_csv(rows))
    write_text(folder / "report.html", html)
    return [folder / "report.html", folder / "per_class.csv", *paths]
