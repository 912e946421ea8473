"""Draws time-to-accuracy.svg: validation accuracy on MNIST against training time, of the runs here and of the source.

The source reports 98.88 % after 40 epochs of 60,000 images and no time. Its time is that of Keras's step for the same
network with 64 images, from benchmarks/results/more/cpu-training.json.
"""

import itertools
import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from alexnet_cuda.files import read_rows

RESULTS = Path(__file__).resolve().parent
STEPS = RESULTS.parents[1] / "benchmarks" / "results" / "more" / "cpu-training.json"
RUNS = ("mnist", "mnist-short", "mnist-small")
ACCURACY, EPOCHS, IMAGES = 0.9888, 40, 60_000  # of the source


def curve(run: str) -> tuple[list[float], list[float]]:
    """(minutes since the start, validation accuracy) at the end of each epoch."""
    rows = read_rows(RESULTS / run / "metrics.csv")
    accuracy = [float(row["val/accuracy"]) for row in rows if row["val/accuracy"]]
    seconds = [float(row["time/epoch_seconds"]) for row in rows if row["time/epoch_seconds"]]
    return [total / 60 for total in itertools.accumulate(seconds)], accuracy


def source_minutes() -> float:
    records = json.loads(STEPS.read_text("utf-8"))["records"]
    steps = [r for r in records if r["case"] == "keras_mnist" and r["form"].startswith("keras")]
    best = min(steps, key=lambda r: r["median_ms"])
    return EPOCHS * IMAGES / best["batch"] * best["median_ms"] / 60_000


def draw() -> Figure:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for run in RUNS:
        variant = json.loads((RESULTS / run / "metrics.json").read_text("utf-8"))["variant"]
        minutes, accuracy = curve(run)
        axes.plot(minutes, [100 * a for a in accuracy], marker="o", label=f"{run} ({variant})")
    axes.plot(source_minutes(), 100 * ACCURACY, "k*", markersize=12, label="the source: Keras, 40 epochs (keras_mnist)")
    axes.axhline(100 * ACCURACY, color="0.5", linewidth=0.8)
    axes.set(xscale="log", xlabel="minutes of training", ylabel="validation accuracy (%)", ylim=(95, 100))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(loc="lower right")
    return figure


if __name__ == "__main__":
    with matplotlib.rc_context({"svg.hashsalt": "time-to-accuracy", "svg.fonttype": "none"}):
        draw().savefig(RESULTS / "time-to-accuracy.svg", metadata={"Date": None})
    for run in RUNS:
        first = next((m for m, a in zip(*curve(run)) if a >= ACCURACY), None)
        print(f"{run}: {first:.1f} min" if first else f"{run}: not reached", file=sys.stderr)
    print(f"the source in Keras: {source_minutes():.0f} min", file=sys.stderr)
