"""CIFAR-10 from any of its layouts: the published binary or Python batches, or lossless WebP sheets."""

import itertools
import pickle
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, first_line
from ..recipe import Recipe
from ..sources import data_path
from .imageset import ImageSet, Split, resize, split_images
from .picture import open_image

SIZE = 32
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
TRAIN, TEST = [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]
Batches = Iterator[tuple[np.ndarray, np.ndarray]]  # images (N, 3072) and labels (N,)


def load(recipe: Recipe) -> ImageSet:
    """The 32x32 colour images; `recipe.val_fraction` of the 50,000 is the validation split.

    `recipe.data_path` (or a folder in it) holds data_batch_1.bin .. data_batch_5.bin and test_batch.bin, or the same
    names without .bin (pickles, of which only arrays, lists and strings are read), or train_1.webp .. train_5.webp and
    test.webp (100 rows of 100 images) with train_labels.npy and test_labels.npy; or, there or as `recipe.data_path`
    itself, the published archive. Raises DataError naming the file that is missing or damaged. Source: A. Krizhevsky,
    "Learning multiple layers of features from tiny images", 2009.
    """
    root = data_path(recipe)
    archives = [root] if root.is_file() else sorted(root.glob("cifar-10-*.tar*"))
    found = _read_folder(root) or (_read_archive(archives[0]) if archives else None)
    if found is None:
        raise DataError(f"{root} holds no {', no '.join(LAYOUTS)}, nor does a folder in it; {ADDRESS} has the archive")
    val, train = split_images(*found[0], (recipe.val_fraction,), recipe.split_seed)
    return ImageSet(CLASSES, train, val, found[1], SIZE)


def read(recipe: Recipe, path: Path) -> Tensor:
    """The middle square of a colour picture as the set holds its own: (3, 32, 32)."""
    x = open_image(path, "RGB")
    h, w = x.shape[1:]
    edge = min(h, w)
    top, left = (h - edge) // 2, (w - edge) // 2
    return resize(x[None, :, top : top + edge, left : left + edge], SIZE)[0]


def _read_folder(root: Path) -> tuple[Split, Split] | None:
    """The 50,000 and the 10,000 images in a folder or at most two levels below it; None where there are none."""
    folders = [root / name for name in ("cifar10", "cifar-10-batches-bin", "cifar-10-batches-py", ".")]
    for folder, (marker, read_batches) in itertools.product(folders, LAYOUTS.items()):
        if (folder / marker).exists():
            return _joined(read_batches(folder, TRAIN)), _joined(read_batches(folder, TEST))
    for pattern, (marker, read_batches) in itertools.product(("*", "*/*"), LAYOUTS.items()):
        for path in sorted(root.glob(f"{pattern}/{marker}")):
            return _joined(read_batches(path.parent, TRAIN)), _joined(read_batches(path.parent, TEST))
    return None


def _read_archive(path: Path) -> tuple[Split, Split] | None:
    """The same of a tar archive, of which only plain files in its one folder are unpacked, into a temporary one."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    name = Path(member.name).name
                    if (file := archive.extractfile(member)) and Path(name).stem in (*TRAIN, *TEST):
                        (Path(scratch) / name).write_bytes(file.read())
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            reason = first_line(error).rstrip(":")
            raise DataError(f"{path} cannot be unpacked as the archive of CIFAR-10: {reason}") from error
        return _read_folder(Path(scratch))


def _binary(folder: Path, names: list[str]) -> Batches:
    """Records of 3,073 bytes: the label, then the red, green and blue planes."""
    for path in (folder / f"{name}.bin" for name in names):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        if not data or len(data) % 3073:
            raise DataError(f"{path} holds {len(data)} bytes, expected a multiple of 3,073")
        rows = np.frombuffer(data, np.uint8).reshape(-1, 3073)
        yield _checked(rows[:, 1:], rows[:, 0], path)


def _python(folder: Path, names: list[str]) -> Batches:
    for path in (folder / name for name in names):
        try:
            with path.open("rb") as file:
                batch = _ArraysOnly(file, encoding="latin1").load()
            data, labels = np.asarray(batch["data"], np.uint8), np.asarray(batch["labels"], np.int64)
        except FileNotFoundError:
            raise DataError(f"{path} does not exist") from None
        except Exception as error:  # a damaged pickle raises almost anything
            raise DataError(f"{path} is not a batch of CIFAR-10: {error}") from error
        yield _checked(data, labels, path)


class _ArraysOnly(pickle.Unpickler):
    """Rebuilds numpy arrays and nothing else: a pickle that names another function is refused, not run."""

    def find_class(self, module: str, name: str):
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode("latin1")
        if module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _sheets(folder: Path, names: list[str]) -> Batches:
    part, images = "test" if names == TEST else "train", []
    for path in (folder / f"{name.replace('_batch', '').replace('data', 'train')}.webp" for name in names):
        sheet = open_image(path, "RGB", whole=True).numpy()
        if sheet.shape[1] % 32 or sheet.shape[2] % 32:
            raise DataError(f"{path} is {sheet.shape[2]}x{sheet.shape[1]}, expected rows and columns of 32x32 images")
        rows, columns = sheet.shape[1] // 32, sheet.shape[2] // 32
        images.append(sheet.reshape(3, rows, 32, columns, 32).transpose(1, 3, 0, 2, 4).reshape(-1, 3072))
    path = folder / f"{part}_labels.npy"
    try:
        labels = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as an array: {error}") from error
    yield _checked(np.concatenate(images), labels, path)


LAYOUTS = {"data_batch_1.bin": _binary, "data_batch_1": _python, "train_1.webp": _sheets}


def _checked(images: np.ndarray, labels: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
    if images.ndim != 2 or images.shape[1] != 3072 or labels.shape != images.shape[:1]:
        raise DataError(f"{path} holds images {images.shape} and labels {labels.shape}, expected (N, 3072) and (N,)")
    if len(labels) == 0 or labels.min() < 0 or labels.max() > 9:
        raise DataError(f"{path} holds no label, or one outside 0..9")
    return images, labels


def _joined(batches: Batches) -> Split:
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return Split(torch.from_numpy(images.reshape(-1, 3, 32, 32)), torch.from_numpy(labels.astype(np.int64)))
