"""Batches: augmentation, resizing and normalisation, in an order that a resumed run repeats."""

from collections.abc import Callable, Iterator
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..recipe import Recipe
from .augmentation import Augment, Normalise, Views, eval_transform
from .imageset import ImageSet, Split

KEPT_BYTES = 2**30  # of decoded pictures, for each of the three splits, in all worker processes together
Key = tuple[int, int, bool]  # of an image in an epoch: its index, a seed, and whether it is mirrored


class SplitDataset(Dataset):
    """One split, by batches of keys; the first seed of a batch decides its augmentation. Up to `room` bytes of decoded
    pictures are kept for the next epochs."""

    def __init__(self, split: Split, transform: Callable[[Any], Tensor] | Augment, room: int = 0):
        self.split, self.transform, self.room = split, transform, room
        self.kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitems__(self, keys: list[Key]) -> tuple[Tensor, Tensor]:
        """uint8 images (N, C, H, W) and labels (N,)."""
        index = torch.tensor([key[0] for key in keys])
        decoded = isinstance(self.split.images, Tensor)
        images = self.split.images[index] if decoded else [self._picture(key[0]) for key in keys]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keys[0][1])
            if isinstance(self.transform, Augment):
                x = self.transform(images, torch.tensor([key[2] for key in keys]))
            else:
                x = torch.stack([self.transform(image) for image in images])
        return x, self.split.labels[index]

    def _picture(self, index: int) -> Tensor:
        if index in self.kept:
            return self.kept[index]
        picture = self.split.images[index]
        if isinstance(self.transform, Augment):
            picture = self.transform.reduced(picture)
        if picture.numel() <= self.room:
            self.kept[index] = picture
            self.room -= picture.numel()
        return picture


def batch_as_it_is(batch: Any) -> Any:
    return batch


class EpochSampler(Sampler):
    """Keys for one process of several; they depend on (seed, epoch, position) and nothing else.

    An image is mirrored in every other epoch; by chance, whether first in the even or the odd ones (K. Jordan, "94% on
    CIFAR-10 in 3.29 seconds", 2024, section 3.6). The processes take turns, so that the union of their k-th batches is
    the k-th batch of one process with a batch as large as theirs together. With `shuffle` all get equally many keys,
    which may drop the last few of an epoch."""

    def __init__(self, length: int, shuffle: bool, seed: int, rank: int = 0, world: int = 1):
        self.total = length - length % world if shuffle else length
        self.length, self.shuffle, self.seed, self.rank, self.world = length, shuffle, seed, rank, world
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return len(range(self.rank, self.total, self.world))

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[Key]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator) if self.shuffle else torch.arange(self.length)
        seeds = torch.randint(2**62, (self.length,), generator=generator)
        first = torch.randint(2, (self.length,), generator=torch.Generator().manual_seed(self.seed))
        for position in range(self.rank + self.start * self.world, self.total, self.world):
            index = int(order[position])
            yield index, int(seeds[position]), bool((first[index] + self.epoch) % 2)


class ResumableLoader(DataLoader):
    """A DataLoader over an EpochSampler that continues after the last batch it gave, in the same epoch."""

    sampler: EpochSampler
    batch_size: int
    given = 0

    def __iter__(self) -> Iterator:  # type: ignore[override]
        self.given = self.sampler.start // self.batch_size
        for batch in super().__iter__():
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.sampler.epoch, "batches": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        ended = state["batches"] >= len(self)
        self.sampler.epoch = state["epoch"] + ended
        self.sampler.start = 0 if ended else state["batches"] * self.batch_size


class ImageData(lightning.LightningDataModule):
    """Loaders for the three splits of an ImageSet; batches are normalised on the device."""

    def __init__(self, images: ImageSet, recipe: Recipe):
        super().__init__()
        self.images, self.recipe, self.normalise = images, recipe, Normalise(recipe)

    def train_dataloader(self) -> ResumableLoader:
        return self._loader(self.images.train, Augment(self.recipe, self.images.size), shuffle=True)

    def training_sample(self) -> Tensor:
        """Up to 500 images (100 photographs) of the training split as the network takes them, (N, C, H, W)."""
        split, transform = self.images.train, eval_transform(self.recipe, self.images.size)
        count = min(len(split.labels), 500 if self.images.size else 100)
        index = torch.linspace(0, len(split.labels) - 1, count).long()
        return self.normalise(torch.stack([transform(image) for image in split.images[index]]))

    def val_dataloader(self) -> ResumableLoader:
        return self._loader(self.images.val, eval_transform(self.recipe, self.images.size))

    def test_dataloader(self) -> ResumableLoader:
        """Images (N, C, H, W), or (N, views, C, H, W) where the recipe has several views."""
        transform = eval_transform if self.recipe.views == 1 else Views
        return self._loader(self.images.test, transform(self.recipe, self.images.size))

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        return self.normalise(batch[0]), batch[1]

    def _loader(self, split: Split, transform: Any, shuffle: bool = False) -> ResumableLoader:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = EpochSampler(len(split.labels), shuffle, self.recipe.seed, rank, world)
        batch, workers = max(1, min(self.recipe.batch_size, len(sampler))), self.recipe.workers
        if workers < 0:
            decoding = self.images.size is None or torch.cuda.is_available()
            workers = min(8, torch.get_num_threads()) if decoding else 0
        return ResumableLoader(
            SplitDataset(split, transform, KEPT_BYTES // max(1, workers)),
            batch,
            sampler=sampler,
            collate_fn=batch_as_it_is,
            drop_last=shuffle,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
