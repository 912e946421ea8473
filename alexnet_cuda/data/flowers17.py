"""Oxford's 17 flowers: 80 photographs of each, numbered class by class."""

from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms import v2

from ..errors import DataError
from ..recipe import Recipe
from ..sources import data_path
from .imageset import ImageSet, Items, for_each_file, split_images
from .picture import open_image

SIZE = None
CLASSES = [
    *("daffodil", "snowdrop", "lily of the valley", "bluebell", "crocus", "iris", "tigerlily", "tulip", "fritillary"),
    *("sunflower", "daisy", "coltsfoot", "dandelion", "cowslip", "buttercup", "windflower", "pansy"),
]
PER_CLASS, SHORT_SIDE = 80, 256
FOLDERS = ("flowers17/jpg", "jpg", "")  # in which the pictures may lie


def load(recipe: Recipe) -> ImageSet:
    """The 1,360 photographs, decoded once and kept with a short side of 256, split with `recipe.split_seed`.

    `recipe.data_path` holds flowers17/jpg, jpg, or the files image_0001.jpg .. image_1360.jpg themselves; image i shows
    class (i - 1) // 80. Raises DataError naming the files that are missing or damaged. Source: M.-E. Nilsback and A.
    Zisserman, "A visual vocabulary for flower classification", CVPR 2006.
    """
    root, first = data_path(recipe), "image_0001.jpg"
    folder = next((root / inside for inside in FOLDERS if (root / inside / first).exists()), None)
    if folder is None:
        raise DataError(f"{root / FOLDERS[0]} holds no {first}; --data-path was {root}")
    paths = [folder / f"image_{i:04d}.jpg" for i in range(1, PER_CLASS * len(CLASSES) + 1)]
    if missing := [path.name for path in paths if not path.exists()]:
        raise DataError(f"{folder} lacks {len(missing)} of {len(paths)} images, among them {missing[0]}")
    labels = torch.arange(len(paths)) // PER_CLASS
    images = Items(for_each_file(lambda path: read(recipe, path), paths, "reading images"))
    test, val, train = split_images(images, labels, (recipe.test_fraction, recipe.val_fraction), recipe.split_seed)
    return ImageSet(CLASSES, train, val, test, SIZE)


def read(recipe: Recipe, path: Path) -> Tensor:
    """A photograph (3, H, W), made smaller where its short side is above 256."""
    x = open_image(path, "RGB")
    return v2.functional.resize(x, [SHORT_SIDE], antialias=True) if min(x.shape[1:]) > SHORT_SIDE else x
