"""Data sets by name. A data set is a module with `load(recipe)`, `read(recipe, path)` and `SIZE`; one of files also has
`survey(recipe)`, for `inspect`, and `load_test(recipe, classes)`, for new pictures.

One more needs such a module, its name among the choices of `Recipe.data`, and a line in MODULES if the names differ.
"""

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from types import ModuleType

from ..errors import DataError
from ..recipe import Recipe
from .imageset import ImageSet, Split

MODULES = {"mnist": "idx", "fashion-mnist": "idx", "bike-ship": "folder", "imagenet": "folder"}

__all__ = ["DataError", "ImageSet", "Split", "load_images", "load_test_images", "source"]


def source(recipe: Recipe) -> ModuleType:
    """The module of `recipe.data`: `load` gives its ImageSet; `read` reads one more picture, of edge `SIZE` if set."""
    return import_module(f".{MODULES.get(recipe.data, recipe.data)}", __name__)


def load_images(recipe: Recipe) -> ImageSet:
    """The image set `recipe.data`, read from `recipe.data_path` where it needs one; DataError where it cannot be."""
    images = source(recipe).load(recipe)
    if recipe.val_fraction == 0 and len(images.val.labels) == 0:
        images = replace(images, val=images.test)  # recipe.monitor is none, so that validation selects nothing
    for name, counts in images.counts().items():
        if sum(counts) == 0:
            asked_none = name == "test" and recipe.test_fraction == 0
            why = "test_fraction is 0" if asked_none else "too few images to split"
            raise DataError(f"the {name} split of {recipe.data_path or recipe.data} is empty: {why}")
    return images.limited(recipe.limit, recipe.split_seed) if recipe.limit else images


def load_test_images(recipe: Recipe, classes: Sequence[str]) -> ImageSet:
    """The images at `recipe.data_path` to test a network with these classes on. Pictures in folders or tables count as
    new ones: all are the test split, unless they have splits of their own. Other data sets are as `load_images` reads
    them."""
    module = source(recipe)
    return module.load_test(recipe, classes) if hasattr(module, "load_test") else load_images(recipe)
