"""What every data set consists of and uses: classes, three splits, reading and resizing of pictures."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torchvision.transforms import v2

from .picture import decode, on_white

T = TypeVar("T")


class Split(NamedTuple):
    """Images, one tensor or a sequence that decodes them, each uint8 (C, H, W); and their labels (N,)."""

    images: Any
    labels: Tensor


class Items(Sequence):
    """Images that an index, or a tensor of indices, selects: `decode(item)`, made anew each time."""

    def __init__(self, items: Sequence, decode: Callable[[Any], Tensor] = torch.as_tensor):
        self.items, self.decode = items, decode

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):
        if isinstance(index, Tensor) and index.dim() == 1:
            return Items([self.items[i] for i in index.tolist()], self.decode)
        return self.decode(self.items[index])


@dataclass
class ImageSet:
    """Classes, three splits, and `notes` for the user. `size` is the edge of all images. None: they differ in size, and
    each is resized and cropped before it is batched."""

    classes: list[str]
    train: Split
    val: Split
    test: Split
    size: int | None
    notes: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, list[int]]:
        """Images per class, for each split."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        return {k: torch.bincount(v.labels, minlength=len(self.classes)).tolist() for k, v in splits.items()}

    def limited(self, count: int, seed: int) -> "ImageSet":
        """About `count` images of each split, in every class's proportion, at least one of each, for a quick trial."""

        def few(split: Split) -> Split:
            if len(split.labels) <= count:
                return split
            chosen, _ = stratified_split(split.labels, (count / len(split.labels),), seed)
            chosen = chosen if len(chosen) else torch.arange(count)  # where every class has a single image
            return Split(split.images[chosen], split.labels[chosen])

        return replace(self, train=few(self.train), val=few(self.val), test=few(self.test))


def stratified_split(labels: Tensor, fractions: Sequence[float], seed: int) -> list[Tensor]:
    """Indices of the parts that `fractions` ask for, then of the rest, with every class in proportion in each. Each
    class is shuffled with `seed`; a class with at least as many images as there are parts has one in each."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in range(len(fractions) + 1)]
    for label in labels.unique():
        of_class = (labels == label).nonzero().flatten()
        of_class = of_class[torch.randperm(len(of_class), generator=generator)]
        spare = len(of_class) - len(fractions)
        sizes = [min(max(round(f * len(of_class)), int(spare > 0)), max(spare, 0)) if f else 0 for f in fractions]
        for part, chunk in zip(parts, of_class.split([*sizes, len(of_class) - sum(sizes)]), strict=True):
            part.append(chunk)
    return [torch.cat(part).sort().values for part in parts]


def split_images(images: Any, labels: Tensor, fractions: Sequence[float], seed: int) -> list[Split]:
    """The parts of `stratified_split` with their images."""
    return [Split(images[part], labels[part]) for part in stratified_split(labels, fractions, seed)]


def for_each_file(function: Callable[[Path], T], paths: Sequence[Path], what: str) -> list[T]:
    """`function` of every path, on several threads, with a progress bar where there are many."""
    pool = ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1)))
    try:
        return list(progress(pool.map(function, paths), what, len(paths), len(paths) >= 500))
    finally:
        pool.shutdown(cancel_futures=True)  # an error or Ctrl-C does not wait for all that were to come


def progress(items: Iterable[T], what: str, count: int, shown: bool) -> Iterable[T]:
    return track(items, what, count, transient=True, disable=not (shown and Console().is_terminal))


def read_glyph(path: Path, native: int) -> Tensor:
    """Reads a picture of one bright glyph on black (1, native, native), as the digit sets hold it. Ink of one colour on
    a transparent ground is taken by its opacity. A picture with a bright border is taken for dark ink on paper and
    inverted; one that is not square is padded."""
    image = decode(path).image
    if image.mode in ("LA", "RGBA"):
        grey, alpha = (np.asarray(channel).astype(int) for channel in image.convert("LA").split())
        ink = grey[alpha > 127]
        image = image.getchannel("A") if ink.size == 0 or np.ptp(ink) <= 64 else on_white(image)
    x = torch.from_numpy(np.array(image.convert("L")))[None]
    border = torch.cat([x[:, 0].flatten(), x[:, -1].flatten(), x[:, :, 0].flatten(), x[:, :, -1].flatten()])
    if border.median() > 127:
        x = 255 - x
    edge = max(x.shape[1:])
    x = v2.functional.center_crop(x, [edge])  # pads the shorter side
    return x if edge == native else resize(x[None], native)[0]


def resize(x: Tensor, size: int) -> Tensor:
    """Resizes uint8 images (N, C, H, W) to (N, C, size, size): bilinear, antialiased where it shrinks."""
    y = F.interpolate(x.float(), (size, size), mode="bilinear", antialias=x.shape[-1] > size)
    return y.round().clamp(0, 255).to(torch.uint8)
