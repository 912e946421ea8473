"""Charts of several trainings: a learning-rate sweep, a search, a comparison of networks."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ..files import atomic_path
from ..words import percent
from .charts import BLUE, GREY, ORANGE, PERCENT, STYLE, blank

# Column of compare.csv: heading in the table, heading in the chart, format of its values.
FIGURES: dict[str, tuple[str, str, Callable[[Any], str]]] = {
    "accuracy": ("accuracy", "test accuracy", percent),
    "top5": ("top-5", "top-5 accuracy", percent),
    "parameters": ("params", "parameters", lambda v: f"{v / 1e6:,.2f} M"),
    "macs": ("MACs", "multiply-accumulates", lambda v: f"{v / 1e6:,.1f} M"),
    "seconds": ("train s", "seconds of training", lambda v: f"{v:,.1f}"),
    "images_per_second": ("img/s", "inference, images/s", lambda v: f"{v:,.0f}"),
}


def written(row: Mapping[str, Any], key: str) -> str:
    """A figure of a comparison's row, the accuracy of several seeds with its deviation; "" where there is none."""
    if row[key] is None:
        return ""
    deviation = row.get("deviation") if key == "accuracy" else None
    text = FIGURES[key][2](row[key])
    return text if deviation is None else f"{text.removesuffix(' %')} \N{PLUS-MINUS SIGN} {percent(deviation)}"


def save_chart(path: Path, chart: Callable[..., Figure], *arguments: Any) -> None:
    """Writes the figure `chart(*arguments)` to `path`, in the style of the reports."""
    with matplotlib.rc_context(STYLE), atomic_path(path) as temporary:
        chart(*arguments).savefig(temporary)


def _plain(value: float, position: float = 0) -> str:
    """A tick of a logarithmic axis. matplotlib's own are mathematics, which STYLE turns off."""
    return f"{value:g}" if 1e-3 <= value < 1e4 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def sweep_chart(rates: np.ndarray, losses: np.ndarray, suggestions: dict[str, float], title: str) -> Figure:
    """Loss against learning rate, both (steps,), with the suggestions marked."""
    figure = blank(6.4, 4)
    axis = figure.subplots()
    axis.plot(rates, losses, color=BLUE)
    for (name, rate), marker in zip(suggestions.items(), "os"):
        at = int(np.argmin(np.abs(rates - rate)))
        axis.plot(rate, losses[at], marker, color=ORANGE, label=f"{name}: {rate:.2g}")
    lowest, first = losses.min(), losses[:20].max()
    axis.set(xscale="log", xlabel="learning rate", ylabel="cross-entropy, running mean", title=title)
    axis.xaxis.set_major_formatter(_plain)
    axis.set_ylim(max(0, lowest - 0.2 * (first - lowest)), first + 0.5 * (first - lowest))  # cuts off the divergence
    axis.grid(alpha=0.2)
    axis.legend()
    return figure


def search_chart(rows: Sequence[dict[str, Any]], keys: Sequence[str], title: str) -> Figure:
    """Validation accuracy against each of `keys`: a marker for every trial; `rows` are those of search.csv."""
    figure = blank(2.7 * len(keys) + 0.8, 3.4)
    axes = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for axis, key in zip(axes, keys, strict=True):
        for state, marker, label in (("complete", "o", "to the end"), ("pruned", "x", "ended early")):
            shown = [row for row in rows[1:] if row["state"] == state and row["val/accuracy"] > 0]
            points = [row[key] for row in shown], [row["val/accuracy"] for row in shown]
            axis.plot(*points, marker, color=BLUE if marker == "o" else GREY, markersize=5, alpha=0.8, label=label)
        axis.plot(rows[0][key], rows[0]["val/accuracy"], "*", color=ORANGE, markersize=13, label="best")
        axis.set(xlabel=key, xscale="linear" if key == "label_smoothing" else "log")
        if key in ("lr", "weight_decay"):
            axis.xaxis.set_major_formatter(_plain)
            axis.xaxis.set_minor_formatter("")
        if key == "batch_size":
            sizes = sorted({row[key] for row in rows})
            axis.set_xticks(sizes, [f"{size}" for size in sizes])
            axis.minorticks_off()
        axis.grid(alpha=0.2)
    axes[0].set_ylabel("best validation accuracy")
    axes[0].yaxis.set_major_formatter(PERCENT)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(title)
    return figure


def comparison_chart(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """A row of bars for each model; `rows` are those of compare.csv, None where a model failed."""
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
        heading = FIGURES[keys[i]][1]
        values = [row[keys[i]] for row in rows]
        bars = axis.barh(range(len(rows)), [value or 0 for value in values], 0.62, color=colours)
        axis.bar_label(bars, [written(row, keys[i]) or "failed" for row in rows], padding=4, size=9)
        axis.set_xlim(0, 1.75 * max(value or 0 for value in values) or 1)  # leaves space for the longest bar's number
        axis.set_title(heading, size=10, loc="left")
    return figure
