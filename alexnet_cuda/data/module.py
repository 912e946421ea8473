"""Batches: augmentation per image, resizing and normalisation per batch, in an order that a resumed run repeats."""

import os
from collections.abc import Iterator

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from ..recipe import Recipe
from .imageset import ImageSet, Split


class SplitDataset(Dataset):
    """One split: uint8 image and label of a key (index, seed); the first seed of a batch decides its augmentation."""

    def __init__(self, split: Split, transform: v2.Transform):
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keys[0][1])
            return [(self.transform(self.split.images[i]), self.split.labels[i]) for i, _ in keys]


class EpochSampler(Sampler):
    """Indices for one process of several, each with a seed; both depend on (seed, epoch, position) and nothing else.
    The processes take turns, so that the union of their k-th batches is the k-th batch of one process with a batch as
    large as theirs together. With `shuffle` all get equally many indices, which may drop the last few of an epoch."""

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


class Normalise:
    """uint8 (N, C, H, W) to the network's input: (x / 255 - mean) / std, bilinearly resized to `recipe.input_size`."""

    def __init__(self, recipe: Recipe):
        self.mean, self.std = (torch.tensor(v).reshape(1, -1, 1, 1) for v in (recipe.mean, recipe.std))
        self.size, self.channels = recipe.input_size, recipe.channels

    def __call__(self, x: Tensor) -> Tensor:
        y = (x.float() / 255 - self.mean.to(x.device)) / self.std.to(x.device)
        if y.shape[-1] != self.size:
            y = F.interpolate(y, (self.size, self.size), mode="bilinear", antialias=y.shape[-1] > self.size)
        return y.expand(-1, self.channels, -1, -1).contiguous(memory_format=torch.channels_last)


class ImageData(lightning.LightningDataModule):
    """Loaders for the three splits of an ImageSet; batches are normalised on the device."""

    def __init__(self, images: ImageSet, recipe: Recipe):
        super().__init__()
        self.images, self.recipe, self.normalise = images, recipe, Normalise(recipe)

    def train_dataloader(self) -> ResumableLoader:
        return self._loader(self.images.train, augment(self.recipe, self.images.size), shuffle=True)

    def val_dataloader(self) -> ResumableLoader:
        return self._loader(self.images.val, eval_transform(self.recipe, self.images.size))

    def test_dataloader(self) -> ResumableLoader:
        """Images (N, C, H, W), or (N, views, C, H, W) where the recipe has several views."""
        transform = eval_transform if self.recipe.views == 1 else views
        return self._loader(self.images.test, transform(self.recipe, self.images.size))

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        return self.normalise(batch[0]), batch[1]

    def _loader(self, split: Split, transform: v2.Transform, shuffle: bool = False) -> ResumableLoader:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = EpochSampler(len(split.labels), shuffle, self.recipe.seed, rank, world)
        batch, workers = max(1, min(self.recipe.batch_size, len(sampler))), self.recipe.workers
        if workers < 0:
            decoding = self.images.size is None or torch.cuda.is_available()
            workers = min(8, len(os.sched_getaffinity(0))) if decoding else 0
        return ResumableLoader(
            SplitDataset(split, transform),
            batch,
            sampler=sampler,
            drop_last=shuffle,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def eval_transform(recipe: Recipe, size: int | None) -> v2.Transform:
    """What testing does to one image: nothing if it has a fixed size, else resizing and cropping the centre."""
    if size is not None:
        return v2.Identity()
    return v2.Compose([v2.Resize(recipe.test_short_side, antialias=True), v2.CenterCrop(recipe.input_size)])


def views(recipe: Recipe, size: int | None) -> v2.Transform:
    """What a test with several views does to one image: (views, C, H, W), the centre first. 2: the centre and its
    mirror image. 10: also the four corners, as in section 4.1 of the paper; an image of fixed size is first extended by
    `pad` reflected pixels."""
    if size is None:
        edge = recipe.input_size
        first: v2.Transform = v2.Resize(recipe.test_short_side, antialias=True)
    else:
        edge, first = size, v2.Pad(recipe.pad or max(1, size // 16), padding_mode="reflect")
    crops = v2.TenCrop(edge) if recipe.views == 10 else v2.CenterCrop(edge)

    def stack(x: Tensor) -> Tensor:
        y = crops(first(x))
        return torch.stack([y[4], *y[:4], *y[5:]]) if recipe.views == 10 else torch.stack([y, y.flip(-1)])

    return v2.Lambda(stack)


def augment(recipe: Recipe, size: int | None) -> v2.Transform:
    """What training does to one image: the augmentation that the recipe asks for."""
    r, steps = recipe, []
    if size is None and r.short_side:
        steps += [v2.Resize(r.short_side, antialias=True), v2.RandomCrop(r.input_size)]
    elif size is None:
        steps.append(v2.RandomResizedCrop(r.input_size, (r.crop, 1.0), antialias=True))
    elif r.pad:
        steps.append(ShiftedCrop(r.pad))
    if r.rotate or r.shift or r.zoom:
        shift, zoom = (r.shift, r.shift), (1 - r.zoom, 1 + r.zoom)
        steps.append(v2.RandomAffine(r.rotate, shift, zoom, interpolation=v2.InterpolationMode.BILINEAR))
    if r.flip:
        steps.append(v2.RandomHorizontalFlip())
    if r.auto_augment != "none":
        steps.append({"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment}[r.auto_augment]())
    if r.jitter:
        steps.append(v2.ColorJitter(r.jitter, r.jitter, r.jitter))
    if r.pca_noise:
        steps.append(ColourNoise(r.pca_noise))
    if r.erase:
        steps.append(v2.RandomErasing(r.erase))
    return v2.Compose(steps) if steps else v2.Identity()


class ShiftedCrop(torch.nn.Module):
    """A random crop, of the image's own size, of the image extended by reflection: (C, H, W) to (C, H, W). Equivalent
    to v2.RandomCrop(size, padding=pad, padding_mode="reflect"), in a quarter of the time."""

    def __init__(self, pad: int):
        super().__init__()
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        top, left = (int(torch.randint(2 * self.pad + 1, ())) for _ in range(2))
        extended = F.pad(x, (self.pad,) * 4, mode="reflect")
        return extended[:, top : top + x.shape[1], left : left + x.shape[2]]


class ColourNoise(torch.nn.Module):
    """The paper's section 4.1: adds to every pixel a random multiple of each principal component of ImageNet's colours.
    uint8 (3, H, W) to the same. Eigenvalues and vectors of RGB in 0..1 as published with fb.resnet.torch."""

    VALUES = torch.tensor([0.2175, 0.0188, 0.0045])
    VECTORS = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])

    def __init__(self, deviation: float):
        super().__init__()
        self.deviation = deviation

    def forward(self, x: Tensor) -> Tensor:
        noise = self.VECTORS @ (self.VALUES * torch.randn(3) * self.deviation)
        return (x + 255 * noise[:, None, None]).round().clamp(0, 255).to(torch.uint8)
