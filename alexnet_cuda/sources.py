"""Where each data set can be had, and what --data-path then names. Nothing here waits for torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import DataError
from .recipe import Recipe, load_recipe

CLASSES = ": a folder of class folders (or of train, val, test), or a CSV"
# Of a data set: what --data-path names, and where it can be had.
SOURCES = {
    "mnist": (" DIR, where DIR/MNIST/raw holds the IDX files", "ossci-datasets.s3.amazonaws.com/mnist"),
    "fashion-mnist": (
        " DIR, where DIR/FashionMNIST/raw holds the IDX files", "github.com/zalandoresearch/fashion-mnist",
    ),
    "cifar10": (
        " DIR, where DIR/cifar-10-batches-bin (or -py, or cifar10), or the archive, lies",
        "www.cs.toronto.edu/~kriz/cifar.html",
    ),
    "flowers17": (
        " DIR, where DIR/flowers17/jpg or DIR/jpg holds image_0001.jpg ...", "www.robots.ox.ac.uk/~vgg/data/flowers/17",
    ),
    "bike-ship": (CLASSES, "doi.org/10.22002/D1.20086 (Caltech-101)"),
    "imagenet": (CLASSES, "image-net.org/download.php"),
    "folder": (CLASSES, ""),
}  # fmt: skip


def data_path(recipe: Recipe) -> Path:
    """The path of a recipe's data. Raises DataError where there is none, with what is expected and how it can be had,
    and where it does not exist."""
    names, address = SOURCES[recipe.data]
    if recipe.data_path is None:
        had = f"`alexnet-cuda download {recipe.data}` fetches it from {address}"
        if recipe.data == "imagenet":
            had = f"{address} has it, for those who register"
        raise DataError(f"{recipe.data} needs --data-path{names}{f'; {had}' if address else ''}")
    path = Path(recipe.data_path)
    if not path.exists():
        raise DataError(f"{path} does not exist; --data-path must name the data")
    return path


def load_ready_recipe(
    name: str, config: Path | str | None = None, overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """`load_recipe`; raises DataError where its data cannot be there, before a command loads anything else."""
    recipe = load_recipe(name, config, overrides)
    if recipe.data in SOURCES:
        data_path(recipe)
    return recipe
