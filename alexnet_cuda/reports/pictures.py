"""Figures of one run: curves, confusion matrix, sample predictions, first-layer filters."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from ..data import ImageSet, atomic_path

# Okabe and Ito's palette, which people with any form of colour blindness can tell apart.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#6E6E6E"


def write_pictures(
    folder: Path, title: str, images: ImageSet, probabilities: Tensor, labels: Tensor, filters: Tensor
) -> list[Path]:
    """Draws curves.png, confusion_matrix.png, predictions.png and filters.png in a run folder; returns their paths.

    probabilities (N, classes) and labels (N,) belong to the test split; filters (K, C, k, k) are the first layer's.
    """
    predicted = probabilities.argmax(1)
    figures = {
        "curves": curves(folder / "metrics.csv", title),
        "confusion_matrix": confusion_matrix(predicted, labels, images.classes, title),
        "predictions": samples(images, probabilities, labels, title),
        "filters": filter_grid(filters, title),
    }
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        with atomic_path(paths[-1]) as temporary:
            figure.savefig(temporary, dpi=150)
    return paths


def curves(path: Path, title: str) -> Figure:
    """Loss, accuracy and learning rate over training, from a metrics.csv."""
    rows = []
    if path.exists():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    figure = _figure(11, 3.6)
    axes = figure.subplots(1, 3)
    for axis, name in zip(axes, ("loss", "accuracy"), strict=False):
        for part, colour, marker in (("train", BLUE, "o"), ("val", ORANGE, "s")):
            points = [(int(r["epoch"]) + 1, float(r[f"{part}/{name}"])) for r in rows if r.get(f"{part}/{name}")]
            label = {"train": "training", "val": "validation"}[part]
            if points:
                size = 4 if len(points) <= 40 else 0
                axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=size, label=label)
        axis.set(
            title=name.capitalize(), xlabel="epoch", ylabel={"loss": "cross-entropy", "accuracy": "images right"}[name]
        )
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axis.has_data():
            axis.legend(frameon=False)
        else:
            axis.text(0.5, 0.5, "no epoch ended", ha="center", transform=axis.transAxes, color=GREY)
    axes[0].set_ylim(bottom=0)
    axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    key = next((k for k in rows[0] if k.startswith("lr")), "") if rows else ""
    steps = [(int(r["step"]), float(r[key])) for r in rows if r.get(key)]
    if steps:
        axes[2].plot(*zip(*steps, strict=True), color=GREEN, marker="o" if len(steps) == 1 else "")
    axes[2].set(title="Learning rate", xlabel="step", ylabel="learning rate")
    axes[2].set_ylim(bottom=0)
    axes[2].ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    figure.suptitle(f"{title} (training figures: augmented images, with dropout)", size=11)
    return figure


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: list[str], title: str) -> Figure:
    """Counts of predicted against true class, shaded by the share of the true class; mistakes stand out by colour."""
    n = len(classes)
    counts = torch.bincount(labels * n + predicted, minlength=n * n).reshape(n, n)
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    edge = min(14.0, max(4.6, 2.2 + 0.45 * n))
    figure = _figure(edge + 0.8, edge)
    axis = figure.subplots()
    image = axis.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, shrink=0.8, format=PercentFormatter(1.0), label="share of the true class")
    if n <= 30:
        size = 9 if n <= 12 else 6.5
        for row, column in counts.nonzero().tolist():
            wrong = VERMILION if row != column and share[row, column] < 0.5 else None
            colour = wrong or ("white" if share[row, column] > 0.5 else "black")
            weight = "bold" if row != column else "normal"
            axis.text(
                column, row, f"{counts[row, column]}", ha="center", va="center", color=colour, size=size, weight=weight
            )
        rotated = max(map(len, classes)) > 3
        axis.set_xticks(range(n), classes, rotation=45 if rotated else 0, ha="right" if rotated else "center")
        axis.set_yticks(range(n), classes)
    right = counts.diagonal().sum().item()
    axis.set(xlabel="predicted class", ylabel="true class")
    axis.set_title(f"{title}\n{right} of {len(labels)} test images right ({right / len(labels):.2%})", size=11)
    return figure


def samples(images: ImageSet, probabilities: Tensor, labels: Tensor, title: str, columns: int = 8) -> Figure:
    """Test images with what was predicted: first the most confident mistakes, then right ones of every class."""
    confidence, predicted = probabilities.max(1)
    mistakes = (predicted != labels).nonzero().flatten()
    wrong = mistakes[confidence[mistakes].argsort(descending=True)][: 2 * columns].tolist()
    right = _spread((predicted == labels).nonzero().flatten(), labels)[: 4 * columns - len(wrong)]
    chosen = wrong + right
    rows = math.ceil(len(chosen) / columns)
    figure = _figure(1.45 * columns, 1.68 * rows + 0.45, h_pad=0.02, hspace=0)
    for axis, index in zip(
        figure.subplots(rows, columns, squeeze=False).flat, [*chosen, *[None] * columns], strict=False
    ):
        axis.set_axis_off()
        if index is None:
            continue
        _show(axis, images.test.images[index])
        name, share = _short(images.classes[predicted[index]]), confidence[index].item()
        text, colour = f"✓ {name}  {share:.0%}", BLUE
        if predicted[index] != labels[index]:
            text, colour = f"✗ {name}  {share:.0%}\ntrue: {_short(images.classes[labels[index]])}", VERMILION
        axis.set_title(text, size=9, color=colour, pad=3)
    note = f"the {len(wrong)} most confident mistakes first" if wrong else "no mistake in the test split"
    figure.suptitle(f"{title}: predicted class and confidence, {note}")
    return figure


def filter_grid(filters: Tensor, title: str) -> Figure:
    """Every filter of the first layer (K, C, k, k), each stretched to its own range: colour for C = 3, else grey."""
    count, channels, edge, _ = filters.shape
    columns = min(16, math.ceil(math.sqrt(2 * count)))
    rows = math.ceil(count / columns)
    low, high = filters.amin((1, 2, 3), keepdim=True), filters.amax((1, 2, 3), keepdim=True)
    tiles = (filters - low) / (high - low).clamp(min=1e-12)
    tiles = tiles if channels == 3 else tiles.mean(1, keepdim=True)
    figure = _figure(0.8 * columns, 0.8 * rows + 0.6, w_pad=0.02, h_pad=0.02, hspace=0, wspace=0)
    for axis, index in zip(figure.subplots(rows, columns, squeeze=False).flat, range(rows * columns), strict=True):
        axis.set_axis_off()
        if index < count:
            _show(axis, tiles[index])
    figure.suptitle(f"{title}: the {count} filters of the first layer, {edge}x{edge}, each stretched to its own range")
    return figure


def _figure(width: float, height: float, **spaces: Any) -> Figure:
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(**spaces))
    FigureCanvasAgg(figure)
    return figure


def _show(axis: Axes, x: Tensor) -> None:
    pixels = x.permute(1, 2, 0).cpu().numpy()
    top = 255 if pixels.dtype == np.uint8 else 1
    axis.imshow(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels, cmap="gray", vmin=0, vmax=top)


def _spread(indices: Tensor, labels: Tensor) -> list[int]:
    """Indices with the classes taking turns."""
    queues: dict[int, list[int]] = {}
    for index in indices.tolist():
        queues.setdefault(int(labels[index]), []).append(index)
    turns = sorted((turn, label, index) for label, queue in queues.items() for turn, index in enumerate(queue))
    return [index for _, _, index in turns]


def _short(name: str, limit: int = 14) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"
