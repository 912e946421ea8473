"""The report of a finished run: pictures, the table of classes and report.html."""

import math
import warnings
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from torch import Tensor, nn

from ..data import ImageSet
from ..files import atomic_path, read_rows, write_text
from ..recipe import Recipe
from . import cards, charts, hidden, page, tables


def write_report(
    folder: Path, recipe: Recipe, images: ImageSet, model: nn.Module, probabilities: Tensor, metrics: dict
) -> list[Path]:
    """Writes report.html, per_class.csv and the pictures of a run to its folder and returns their paths, in this order.

    Args:
        folder: the curves are drawn from its metrics.csv.
        model: the trained network; it is left in evaluation mode.
        probabilities: (N, classes), of the network for the test split.
        metrics: the contents of metrics.json.
    """
    with Console().status("drawing the report"), matplotlib.rc_context(charts.STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a class name
        return _write(folder, recipe, images, model.eval(), probabilities.nan_to_num(0), metrics)


def _write(folder: Path, recipe: Recipe, images: ImageSet, model: nn.Module, p: Tensor, metrics: dict) -> list[Path]:
    title, classes, labels = page.title(recipe), images.classes, images.test.labels
    counts = charts.confusion_counts(p.argmax(1), labels, len(classes))
    rows, history = tables.per_class(p, labels, classes), read_rows(folder / "metrics.csv")
    seen, known = cards.SplitImages(images, recipe), (classes, p, labels)
    wrong, right = cards.worst(p, labels, 20), cards.surest(p, labels, 20)
    looked_at = (wrong[:3] + right + wrong[3:])[:8]
    one = (right or wrong)[0]
    filters = cards.filters(model, grey=seen[one].shape[0] == 1)
    learned = cards.SplitImages(images, recipe, "train")
    features = hidden.hidden(model, seen, learned)
    shown: dict[str, Any] = dict(
        sample=[cards.predicted(i, seen, *known) for i in cards.sample(labels, 40)],
        worst=[cards.predicted(i, seen, *known) for i in wrong],
        surest=[cards.predicted(i, seen, *known) for i in right],
        attention=cards.attention(model, looked_at, seen, *known),
        filters=filters,
        occluded=cards.occluded(model, looked_at[:4], seen, *known),
        top_five=hidden.top_five(looked_at, seen, *known),
        neighbours=hidden.neighbours(features, seen, learned, classes) if features else [],
        searched=len(features.train_places) if features else 0,
        preferred=cards.preferred(model, right or wrong, seen),
        responses=cards.responses(model, looked_at[:4], seen, filters),
        maps=cards.maps(model, one, seen),
        layers=tables.layers(model, recipe.input_size),
    )
    drawn = {
        "curves": charts.curves(history, title),
        "throughput": charts.throughput(history, title),
        "confusion_matrix": charts.confusion_matrix(counts, classes, title),
        "calibration": charts.calibration(p, labels, metrics.get("test/calibration_error", math.nan), title),
        "embedding": hidden.embedding(features, labels, classes, title) if features else None,
    }
    pictures = {name: figure for name, figure in drawn.items() if figure is not None}
    for name in drawn.keys() - pictures:
        (folder / f"{name}.png").unlink(missing_ok=True)  # of an earlier report
    shown["charts"] = {name: page.svg(figure) for name, figure in pictures.items()}
    shown["confused"] = tables.confused_pairs(counts, classes)
    html = page.html(recipe, images, metrics, history, rows, **shown)
    mistakes = f"the {len(wrong)} worst mistakes, then" if wrong else "no mistake;"
    confident = f"{title}: {mistakes} the most confident correct predictions"
    largest = f"{title}: the channels with the largest outputs of each layer"
    pictures |= {
        "predictions": cards.gallery(shown["sample"], f"{title}: random test images, predicted class"),
        "best_worst": cards.gallery(shown["worst"] + shown["surest"], confident),
        "filters": cards.gallery(filters, f"{title}: the {len(filters)} filters of the first layer", 16, 0.7),
        "feature_maps": cards.sheet(shown["maps"], largest, 0.75, names=True),
        "grad_cam": cards.gallery(shown["attention"], f"{title}: evidence for a class (Grad-CAM)", 6),
        "occlusion": cards.gallery(shown["occluded"], f"{title}: where covering the image costs probability", 4),
        "preferred": cards.sheet(shown["preferred"], f"{title}: images that channels respond to most", 1.1, names=True),
        "figure4": hidden.figure4(shown["top_five"], shown["neighbours"], title),
    }
    paths = [folder / f"{name}.png" for name in pictures]
    for path, figure in zip(paths, pictures.values()):
        with atomic_path(path) as temporary:
            figure.savefig(temporary)
    write_text(folder / "per_class.csv", tables.to_csv(rows))
    write_text(folder / "report.html", html)
    return [folder / "report.html", folder / "per_class.csv", *paths]
