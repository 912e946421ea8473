"""Charts of one run: curves, speed, confusion matrix, calibration."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from ..words import percent

# Okabe and Ito's palette, distinguishable with any form of colour blindness.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#767676"
# Of text and axes; `page.svg` replaces it by the text colour of the page.
INK = "#1f2329"
STYLE: dict[Any, Any] = {
    **{f"{key}.color": INK for key in ("text", "xtick", "ytick")},
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "figure.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "text.parse_math": False,  # a class may be called $
    "svg.fonttype": "none",
}
PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.4g} %")  # knows no axis, so that all can share it
SHADES = LinearSegmentedColormap.from_list("shades", [(0, 0.447, 0.698, 0), (0, 0.447, 0.698, 1)])


def curves(rows: list[dict[str, str]], title: str) -> Figure:
    """Loss by step, its running mean and the validation loss; accuracy by epoch; learning rate by step. Without losses
    by step, as in runs before they were logged, the training loss by epoch."""
    figure = blank(11, 3.6)
    axes = figure.subplots(1, 3)
    last = max((int(r["epoch"]) for r in rows if r["epoch"]), default=0) + 1
    x, losses = step_losses(rows)
    if x:
        axes[0].plot(x, losses, color=BLUE, alpha=0.25, linewidth=0.8, marker="." if len(x) <= 10 else "")
        axes[0].plot(x, running_mean(losses, len(losses) // 20), color=BLUE, label="training, running mean")
    for axis, name, unit in zip(axes, ("loss", "accuracy"), ("cross-entropy", "accuracy"), strict=False):
        for part, label, colour, marker in (("train", "training", BLUE, "o"), ("val", "validation", ORANGE, "s")):
            points = [] if x and (part, name) == ("train", "loss") else _points(rows, f"{part}/{name}")
            if points:
                size = 4 if len(points) <= 40 else 0
                axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=size, label=label)
                write = percent if name == "accuracy" else "{:.4g}".format
                _tips(axis, points, f"{label} {name}", write)
        axis.set(title=name.capitalize(), ylabel=unit, xlim=(0, last + 0.5 if last == 1 else None))
        _epochs(axis)
        if axis.has_data():
            axis.legend()
    axes[0].set_ylim(bottom=0)
    axes[1].yaxis.set_major_formatter(PERCENT)
    if last == 1:
        axes[1].set_ylim(0, 1)
    rates = [key for key in rows[0] if key.startswith("lr")] if rows else []
    key = next((key for key in rates if key.endswith("weights")), "".join(rates[:1]))
    rate = [(int(r["step"]), float(r[key])) for r in rows if r.get(key)]
    if rate:
        axes[2].plot(*zip(*rate, strict=True), color=GREEN, marker="o" if len(rate) == 1 else "")
    axes[2].set(title="Learning rate", xlabel="step", ylabel="learning rate")
    axes[2].xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes[2].grid(alpha=0.2)
    axes[2].set_ylim(bottom=0)
    axes[2].ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    figure.suptitle(f"{title} (training values are of augmented images)")
    return figure


def throughput(rows: list[dict[str, str]], title: str) -> Figure | None:
    """Images per second and seconds by epoch; None if fewer than two epochs were timed."""
    columns = {"images per second": "time/images_per_second", "seconds per epoch": "time/epoch_seconds"}
    if max(len(_points(rows, key)) for key in columns.values()) < 2:
        return None
    figure = blank(7.4, 3.2)
    for axis, (name, key), colour in zip(figure.subplots(1, 2), columns.items(), (GREEN, BLUE), strict=True):
        if points := _points(rows, key):
            axis.plot(*zip(*points, strict=True), color=colour, marker="o" if len(points) <= 40 else "", markersize=4)
            _tips(axis, points, name, "{:,.1f}".format)
            axis.set_ylim(0, 1.1 * max(value for _, value in points))
        axis.set_title(name.capitalize())
        _epochs(axis)
    figure.suptitle(f"{title}: speed of training")
    return figure


def confusion_counts(predicted: Tensor, labels: Tensor, n: int) -> Tensor:
    """The number of images of each true class (row) with each predicted class (column): (n, n)."""
    return torch.bincount(labels * n + predicted, minlength=n * n).reshape(n, n)


def confusion_matrix(counts: Tensor, classes: list[str], title: str) -> Figure:
    """The counts as a heat map of their shares of the true class, with the numbers of up to 30 classes."""
    n, total = len(classes), int(counts.sum())
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    edge = min(9.0, max(3.6, 1.8 + 0.36 * n))
    figure = blank(edge + 1.2, edge)
    axis = figure.subplots()
    block = math.ceil(n / 250)  # of more than 250 classes: the maximum of each block
    cells = F.max_pool2d(share[None], block, ceil_mode=True)[0]
    outline = (-0.5, len(cells) * block - 0.5, len(cells) * block - 0.5, -0.5)
    image = axis.imshow(cells.numpy(), cmap=SHADES, vmin=0, vmax=1, interpolation="nearest", extent=outline)
    axis.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5))
    axis.spines[["top", "right"]].set_visible(True)
    figure.colorbar(image, ax=axis, shrink=0.8, format=PERCENT, label="share of the true class")
    if n <= 30:
        size = 9 if n <= 12 else 6.5
        for row, column in counts.nonzero().tolist():
            dark = share[row, column] > 0.5
            colour = "white" if dark else VERMILION if row != column else matplotlib.rcParams["text.color"]
            number = axis.text(
                column, row, f"{counts[row, column]}", ha="center", va="center", color=colour, size=size,
                weight="bold" if row != column else "normal",
            )  # fmt: skip
            of = f"{classes[row]}, predicted as {classes[column]}: {percent(float(share[row, column]), 1)}"
            tip(number, f"{of} of {int(counts[row].sum()):,}")
        names = [name if len(name) <= 20 else name[:19] + "…" for name in classes]
        rotated = max(map(len, names)) > 3
        axis.set_xticks(range(n), names, rotation=45 if rotated else 0, ha="right" if rotated else "center")
        axis.set_yticks(range(n), names)
    right = int(counts.diagonal().sum())
    axis.set(xlabel="predicted class", ylabel="true class")
    axis.set_title(f"{right:,} of {total:,} test images right ({percent(right / total)})")
    figure.suptitle(title)
    return figure


def reliability(p: Tensor, labels: Tensor, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
    """Number of images, mean confidence and accuracy by bin of confidence, each (bins,); NaN for an empty bin.

    Source: C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 2.
    """
    confidence, predicted = p.max(1)
    index = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    count = torch.bincount(index, minlength=bins)
    sums = (torch.bincount(index, v.double(), minlength=bins) for v in (confidence, predicted == labels))
    mean_confidence, accuracy = (s / count for s in sums)
    return count, mean_confidence, accuracy


def calibration(p: Tensor, labels: Tensor, error: float, title: str) -> Figure:
    """Accuracy (top) and number of images (bottom) by confidence."""
    count, confidence, accuracy = (v.numpy() for v in reliability(p, labels))
    bins = len(count)
    left = np.arange(bins) / bins
    figure = blank(5.4, 5.4)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="accuracy = confidence")
    top.bar(left, accuracy, 1 / bins, align="edge", color=BLUE, alpha=0.75, linewidth=0, label="accuracy of the bin")
    top.plot(confidence, accuracy, "o", color=VERMILION, markersize=4, label="at its mean confidence")
    top.set(ylim=(0, 1.02), xlim=(0, 1), ylabel="accuracy")
    top.yaxis.set_major_formatter(PERCENT)
    figure.legend(loc="outside lower center", ncols=3, fontsize=7.5)
    top.set_title(f"calibration error {percent(error)}")
    for at, n, right in zip(left, count.tolist(), accuracy.tolist()):
        if n:
            text = f"confidence {percent(at, 0)} to {percent(at + 1 / bins, 0)}: {percent(right, 1)} of {n:,} right"
            tip(top.bar(at, 1, 1 / bins, align="edge", alpha=0)[0], text)
    bars = bottom.bar(left, count, 1 / bins, align="edge", color=GREY, alpha=0.6, linewidth=0)
    bottom.bar_label(bars, [f"{n}" if n else "" for n in count.tolist()], size=7)
    bottom.margins(y=0.25)
    bottom.set(xlabel="confidence", ylabel="images")
    bottom.xaxis.set_major_formatter(PERCENT)
    figure.suptitle(f"{title}: calibration")
    return figure


def blank(width: float, height: float, layout: bool = True, dpi: int = 150) -> Figure:
    """A figure of that size in inches, not shown on a screen; `layout` arranges its axes so that nothing overlaps."""
    figure = Figure((width, height), dpi, layout="constrained" if layout else None)
    FigureCanvasAgg(figure)
    return figure


def step_losses(rows: list[dict[str, str]]) -> tuple[list[float], list[float]]:
    """The training losses that were logged by step, behind the number of epochs done at each."""
    ends = [(int(row["step"]) + 1) / (int(row["epoch"]) + 1) for row in rows if row.get("train/loss")]
    per_epoch = ends[-1] if ends else max((int(row["step"]) + 1 for row in rows), default=1)
    logged = [row for row in rows if row.get("train/step_loss")]
    return [(int(row["step"]) + 1) / per_epoch for row in logged], [float(row["train/step_loss"]) for row in logged]


def running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """The mean of up to `window` values before and after each, and of the value."""
    sums = np.cumsum([0.0, *values])
    at = np.arange(len(values))
    low, high = np.maximum(at - window, 0), np.minimum(at + window + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def tip(artist: Artist, text: str) -> None:
    """A text that the page shows where the pointer rests on a part of a chart."""
    artist.set_gid(f"tip:{text}")


def _tips(axis: Axes, points: list[tuple[int, float]], name: str, write: Callable[[float], str]) -> None:
    """The value of each epoch, of up to 100, on an invisible dot."""
    for epoch, value in points if len(points) <= 100 else []:
        tip(axis.plot(epoch, value, "o", markersize=11, alpha=0)[0], f"epoch {epoch}: {name} {write(value)}")


def _points(rows: list[dict[str, str]], key: str) -> list[tuple[int, float]]:
    return [(int(row["epoch"]) + 1, float(row[key])) for row in rows if row.get(key)]


def _epochs(axis) -> None:
    axis.set_xlabel("epoch")
    axis.grid(alpha=0.2)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not axis.has_data():
        axis.text(0.5, 0.5, "no epoch ended", ha="center", transform=axis.transAxes, color=GREY)
