"""MNIST and Fashion-MNIST from their IDX files, packed or not, without writing anything beside them."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DataError
from ..recipe import Recipe
from .imageset import ImageSet, Split, data_folder, read_glyph, split_images

SIZE = 32
FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
CLASSES = {
    "mnist": [str(digit) for digit in range(10)],
    "fashion-mnist": [
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ],
}


def load(recipe: Recipe) -> ImageSet:
    """The 28x28 grey images padded to 32x32; `recipe.val_fraction` of the 60,000 is the validation split.

    `recipe.data_path` holds MNIST/raw (or FashionMNIST/raw) with the four files as published, .gz or unpacked. Raises
    DataError naming the file that is missing, cut short, or not IDX. Format: Y. LeCun, C. Cortes, C. J. C. Burges, "The
    MNIST database of handwritten digits".
    """
    name = FOLDERS[recipe.data]
    where, missing = f" DIR, where DIR/{name}/raw holds the IDX files", "train-images-idx3-ubyte(.gz)"
    folder = data_folder(recipe, where, (f"{name}/raw", "raw", ""), "train-images*idx3-ubyte*", missing)
    train, test = _split(folder, "train"), _split(folder, "t10k")
    val, train = split_images(*train, (recipe.val_fraction,), recipe.split_seed)
    return ImageSet(CLASSES[recipe.data], train, val, test, SIZE)


def read(recipe: Recipe, path: Path) -> Tensor:
    """A picture of one digit or garment as the set holds them: 28x28 pixels, padded to (1, 32, 32)."""
    return F.pad(read_glyph(path, 28), (2, 2, 2, 2))


def _split(folder: Path, part: str) -> Split:
    images_path, labels_path = _find(folder, f"{part}-images-idx3-ubyte"), _find(folder, f"{part}-labels-idx1-ubyte")
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.shape[1:] != (28, 28):
        raise DataError(f"{images_path} holds an array of {images.shape}, expected images of 28x28")
    if labels.shape != images.shape[:1]:
        raise DataError(f"{labels_path} holds {labels.shape} labels for {len(images)} images")
    if len(labels) == 0 or labels.max() > 9:
        raise DataError(f"{labels_path} holds no label, or one above 9")
    return Split(F.pad(torch.from_numpy(images)[:, None], (2, 2, 2, 2)), torch.from_numpy(labels).long())


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.exists():
            return candidate
    raise DataError(f"{folder / name}(.gz) does not exist")


def read_idx(path: Path) -> np.ndarray:
    """One IDX file of unsigned bytes: two zero bytes, type 8, the rank, big-endian sizes, then the values."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked: {error}") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise DataError(f"{path} is not an IDX file of bytes: it begins with {data[:4].hex(' ') or 'nothing'}")
    shape = tuple(np.frombuffer(data, ">i4", data[3], 4).tolist())
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if min(shape) < 0 or values.size != np.prod(shape):
        raise DataError(f"{path} holds {values.size} values, its header promises {'x'.join(map(str, shape))}")
    return values.reshape(shape).copy()
