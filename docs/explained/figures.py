"""Draws the figures of explained.md from the package's own functions: `python docs/explained/figures.py`."""

from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter
from sklearn.datasets import load_sample_image

from alexnet_cuda import AlexNet, ops
from alexnet_cuda.data.augmentation import ColourNoise
from alexnet_cuda.files import atomic_path, read_rows
from alexnet_cuda.summary import layer_names, model_summary
from alexnet_cuda.words import percent

HERE = Path(__file__).resolve().parent
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#767676"
matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
                            "svg.hashsalt": "explained", "svg.fonttype": "none"})  # fmt: skip


def layers() -> Figure:
    """Parameters and multiply-accumulates of each layer of the paper's network."""
    figure = Figure((8, 2.8), layout="constrained")
    with torch.device("meta"):
        names = layer_names(AlexNet("paper"))
    rows = [row for row in model_summary("paper") if row.macs]
    colours = [BLUE if row.type == "Conv2d" else ORANGE for row in rows]
    for axis, key, title in zip(
        figure.subplots(1, 2), ("parameters", "macs"), ("parameters", "multiply-accumulates"), strict=True
    ):
        counts = [getattr(row, key) for row in rows]
        bars = axis.bar([names[row.name] for row in rows], [count / 1e6 for count in counts], color=colours)
        axis.bar_label(bars, [percent(count / sum(counts), 1).replace(" ", "") for count in counts], size=8)
        axis.set(title=title, ylabel="millions")
        axis.tick_params("x", labelsize=8)
    return figure


