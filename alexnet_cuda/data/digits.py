"""The 1,797 handwritten digits of 8x8 pixels that scikit-learn carries: real images, no download."""

from pathlib import Path

import torch

from ..recipe import Recipe
from .imageset import ImageSet, read_glyph, resize, split_images

NATIVE, SIZE = 8, 32


def load(recipe: Recipe) -> ImageSet:
    """The digits at 32x32, split with `recipe.split_seed` into train, val and test in every class's proportion. Source:
    E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository (the test part)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images / 16 * 255).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(bunch.target).long()
    images, fractions = resize(images, SIZE), (recipe.test_fraction, recipe.val_fraction)
    test, val, train = split_images(images, labels, fractions, recipe.split_seed)
    return ImageSet([str(name) for name in bunch.target_names], train, val, test, SIZE)


def read(recipe: Recipe, path: Path) -> torch.Tensor:
    """A picture of a digit as the set holds them: 8x8 pixels, then (1, 32, 32)."""
    return resize(read_glyph(path, NATIVE)[None], SIZE)[0]
