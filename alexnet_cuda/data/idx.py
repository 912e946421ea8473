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
from ..sources import data_path
from .imageset import ImageSet, Split, read_glyph, split_images
from .scan import is_litter

SIZE = 32
FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
ADDRESSES = {
    "mnist": "https://storage.googleapis.com/cvdf-datasets/mnist",
    "fashion-mnist": "https://github.com/zalandoresearch/fashion-mnist",
}
CLASSES = {
    "mnist": [str(digit) for digit in range(10)],
    "fashion-mnist": [
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ],
}


def load(recipe: Recipe) -> ImageSet:
    """The 28x28 grey images padded to 32x32; `recipe.val_fraction` of the 60,000 is the validation split.

    `recipe.data_path` holds MNIST/raw (or FashionMNIST/raw) with the four files, or the files themselves, there or
    deeper: as published, or as archivers unpack them (train-images.idx3-ubyte, in a folder of that name; .gz or not,
    whatever their name says). Raises DataError naming the file that is missing, cut short, or not IDX. Format: Y.
    LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits".
    """
    name = FOLDERS[recipe.data]
    root = data_path(recipe)
    folder = next((root / inside for inside in (f"{name}/raw", "raw", name) if (root / inside).is_dir()), root)
    files = _idx_files(folder, set(FOLDERS.values()) - {name})
    if not any(key.startswith("trainimages") for key in files):
        raise DataError(f"{root / name / 'raw'} holds no train-images-idx3-ubyte(.gz); --data-path was {root}; "
                        f"{ADDRESSES[recipe.data]} has the files")  # fmt: skip
    train, test = _split(folder, files, "train"), _split(folder, files, "t10k")
    val, train = split_images(*train, (recipe.val_fraction,), recipe.split_seed)
    return ImageSet(CLASSES[recipe.data], train, val, test, SIZE)


def read(recipe: Recipe, path: Path) -> Tensor:
    """A picture of one digit or garment as the set holds them: 28x28 pixels, padded to (1, 32, 32)."""
    return F.pad(read_glyph(path, 28), (2, 2, 2, 2))


def _split(folder: Path, files: dict[str, Path], part: str) -> Split:
    paths = []
    for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
        if _letters(name) not in files:
            raise DataError(f"{folder / name}(.gz) does not exist")
        paths.append(files[_letters(name)])
    images, labels = map(read_idx, paths)
    if images.shape[1:] != (28, 28):
        raise DataError(f"{paths[0]} holds an array of {images.shape}, expected images of 28x28")
    if labels.shape != images.shape[:1]:
        raise DataError(f"{paths[1]} holds {labels.shape} labels for {len(images)} images")
    if len(labels) == 0 or labels.max() > 9:
        raise DataError(f"{paths[1]} holds no label, or one above 9")
    return Split(F.pad(torch.from_numpy(images)[:, None], (2, 2, 2, 2)), torch.from_numpy(labels).long())


def _idx_files(folder: Path, others: set[str], depth: int = 3) -> dict[str, Path]:
    """The files in a folder and up to `depth` below it, by the letters of their names: the highest of each, and of two
    side by side the unpacked one. Folders of `others` are other data sets."""
    files: dict[str, Path] = {}
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in (path for path in entries if path.is_file() and not is_litter(path.name)):
        files.setdefault(_letters(path.name), path)
    for path in (path for path in entries if depth and path.is_dir()):
        if path.name not in others and not is_litter(path.name):
            files = _idx_files(path, others, depth - 1) | files
    return files


def _letters(name: str) -> str:
    return "".join(c for c in name.lower().removesuffix(".gz") if c.isalnum())


def read_idx(path: Path) -> np.ndarray:
    """One IDX file of unsigned bytes: two zero bytes, type 8, the rank, big-endian sizes, then the values."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked: {error}") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise DataError(f"{path} is not an IDX file of bytes: it begins with {data[:4].hex(' ') or 'nothing'}")
    shape = tuple(np.frombuffer(data, ">i4", data[3], 4).tolist())
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if min(shape) < 0 or values.size != np.prod(shape):
        raise DataError(f"{path} holds {values.size} values, its header promises {'x'.join(map(str, shape))}")
    return values.reshape(shape).copy()
