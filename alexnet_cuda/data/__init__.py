"""Data sets by name. One more is one more module with `load(recipe)`, `read(recipe, path)`, `SIZE`; and a line here."""

from dataclasses import replace
from importlib import import_module
from types import ModuleType

from .files import DataError, atomic_path, write_text
from .imageset import ImageSet, Split

SOURCES = {
    "digits": "digits",
    "mnist": "idx",
    "fashion-mnist": "idx",
    "cifar10": "cifar10",
    "flowers17": "flowers17",
    "bike-ship": "folder",
    "imagenet": "folder",
    "folder": "folder",
}

__all__ = ["SOURCES", "DataError", "ImageSet", "Split", "atomic_path", "load_images", "source", "write_text"]


def source(recipe) -> ModuleType:
    """The module of `recipe.data`: `load` gives its ImageSet, `read` one more picture like those, of edge `SIZE`."""
    return import_module(f".{SOURCES[recipe.data]}", __name__)


def load_images(recipe) -> ImageSet:
    """The image set that `recipe.data` names, read from `recipe.data_path` where it needs one."""
    images = source(recipe).load(recipe)
    if recipe.val_fraction == 0 and len(images.val.labels) == 0:
        images = replace(images, val=images.test)  # watched, but without say: recipe.monitor is none
    for name, counts in images.counts().items():
        if sum(counts) == 0:
            raise DataError(f"the {name} split of {recipe.data_path or recipe.data} is empty: too few images to split")
    return images.limited(recipe.limit, recipe.split_seed) if recipe.limit else images
