"""inspect.html: one self-contained page with what a data set holds."""

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from ..data.inspection import Inspection
from ..recipe import Recipe
from . import charts
from .cards import Card, sample, short
from .page import svg, template

SAMPLES = 60


def page(recipe: Recipe, found: Inspection) -> str:
    """The page: counts, notes, sizes, modes, damaged files, and up to 60 training images, each class in turn."""
    images, train = found.images, found.images.train
    cards = [Card(train.images[i], short(images.classes[int(train.labels[i])])) for i in sample(train.labels, SAMPLES)]
    counts = images.counts()
    with matplotlib.rc_context(charts.STYLE):
        chart = svg(_sizes(found.all_sizes)) if len(set(found.all_sizes)) > 1 else None
    return template("inspect.html.jinja").render(
        recipe=recipe,
        found=found,
        cards=cards,
        chart=chart,
        counts=list(zip(images.classes, *counts.values(), strict=True)),
        totals=[sum(values) for values in counts.values()],
        largest=max(*counts["train"], 1),
    )


def _sizes(sizes: list[tuple[int, int]]) -> Figure:
    """Width and height of every picture, both logarithmic."""
    figure = charts.blank(5, 3.6)
    axis = figure.subplots()
    widths, heights = zip(*sizes)
    axis.scatter(widths, heights, s=9, color=charts.BLUE, alpha=0.4, linewidths=0, rasterized=len(sizes) > 2000)
    axis.set(xlabel="width in pixels", ylabel="height in pixels", xscale="log", yscale="log")
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter(EngFormatter(sep=""))
        one.set_minor_formatter(EngFormatter(sep=""))
    axis.grid(alpha=0.2)
    return figure
