"""Metrics of every class, and the pairs of classes that are confused most often."""

import math

import torchmetrics.functional.classification as tm
from sklearn.metrics import precision_recall_fscore_support
from torch import Tensor, nn

from .. import files
from ..model import AlexNet
from ..summary import layer_names, model_summary


def per_class(p: Tensor, labels: Tensor, classes: list[str]) -> list[dict]:
    """Precision, recall, F1 and number of test images of every class; of more than five classes, top-5 accuracy, too.
    From probabilities p (N, classes) and labels (N,). NaN where a metric is 0 / 0."""
    n = len(classes)
    names = ("precision", "recall", "f1", "support")
    values = precision_recall_fscore_support(labels, p.argmax(1), labels=range(n), zero_division=math.nan)
    columns: dict[str, list] = dict(zip(names, values, strict=True))
    if n > 5:
        top5 = tm.multiclass_recall(p, labels, n, average=None, top_k=5).tolist()
        columns["top5"] = [v if s else math.nan for v, s in zip(top5, columns["support"], strict=True)]
    return [
        {"class": name, **{key: int(v) if key == "support" else float(v) for key, v in zip(columns, row, strict=True)}}
        for name, row in zip(classes, zip(*columns.values(), strict=True), strict=True)
    ]


def layers(model: nn.Module, size: int) -> list[tuple[str, str, str, int, float, int, float]]:
    """Name, kind, output, parameters and their share, MACs and their share of every layer, for an image of `size` x
    `size` pixels; empty for a network that is no AlexNet."""
    rows, names = (model_summary(model, size), layer_names(model)) if isinstance(model, AlexNet) else ([], {})
    parameters, macs = sum(r.parameters for r in rows) or 1, sum(r.macs for r in rows) or 1
    return [
        (
            names[r.name],
            r.type,
            "\N{MULTIPLICATION SIGN}".join(map(str, r.output_size)),
            r.parameters,
            r.parameters / parameters,
            r.macs,
            r.macs / macs,
        )
        for r in rows
    ]


def to_csv(rows: list[dict]) -> str:
    """The rows as CSV, with six decimals; NaN becomes an empty cell."""
    cell = lambda v: None if v != v else round(v, 6) if isinstance(v, float) else v
    return files.to_csv([{key: cell(v) for key, v in row.items()} for row in rows])


def confused_pairs(counts: Tensor, classes: list[str], limit: int = 12) -> list[tuple[str, str, int, int]]:
    """The most frequent mistakes: true class, predicted class, their number, and the images of the true class."""
    wrong = counts.clone().fill_diagonal_(0)
    values, places = wrong.flatten().sort(descending=True, stable=True)
    pairs = [divmod(place, len(classes)) for place in places[: min(limit, int((values > 0).sum()))].tolist()]
    return [(classes[t], classes[g], int(wrong[t, g]), int(counts[t].sum())) for t, g in pairs]
