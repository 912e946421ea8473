"""The architecture of a variant as one figure: activations as boxes, as in the 2012 paper, above a table.

A column of the figure is a `Stage`. The axes are in points, and `Box` places a stage on them.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch, Polygon, Rectangle

from .. import variants
from ..files import atomic_path
from ..model import AlexNet
from ..summary import LayerSummary, layer_names, model_summary
from ..variants import Layer
from ..words import percent

SUFFIXES = (".svg", ".png", ".pdf")
# Okabe and Ito's palette, distinguishable with any form of colour blindness.
COLOURS = {
    "input": "#8A8F98", "convolution": "#0072B2", "max pooling": "#E69F00", "dense": "#009E73",
    "ReLU": "#8A8F98", "Tanh": "#8C6D1F", "LRN": "#CC79A7", "BatchNorm": "#56B4E9", "dropout": "#D55E00",
    "average pooling": "#F0E442",
}  # fmt: skip
THEMES = {
    "light": {"paper": "#ffffff", "ink": "#1b1f24", "faint": "#575e68", "rule": "#d4d8de"},
    "dark": {"paper": "#14171c", "ink": "#eceef1", "faint": "#a9b0ba", "rule": "#3a4049"},
}
# Lengths in points. The length of an edge is proportional to the square root of its size: with linear scaling, 13x13
# would be a dot beside 227x227.
LEFT, COLUMN, BAND, ROW, CHIP, BARS, MARGIN = 104, 94, 262, 19, 17, 34, 22
EDGE, WIDTH, SLANT = 168, 2.1, (0.36, 0.28)


@dataclass
class Stage:
    """One column of the figure: an activation of `size` (H, W, C) or (units,), and the layer that computes it.

    cells: texts of the table by row. crosses: a filter or unit sees the outputs of all groups of the stage before.
    then: (kind, label) of the layers behind it that keep its size. `parameters` and `macs` (multiply-accumulates per
    image) include theirs.
    """

    name: str
    kind: str
    size: tuple[int, ...]
    kernel: int = 0
    cells: dict[str, str] = field(default_factory=dict)
    crosses: bool = False
    then: list[tuple[str, str]] = field(default_factory=list)
    parameters: int = 0
    macs: int = 0


def stages(model: AlexNet) -> list[Stage]:
    """The columns of a network's figure, from the image to the scores, with the numbers of `model_summary`."""
    variant, names = model.variant, layer_names(model)
    found = [Stage("image", "input", (variant.input_size, variant.input_size, model.in_channels))]
    specs = iter((*variant.features, *variant.classifier))
    for row in model_summary(model):
        spec = None if row.type == "AdaptiveAvgPool2d" else next(specs)
        if isinstance(spec, variants.Conv | variants.Linear | variants.MaxPool):
            found.append(_stage(spec, row, names[row.name], found[-1]))
        else:
            found[-1].then.append(_step(spec, row))
        found[-1].parameters += row.parameters
        found[-1].macs += row.macs
    return found


def _stage(spec: Layer, row: LayerSummary, name: str, before: Stage) -> Stage:
    size = (*row.output_size[1:], row.output_size[0])
    if isinstance(spec, variants.Linear):
        cells = {"layer": f"{size[0]:,} unit{'s' if size[0] > 1 else ''}"}
        return Stage(name, "dense", size, cells=cells, crosses=True)
    assert isinstance(spec, variants.Conv | variants.MaxPool)
    k, padding = spec.kernel_size, str(getattr(spec, "padding", 0))
    cells = {"stride": str(spec.stride), "padding": padding + (", rounded up" if spec.ceil_mode else "")}
    if isinstance(spec, variants.MaxPool):
        return Stage(name, "max pooling", size, k, {"layer": f"max of {_product(k, k)}", **cells})
    depth = before.size[-1] // spec.groups
    crosses = spec.groups == 1 and before.kind != "input"
    cells["layer"] = f"{spec.filters} of {_product(k, k, depth)}"
    return Stage(name, "convolution", size, k, cells, crosses)


