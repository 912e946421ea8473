"""Draws the figures of explained.md from the package's own functions: `python docs/explained/figures.py`."""

from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.datasets import load_sample_image

from alexnet_cuda import ops
from alexnet_cuda.data.augmentation import ColourNoise
from alexnet_cuda.files import atomic_path

HERE = Path(__file__).resolve().parent
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#767676"
matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
                            "svg.hashsalt": "explained", "svg.fonttype": "none"})  # fmt: skip


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
    for function, suffix in ((relu, "svg"), (lrn, "svg"), (pooling, "svg"), (augmentation, "png")):
        with atomic_path(HERE / f"{function.__name__}.{suffix}") as path:
            metadata = {"Date": None} if suffix == "svg" else None
            function().savefig(path, format=suffix, metadata=metadata)


if __name__ == "__main__":
    main()
