"""Batches: augmentation per image, resizing and normalisation per batch, an order that a resumed run finds again."""

import os
from collections.abc import Iterator

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from ..variants import VARIANTS
from .imageset import ImageSet, Split


class Pixels(Dataset):
    """One split: uint8 image and label for a key (index, seed); the seed decides the augmentation of its batch."""

    def __init__(self, split: Split, transform: v2.Transform):
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keys[0][1])
            return [(self.transform(self.split.images[i]), self.split.labels[i]) for i, _ in keys]


class EpochSampler(Sampler):
    """Indices for one process of several, each with a seed; both depend on (seed, epoch, position) and nothing else.

    The processes take turns, so that the union of their k-th batches is the k-th batch of one process with a batch as
    large as theirs together. With `shuffle` all get equally many indices, which may drop the last few of an epoch.
    """

    def __init__(self, length: int, shuffle: bool, seed: int, rank: int = 0, world: int = 1):
        self.total = length - length % world if shuffle else length
        self.length, self.shuffle, self.seed, self.rank, self.world = length, shuffle, seed, rank, world
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return len(range(self.rank, self.total, self.world))

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator) if self.shuffle else torch.arange(self.length)
        seeds = torch.randint(2**62, (self.length,), generator=generator)
        for position in range(self.rank + self.start * self.world, self.total, self.world):
            yield int(order[position]), int(seeds[position])


class ResumableLoader(DataLoader):
    """A DataLoader over an EpochSampler that goes on after the last batch it gave, in the epoch it was in."""

    def __init__(self, dataset: Pixels, batch_size: int, sampler: EpochSampler, **options):
        super().__init__(dataset, batch_size, sampler=sampler, **options)
        self.order, self.size, self.given = sampler, batch_size, 0

    def __iter__(self) -> Iterator:  # type: ignore[override]
        self.given = self.order.start // self.size
        for batch in super().__iter__():
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.order.epoch, "batches": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        epoch, batches = state["epoch"], state["batches"]
        epoch, batches = (epoch + 1, 0) if batches >= len(self) else (epoch, batches)
        self.order.epoch, self.order.start = epoch, batches * self.size


class Normalise:
    """uint8 (N, C, H, W) to what the network takes: 0..1 less the mean, over the deviation, in its size."""

    def __init__(self, recipe):
        self.mean, self.std = (torch.tensor(v).reshape(1, -1, 1, 1) for v in (recipe.mean, recipe.std))
        self.size, self.channels = VARIANTS[recipe.variant].input_size, recipe.channels

    def __call__(self, x: Tensor) -> Tensor:
        y = (x.float() / 255 - self.mean.to(x.device)) / self.std.to(x.device)
        if y.shape[-1] != self.size:
            y = F.interpolate(y, (self.size, self.size), mode="bilinear", antialias=y.shape[-1] > self.size)
        return y.expand(-1, self.channels, -1, -1).contiguous(memory_format=torch.channels_last)


class ImageData(lightning.LightningDataModule):
    """Loaders for the three splits of an ImageSet; batches arrive on the device as the network takes them."""

    def __init__(self, images: ImageSet, recipe):
        super().__init__()
        self.images, self.recipe, self.normalise = images, recipe, Normalise(recipe)

    def train_dataloader(self) -> ResumableLoader:
        return self._loader(self.images.train, augment(self.recipe, self.images.size), shuffle=True)

    def val_dataloader(self) -> ResumableLoader:
        return self._loader(self.images.val, plain(self.recipe, self.images.size))

    def test_dataloader(self) -> ResumableLoader:
        return self._loader(self.images.test, plain(self.recipe, self.images.size))

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        return self.normalise(batch[0]), batch[1]

    def _loader(self, split: Split, transform: v2.Transform, shuffle: bool = False) -> ResumableLoader:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = EpochSampler(len(split.labels), shuffle, self.recipe.seed, rank, world)
        batch = max(1, min(self.recipe.batch_size, len(sampler)))
        workers = self.recipe.workers
        if workers < 0:
            decoding = self.images.size is None or torch.cuda.is_available()
            workers = min(8, len(os.sched_getaffinity(0))) if decoding else 0
        return ResumableLoader(
            Pixels(split, transform),
            batch,
            sampler,
            drop_last=shuffle,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def plain(recipe, size: int | None) -> v2.Transform:
    """What testing does to one image: nothing, or resize to 8/7 of the edge and crop the centre."""
    if size is not None:
        return v2.Identity()
    edge = VARIANTS[recipe.variant].input_size
    return v2.Compose([v2.Resize(edge * 8 // 7, antialias=True), v2.CenterCrop(edge)])


def augment(recipe, size: int | None) -> v2.Transform:
    """What training does to one image, as the recipe's crop (of photographs), rotate, shift, zoom and flip say."""
    steps: list[v2.Transform] = []
    if size is None:
        steps.append(v2.RandomResizedCrop(VARIANTS[recipe.variant].input_size, (recipe.crop, 1.0), antialias=True))
    if recipe.rotate or recipe.shift or recipe.zoom:
        shift, zoom = (recipe.shift, recipe.shift), (1 - recipe.zoom, 1 + recipe.zoom)
        steps.append(v2.RandomAffine(recipe.rotate, shift, zoom, interpolation=v2.InterpolationMode.BILINEAR))
    if recipe.flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps) if steps else v2.Identity()