def _step(spec: Layer | None, row: LayerSummary) -> tuple[str, str]:
    """Kind and label of a layer that is drawn as a label below the stage it follows."""
    match spec:
        case variants.LRN(size, across="channels", groups=groups):
            return "LRN", f"LRN {size}, per column" if groups > 1 else f"LRN {size}"
        case variants.LRN(size):
            return "LRN", f"LRN {_product(size, size)} in plane"
        case variants.Dropout(p):
            return "dropout", f"dropout {p:g}"
        case variants.BatchNorm() | variants.ReLU() | variants.Tanh():
            return (type(spec).__name__,) * 2
        case _:
            return "average pooling", f"average to {_product(*row.output_size[1:])}"


@dataclass
class Box:
    """A cuboid: the lower left corner (x, y) and the size (w, h) of its front face, and the shift of its back face."""

    x: float
    y: float
    w: float
    h: float
    dx: float
    dy: float

    def side(self, u: float, v: float) -> tuple[float, float]:
        """A point of the right face: u from front to back, v from bottom to top, both 0..1."""
        return self.x + self.w + u * self.dx, self.y + v * self.h + u * self.dy


def architecture(model: AlexNet, theme: str = "light", table: bool = True) -> Figure:
    """The figure of a network; one unit of its axes is one point. A network with grouped convolutions is drawn as two
    rows of boxes, as in figure 2 of the paper; the connections show which halves of the channels a layer sees. The
    table below has a column of numbers for each box."""
    look, variant, columns = THEMES[theme], model.variant, stages(model)
    split = any(isinstance(spec, variants.Conv) and spec.groups > 1 for spec in variant.features)
    marks = CHIP * max(len(stage.then) for stage in columns) + 8
    rows = ["layer", "stride", "padding", *(["sees"] if split else []), "output"]
    width = LEFT + COLUMN * len(columns) + MARGIN
    height = 92 + BAND + marks + 62 + (ROW * (len(rows) + 1) + 2 * (BARS + ROW) if table else 0)
    figure = Figure(figsize=(width / 72, height / 72), facecolor=look["paper"])
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()

    parameters, macs = (sum(getattr(stage, key) for stage in columns) for key in ("parameters", "macs"))
    classes = f"{model.num_classes:,} class{'es' if model.num_classes > 1 else ''}"
    totals = f"{_product(*columns[0].size)} image to {classes}, {parameters:,} parameters"
    totals += f", {_millions(macs)} multiply-accumulates"
    axes.text(MARGIN, height - 38, variant.name, size=22, weight="bold", color=look["ink"], gid="name")
    axes.text(MARGIN, height - 59, variant.description, size=12, color=look["ink"], gid="description")
    axes.text(MARGIN, height - 78, totals, size=11, color=look["faint"], gid="totals")

    middle = height - 92 - BAND / 2
    _volumes(axes, columns, middle, split, look)
    _marks(axes, columns, middle - BAND / 2 - 6, look)
    if table:
        _table(axes, columns, rows, middle - BAND / 2 - marks, split, look)
    _legend(axes, columns, look)
    return figure


def draw(variant: str, path: Path, num_classes: int | None = None, theme: str = "light", table: bool = True) -> None:
    """Writes the figure of a variant to an .svg, .pdf or .png file; the same call gives the same bytes. Raises
    ValueError for an unknown variant, theme or file suffix, and OSError if the file cannot be written."""
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise ValueError(f"the drawing must end in .svg, .pdf or .png, got {path.name!r}")
    if theme not in THEMES:
        raise ValueError(f"unknown theme {theme!r}; choose from {', '.join(THEMES)}")
    with torch.device("meta"):
        model = AlexNet(variant, num_classes)
    title = {"Title": f"{model.variant.name}: {model.variant.description}"}
    path.parent.mkdir(parents=True, exist_ok=True)
    # fonttype none: text instead of outlines, which can be searched and selected
    with (
        rc_context({"svg.fonttype": "none", "svg.hashsalt": variant, "pdf.fonttype": 42}),
        atomic_path(path) as temporary,
    ):
        date: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(kind, {})
        architecture(model, theme, table).savefig(temporary, format=kind[1:], dpi=160, metadata={**title, **date})