def relu() -> Figure:
    """Both functions and their derivatives."""
    figure = Figure((8, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = torch.linspace(-4, 4, 200, requires_grad=True)
    for name, function, colour in (("ReLU", torch.relu, BLUE), ("tanh", torch.tanh, ORANGE)):
        y = function(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        left.plot(x.detach(), y.detach(), color=colour, label=name)
        right.plot(x.detach(), slope, color=colour, label=name)
    left.set(title="output", xlabel="input", ylim=(-1.5, 4))
    right.set(title="derivative", xlabel="input")
    left.legend()
    return figure


def lrn() -> Figure:
    """Channels of one pixel before and after the operator; one strong channel lowers its neighbours."""
    figure = Figure((8, 2.8), layout="constrained")
    x = torch.full((1, 24, 1, 1), 60.0)
    x[0, 12] = 300.0
    y = ops.local_response_norm(x, 5, 1e-4, 0.75, 2.0, divide_alpha=False)
    for axis, values, title in zip(figure.subplots(1, 2), (x, y), ("before", "after"), strict=True):
        axis.bar(range(24), values.flatten(), color=[ORANGE if k == 12 else BLUE for k in range(24)])
        axis.set(title=title, xlabel="channel")
    return figure


def pooling() -> Figure:
    """The windows of a row of 7 pixels."""
    figure = Figure((8, 1.9), layout="constrained")
    for axis, size, title in zip(figure.subplots(1, 2), (3, 2), ("3 wide, step 2", "2 wide, step 2"), strict=True):
        for k in range(7):
            axis.add_patch(Rectangle((k, 0), 0.94, 0.9, color=GREY, alpha=0.3, lw=0))
        for n, start in enumerate(range(0, 8 - size, 2)):
            _window(axis, start, size, n)
        axis.set(title=title, xlim=(-0.2, 7.2), ylim=(-1.2, 1.1))
        axis.set_axis_off()
    return figure


def _window(axis: Axes, start: int, size: int, number: int) -> None:
    height = -0.35 - 0.35 * (number % 2)
    axis.plot([start + 0.05, start + size - 0.1], [height, height], color=BLUE if number % 2 else ORANGE, lw=5)


def groups() -> Figure:
    """Which of eight input maps each of eight filters reads, without groups and with two."""
    figure = Figure((8, 2.6), layout="constrained")
    for axis, count in zip(figure.subplots(1, 2), (1, 2), strict=True):
        half = 8 // count
        for filter_ in range(8):
            own = BLUE if filter_ < 4 else ORANGE
            for map_ in range(filter_ // half * half, (filter_ // half + 1) * half):
                axis.plot([filter_, map_], [1, 0], color=own if count == 2 else GREY, lw=0.8, zorder=0)
            for height in (0, 1):
                axis.scatter(filter_, height, s=120, color=own if count == 2 else GREY)
        axis.set_title(("one group: 64 pairs of a map and a filter", "two groups: 32 pairs")[count - 1])
        axis.text(-0.6, 0, "input maps", ha="right", va="center")
        axis.text(-0.6, 1, "filters", ha="right", va="center")
        axis.set(xlim=(-2.6, 7.5), ylim=(-0.2, 1.2))
        axis.set_axis_off()
    return figure


def edge() -> Figure:
    """The last windows of conv1 over the right end of a row of 224 and of 227 pixels."""
    figure = Figure((8, 2.1), layout="constrained")
    for axis, size in zip(figure.subplots(1, 2), (224, 227), strict=True):
        for k in range(204, 227):
            colour, alpha = (GREY, 0.3) if k < size else (ORANGE, 0.25)
            axis.add_patch(Rectangle((k, 0), 0.94, 0.9, color=colour, alpha=alpha, lw=0))
        for n, start in enumerate(range(208, 217, 4)):
            height = -0.35 - 0.35 * n
            outside = start + 11 > size
            axis.plot([start + 0.1, start + 10.9], [height, height], color=ORANGE if outside else BLUE, lw=5)
            axis.text(start - 0.4, height, f"{start // 4 + 1}", ha="right", va="center", size=9)
        axis.set(title=f"{size} pixels: window 55 {'reads 3 zeros' if size == 224 else 'fits'}", xlim=(203, 227.2))
        axis.set(ylim=(-1.4, 1.1))
        axis.set_axis_off()
    return figure


def dropout() -> Figure:
    """Loss and accuracy by epoch of two trainings, from dropout.csv."""
    figure = Figure((8, 3.2), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    rows = read_rows(HERE / "dropout.csv")
    for probability, colour in (("0", ORANGE), ("0.5", BLUE)):
        own = [row for row in rows if row["dropout"] == probability]
        epochs = [int(row["epoch"]) for row in own]
        for split, style in (("train", ":"), ("val", "-")):
            label = f"{'validation' if split == 'val' else 'training'}, dropout {probability}"
            for axis, key in ((loss, f"{split}/loss"), (accuracy, f"{split}/accuracy")):
                axis.plot(epochs, [float(row[key]) for row in own], style, color=colour, label=label)
    loss.set(title="loss", xlabel="epoch", ylim=(0, None), xticks=range(2, 17, 2))
    accuracy.set(title="accuracy", xlabel="epoch", ylim=(0, 1), xticks=range(2, 17, 2))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def augmentation() -> Figure:
    """A photograph of scikit-learn, crops of it, and the colour noise, as strong as in the paper and three times."""
    figure = Figure((9, 4.2), layout="constrained", dpi=100)
    image = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[:, 40:420, 120:500]
    image = torch.nn.functional.interpolate(image[None].float(), (256, 256), mode="area")[0].to(torch.uint8)
    torch.manual_seed(3)
    noise, strong = ColourNoise(0.1), ColourNoise(0.3)
    pictures = {
        "256x256": image, "crop": image[:, :224, :224], "another crop": image[:, 32:, 24:248],
        "mirror image": image.flip(2)[:, 10:234, 10:234], "colour noise": noise(image), "colour noise ": noise(image),
        "three times as strong": strong(image), "three times as strong ": strong(image),
    }  # fmt: skip
    for axis, (name, pixels) in zip(figure.subplots(2, 4).flat, pictures.items(), strict=True):
        axis.imshow(pixels.permute(1, 2, 0))
        axis.set_title(name.strip(), size=10)
        axis.set_axis_off()
    return figure


def main() -> None:
    for function in (layers, relu, lrn, pooling, dropout, groups, edge, augmentation):
        suffix = "png" if function is augmentation else "svg"
        with atomic_path(HERE / f"{function.__name__}.{suffix}") as path:
            metadata = {"Date": None} if suffix == "svg" else None
            function().savefig(path, format=suffix, metadata=metadata)


if __name__ == "__main__":
    main()
