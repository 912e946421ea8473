"""compare.html: several runs on one self-contained page, with its charts as PNG, compare.csv and compare.json."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from ..files import atomic_path, read_rows, to_csv, write_text
from ..recipe import FIELDS, read_yaml
from .charts import BLUE, GREEN, GREY, ORANGE, PERCENT, STYLE, VERMILION, blank
from .experiments import FIGURES, comparison_chart, save_chart, written
from .page import svg, template

COLOURS = (BLUE, ORANGE, GREEN, VERMILION, GREY, "#CC79A7", "#56B4E9", "#8C6D1F")
PLACES = ("output", "data_path", "workers", "accelerator", "devices", "nodes")  # values that say nothing of a result


def write_comparison(folder: Path, title: str, rows: Sequence[dict[str, Any]], facts: Mapping[str, Any]) -> None:
    """Writes the page and its files to `folder`. rows: those of `comparison_rows` or `finished_rows`, one for each run;
    the page shows their `means`. facts: further contents of compare.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "compare.csv", to_csv(rows))
    write_text(folder / "compare.json", json.dumps({**facts, "models": list(rows)}, indent=2) + "\n")
    rows = means(rows)
    save_chart(folder / "compare.png", comparison_chart, rows, title)
    runs = {row["model"]: Path(row["runs"][0]) for row in rows if row["runs"]}
    charts = {}
    for chart in (tradeoff, learning) if runs else ():
        with matplotlib.rc_context(STYLE), atomic_path(folder / f"{chart.__name__}.png") as temporary:
            figure = chart(rows)
            figure.savefig(temporary)
            charts[chart.__name__] = svg(figure)
    keys = [key for key in FIGURES if any(row[key] is not None for row in rows)]
    headings = {key: FIGURES[key][1] for key in keys} | {"macs": "MACs"}
    html = template("compare.html.jinja").render(
        title=title, rows=rows, charts=charts, keys=keys, headings=headings, written=written,
        seeded=any(row["deviation"] is not None for row in rows),
        runs=list(runs), settings=_settings(runs), classes=_classes(runs),
    )  # fmt: skip
    write_text(folder / "compare.html", html)


def means(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each model, the most accurate first: the means of its runs, `deviation` (that of the accuracy from
    seed to seed, None for one run) and `runs`, their folders. `error` is that of the first run that failed."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["model"], []).append(row)
    found = []
    for model, own in groups.items():
        ended = [row for row in own if row["error"] is None]
        row = {"model": model, "error": next((row["error"] for row in own if row["error"]), None), "deviation": None}
        for key in ("accuracy", "top5", "parameters", "macs", "seconds", "images_per_second"):
            values = [one[key] for one in ended if one[key] is not None]
            row[key] = statistics.mean(values) if values else None
        if len(ended) > 1:
            row["deviation"] = statistics.stdev(one["accuracy"] for one in ended)
        found.append(row | {"runs": [str(one["run"]) for one in ended]})
    return sorted(found, key=lambda row: -(row["accuracy"] or 0))


def tradeoff(rows: Sequence[dict[str, Any]]) -> Figure:
    """Test accuracy against parameters and against seconds of training: a point for each model, with its deviation."""
    values = {key: [row[key] for row in rows if row[key]] for key in ("parameters", "seconds")}
    keys = [key for key, own in values.items() if len(set(own)) > 1] or ["parameters"]
    figure = blank(10, 3.8)
    axes = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for axis, key in zip(axes, keys):
        for n, row in enumerate(rows):
            if row[key] and row["accuracy"] is not None:
                colour = COLOURS[n % len(COLOURS)]
                axis.errorbar(row[key], row["accuracy"], row["deviation"], fmt="o", color=colour, label=row["model"])
        decades = max(values[key]) > 10 * min(values[key])
        axis.set(xscale="log" if decades else "linear", xlabel=FIGURES[key][1])
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_minor_formatter("")
        axis.margins(0.15)
        axis.grid(alpha=0.2)
    axes[0].set_ylabel("test accuracy")
    axes[0].yaxis.set_major_formatter(PERCENT)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def learning(rows: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy on the training and validation images by epoch: a line for each run, a colour for each model."""
    figure = blank(10, 3.8)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key in zip(axes, ("train/accuracy", "val/accuracy")):
        for n, row in enumerate(rows):
            for run in row["runs"]:
                points = [one for one in read_rows(Path(run) / "metrics.csv") if one.get(key)]
                epochs, shares = [int(one["epoch"]) + 1 for one in points], [float(one[key]) for one in points]
                style: dict[str, Any] = dict(marker="o" if len(points) <= 40 else "", markersize=3, linewidth=1)
                name = row["model"] if run == row["runs"][0] else None
                axis.plot(epochs, shares, color=COLOURS[n % len(COLOURS)], label=name, **style)
        axis.set(xlabel="epoch", title={"train/accuracy": "training images", "val/accuracy": "validation images"}[key])
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_formatter(PERCENT)
        axis.grid(alpha=0.2)
    axes[0].set_ylabel("accuracy")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _settings(runs: Mapping[str, Path]) -> list[tuple[str, list[str]]]:
    """The values that differ between the recipes: name, and the value in the first run of each model."""
    values = [read_yaml(run / "config.yaml") for run in runs.values()]
    rows = [(key, [str(own.get(key, "")) for own in values]) for key in FIELDS if key not in PLACES]
    return [(key, own) for key, own in rows if len(set(own)) > 1]


def _classes(runs: Mapping[str, Path]) -> list[tuple[str, list[float]]]:
    """F1 of every class in the first run of each model; empty where these have different classes."""
    tables = [read_rows(run / "per_class.csv") for run in runs.values()]
    names = [[row["class"] for row in table] for table in tables]
    if not tables or any(own != names[0] for own in names):
        return []
    return [(rows[0]["class"], [float(row["f1"] or "nan") for row in rows]) for rows in zip(*tables)]