def _volumes(axes: Axes, columns: list[Stage], middle: float, split: bool, look: dict[str, str]) -> None:
    largest = columns[0].size[0]
    units = max(stage.size[0] for stage in columns if stage.kind == "dense")
    before: list[Box] = []
    for i, stage in enumerate(columns):
        halves = 2 if split and 0 < i < len(columns) - 1 else 1
        share = stage.size[-1] / halves
        if stage.kind == "dense":
            h = max(7.0, 0.8 * EDGE * (stage.size[0] / units) ** 0.5 / halves**0.5)
            w, dx, dy = 9.0, 6.0, 4.5
        else:
            h = EDGE * (stage.size[0] / largest) ** 0.5
            w, dx, dy = 2 + WIDTH * share**0.5, SLANT[0] * h, SLANT[1] * h
        x = LEFT + COLUMN * (i + 0.5) - (w + dx) / 2
        centres = (middle + BAND / 4, middle - BAND / 4) if halves == 2 else (middle,)
        below = [False, True][:halves]  # the lower row has its labels below, clear of the lines between the rows
        boxes = [Box(x, c - (h + dy) / 2 + (5 if b else -5), w, h, dx, dy) for c, b in zip(centres, below)]
        for row, box in enumerate(boxes):
            for other, source in enumerate(before):
                if stage.crosses or len(before) != len(boxes) or row == other:
                    _connect(axes, source, box, stage, columns[i - 1], look)
        size = _product(*stage.size[:-1], stage.size[-1] // halves)
        for box, under in zip(boxes, below):
            _draw_box(axes, box, COLOURS[stage.kind], look)
            y, align = (box.y - 4, "top") if under else (box.y + box.h + box.dy + 4, "bottom")
            axes.text(box.x + (box.w + box.dx) / 2, y, size, size=9, color=look["ink"], ha="center", va=align)
        before = boxes
    if split:
        for name, side in (("GPU 1", 1), ("GPU 2", -1)):
            axes.text(MARGIN, middle + side * BAND / 4, name, size=9, color=look["faint"], va="center")
        edges = (LEFT + COLUMN, LEFT + COLUMN * (len(columns) - 1))
        axes.plot(edges, (middle, middle), color=look["rule"], linewidth=1, linestyle=(0, (4, 4)), zorder=0)


def _connect(axes: Axes, source: Box, target: Box, stage: Stage, before: Stage, look: dict[str, str]) -> None:
    """A window with lines to its result for a convolution or pooling, a trapezoid for a dense layer."""
    colour, end = COLOURS[stage.kind], (target.x, target.y + target.h / 2)
    if stage.kind == "dense":
        fan = [source.side(0.5, 1), (target.x, target.y + target.h), (target.x, target.y), source.side(0.5, 0)]
        axes.add_patch(Polygon(fan, facecolor=colour, edgecolor="none", alpha=0.22, zorder=1))
        return
    share = min(1.0, max(stage.kernel / before.size[0], 5 / source.h))
    low, high = (1 - share) / 2, (1 + share) / 2
    window = [source.side(u, v) for u, v in ((low, low), (high, low), (high, high), (low, high))]
    a, b, c, d = window
    axes.plot(*zip(a, end, b, c, end, d), color=look["ink"], linewidth=0.7, alpha=0.6, zorder=4)
    axes.add_patch(Polygon(window, facecolor=look["paper"], edgecolor=look["ink"], linewidth=0.8, alpha=0.9, zorder=4))


def _draw_box(axes: Axes, box: Box, colour: str, look: dict[str, str]) -> None:
    x, y, w, h, dx, dy = astuple(box)
    faces = {
        0.30: [(x, y + h), (x + w, y + h), (x + w + dx, y + h + dy), (x + dx, y + h + dy)],
        0.15: [box.side(0, 0), box.side(1, 0), box.side(1, 1), box.side(0, 1)],
        0.0: [(x, y), (x + w, y), (x + w, y + h), (x, y + h)],
    }
    for light, corners in faces.items():
        face = _mix(colour, "#ffffff", light)
        axes.add_patch(Polygon(corners, facecolor=face, edgecolor=look["paper"], linewidth=0.7, zorder=3))


def _marks(axes: Axes, columns: list[Stage], top: float, look: dict[str, str]) -> None:
    axes.text(MARGIN, top - CHIP / 2, "followed by", size=9, color=look["faint"], va="center")
    for x, stage in _columns(columns):
        for i, (kind, label) in enumerate(stage.then):
            y = top - CHIP * (i + 1) + 2
            colour, fill = COLOURS[kind], _mix(COLOURS[kind], look["paper"], 0.72)
            style: dict[str, Any] = dict(facecolor=fill, edgecolor=colour, linewidth=0.8)
            corner, size = (x - COLUMN / 2 + 6, y), (COLUMN - 12, CHIP - 4)
            axes.add_patch(FancyBboxPatch(corner, *size, boxstyle="round,pad=0,rounding_size=4", **style))
            axes.text(x, y + (CHIP - 4) / 2 - 0.5, label, size=8, color=look["ink"], ha="center", va="center")


def _table(axes: Axes, columns: list[Stage], rows: list[str], top: float, split: bool, look: dict[str, str]) -> None:
    """Rows of text, then bars of parameters and multiply-accumulates above their numbers."""
    right = LEFT + COLUMN * len(columns)
    axes.plot((MARGIN, right), (top, top), color=look["rule"], linewidth=1)
    y = top - ROW
    for x, stage in _columns(columns):
        axes.text(x, y, stage.name, size=11, weight="bold", color=look["ink"], ha="center")
    for row in rows:
        y -= ROW
        axes.text(MARGIN, y, row, size=9, color=look["faint"])
        for x, stage in _columns(columns):
            cell = stage.cells.get(row, "")
            if row == "sees" and stage.kind in ("convolution", "dense"):
                cell = "both GPUs" if stage.crosses else "the image" if stage.name == "conv1" else "its GPU"
            if row == "output":
                cell = _product(*stage.size)
            axes.text(x, y, cell, size=9, color=look["ink"], ha="center", gid=f"{stage.name} {row}")
    for key, label in (("parameters", "parameters"), ("macs", "multiply-\naccumulates")):
        y -= BARS + ROW
        axes.text(MARGIN, y, label, size=9, color=look["faint"], linespacing=1.1)
        counts = [getattr(stage, key) for stage in columns]
        for (x, stage), count in zip(_columns(columns), counts):
            if not count:
                continue
            bar = max((BARS - 8) * count / max(counts), 0.6)
            axes.add_patch(Rectangle((x - 20, y + 12), 40, bar, facecolor=COLOURS[stage.kind], linewidth=0))
            text = f"{count:,}" if key == "parameters" else _millions(count)
            axes.text(x, y, text, size=9, color=look["ink"], ha="center", gid=f"{stage.name} {key}")
            share = count / sum(counts)
            written = percent(share, 0) if share >= 0.01 else "<1 %"
            axes.text(x + 23, y + 13, written, size=7, color=look["faint"])


def _legend(axes: Axes, columns: list[Stage], look: dict[str, str]) -> None:
    window = Line2D([], [], marker="s", linestyle="", markersize=7, markerfacecolor=look["paper"],
                    markeredgecolor=look["ink"], label="window of the next layer")  # fmt: skip
    kinds = dict.fromkeys(stage.kind for stage in columns)
    handles = [*(Patch(color=COLOURS[kind], label=kind) for kind in kinds), window]
    axes.legend(
        handles=handles, ncols=len(handles), loc="lower left", bbox_to_anchor=(MARGIN, 17),
        bbox_transform=axes.transData, frameon=False, fontsize=9, labelcolor=look["ink"], handlelength=1,
        handleheight=1, columnspacing=1.8, borderpad=0, borderaxespad=0,
    )  # fmt: skip
    note = "edges of volumes and dense layers: square root of their size"
    if any(kind == "BatchNorm" for stage in columns for kind, _ in stage.then):
        note += "; parameters include BatchNorm's"
    axes.text(LEFT + COLUMN * len(columns), 19, note, size=9, color=look["faint"], ha="right")


def _columns(columns: list[Stage]) -> Iterator[tuple[float, Stage]]:
    """Every stage with the centre of its column."""
    return ((LEFT + COLUMN * (i + 0.5), stage) for i, stage in enumerate(columns))


def _mix(colour: str, other: str, share: float) -> str:
    mixed: Any = [a + (b - a) * share for a, b in zip(to_rgb(colour), to_rgb(other))]
    return to_hex(mixed)


def _product(*sizes: int) -> str:
    return "\N{MULTIPLICATION SIGN}".join(f"{size:,}" for size in sizes)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"
