"""What training and testing do to images, uint8 to uint8, and how these become the input of a network.

In training, photographs are cropped one by one to the network's size; everything after that is done to a whole batch.
All random numbers come from torch's default generator, which module.py seeds for each batch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from ..recipe import Recipe


def eval_transform(recipe: Recipe, size: int | None) -> v2.Transform:
    """What testing does to one image: nothing if it has a fixed size, else resizing and cropping the centre."""
    if size is not None:
        return v2.Identity()
    return v2.Compose([v2.Resize(recipe.test_short_side, antialias=True), v2.CenterCrop(recipe.input_size)])


class Views:
    """What a test with several views does to one image: (views, C, H, W), the centre first. 2: the centre and its
    mirror image. 10: also the four corners, as in section 4.1 of the paper; an image of fixed size is first extended by
    a 32nd of its edge, with reflected pixels."""

    def __init__(self, recipe: Recipe, size: int | None):
        self.ten = recipe.views == 10
        if size is None:
            edge = recipe.input_size
            self.first: v2.Transform = v2.Resize(recipe.test_short_side, antialias=True)
        else:
            edge, self.first = size, v2.Pad(max(1, size // 32), padding_mode="reflect")
        self.crops = v2.TenCrop(edge) if self.ten else v2.CenterCrop(edge)

    def __call__(self, x: Tensor) -> Tensor:
        y = self.crops(self.first(x))
        return torch.stack([y[4], *y[:4], *y[5:]]) if self.ten else torch.stack([y, y.flip(-1)])


class Augment:
    """What training does to a batch: images that an index selects, and whether each is mirrored (N,), to
    (N, C, H, W)."""

    def __init__(self, recipe: Recipe, size: int | None):
        r = recipe
        self.crop: v2.Transform | None = None
        if size is None and r.short_side:
            self.crop = v2.Compose([v2.Resize(r.short_side, antialias=True), v2.RandomCrop(r.input_size)])
        elif size is None:
            self.crop = v2.RandomResizedCrop(r.input_size, (r.crop, 1.0), antialias=True)
        self.short_side = r.train_short_side
        self.pad = 0 if size is None else r.pad
        self.flip, self.affine, self.erase = r.flip, (r.rotate, r.shift, r.zoom), r.erase
        colours: list[torch.nn.Module] = []  # of one image each
        if r.auto_augment != "none":
            colours.append({"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment}[r.auto_augment]())
        if r.jitter:
            colours.append(v2.ColorJitter(r.jitter, r.jitter, r.jitter))
        if r.pca_noise:
            colours.append(ColourNoise(r.pca_noise))
        self.colours = v2.Compose(colours) if colours else None

    def reduced(self, picture: Tensor) -> Tensor:
        """A photograph (C, H, W), made smaller where it is larger than any crop needs."""
        large = self.crop is not None and min(picture.shape[1:]) > self.short_side
        return v2.functional.resize(picture, [self.short_side], antialias=True) if large else picture

    def __call__(self, images, mirrored: Tensor) -> Tensor:
        x = images if self.crop is None else torch.stack([self.crop(image) for image in images])
        if self.pad:
            x = shifted_crops(x, self.pad)
        if any(self.affine):
            x = affine(x, *self.affine)
        if self.flip:
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        if self.colours:
            x = torch.stack([self.colours(image) for image in x])
        return erase(x, self.erase) if self.erase else x


def shifted_crops(x: Tensor, pad: int) -> Tensor:
    """Random crops, of the images' own size, of the images (N, C, H, W) extended by `pad` reflected pixels. Equivalent
    to v2.RandomCrop(size, padding=pad, padding_mode="reflect") of each."""
    n, channels, height, width = x.shape
    extended = F.pad(x, (pad,) * 4, mode="reflect")
    top, left = torch.randint(2 * pad + 1, (2, n, 1))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    image, channel = torch.arange(n)[:, None, None, None], torch.arange(channels)[:, None, None]
    return extended[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def affine(x: Tensor, rotate: float, shift: float, zoom: float) -> Tensor:
    """Images (N, C, H, W) turned by up to `rotate` degrees, enlarged or reduced by up to the fraction `zoom` and moved
    by up to the fraction `shift` of their edges; zero outside. Equivalent to v2.RandomAffine, bilinear, of each."""
    n, _, height, width = x.shape
    angle, scale, *move = (2 * torch.rand(4, n) - 1) * torch.tensor([[math.radians(rotate)], [zoom], [shift], [shift]])
    cos, sin, ratio = angle.cos() / (1 + scale), angle.sin() / (1 + scale), height / width
    # Where to read for a pixel, in units of half an edge: the inverse of the map, which moves after it has turned.
    turn = torch.stack([cos, sin * ratio, -sin / ratio, cos], 1).view(n, 2, 2)
    matrix = torch.cat([turn, -2 * turn @ torch.stack(move, 1)[..., None]], 2)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x.float(), grid, align_corners=False).round().to(torch.uint8)


def erase(x: Tensor, probability: float) -> Tensor:
    """Sets a random rectangle of some of the images (N, C, H, W) to zero: of 2 to 33 % of the area and an aspect ratio
    of 0.3 to 3.3, as v2.RandomErasing; Zhong et al., "Random Erasing Data Augmentation", AAAI 2020."""
    n, _, height, width = x.shape
    chosen, area, aspect, y, x0 = torch.rand(5, n, 1)
    area, aspect = (0.02 + 0.31 * area) * height * width, torch.exp((2 * aspect - 1) * math.log(3.3))
    tall = (area * aspect).sqrt().round().clamp(1, height)
    wide = (area / aspect).sqrt().round().clamp(1, width)
    top, left = (y * (height - tall + 1)).floor(), (x0 * (width - wide + 1)).floor()
    rows, columns = torch.arange(height), torch.arange(width)
    inside = ((rows >= top) & (rows < top + tall))[:, None, :, None]
    inside = inside & ((columns >= left) & (columns < left + wide))[:, None, None, :]
    return x.masked_fill(inside & (chosen < probability)[:, :, None, None], 0)


class ColourNoise(torch.nn.Module):
    """The paper's section 4.1: adds to every pixel a random multiple of each principal component of ImageNet's colours.
    uint8 (3, H, W) to the same; grey images stay as they are. Eigenvalues and vectors of RGB in 0..1 as published with
    fb.resnet.torch."""

    VALUES = torch.tensor([0.2175, 0.0188, 0.0045])
    VECTORS = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])

    def __init__(self, deviation: float):
        super().__init__()
        self.deviation = deviation

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1:
            return x
        noise = self.VECTORS @ (self.VALUES * torch.randn(3) * self.deviation)
        return (x + 255 * noise[:, None, None]).round().clamp(0, 255).to(torch.uint8)


class Normalise:
    """uint8 (N, C, H, W) to the network's input: (x / 255 - mean) / std, bilinearly resized to `recipe.input_size`.
    Grey images are repeated for a network of three channels; colours are averaged for one of one."""

    def __init__(self, recipe: Recipe):
        self.mean, self.std = (torch.tensor(v).reshape(1, -1, 1, 1) for v in (recipe.mean, recipe.std))
        self.size, self.channels = recipe.input_size, recipe.channels

    def __call__(self, x: Tensor) -> Tensor:
        y = (x.float() / 255 - self.mean.to(x.device)) / self.std.to(x.device)
        if y.shape[-1] != self.size:
            y = F.interpolate(y, (self.size, self.size), mode="bilinear", antialias=y.shape[-1] > self.size)
        if y.shape[1] > self.channels:
            y = y.mean(1, keepdim=True)
        return y.expand(-1, self.channels, -1, -1).contiguous(memory_format=torch.channels_last)
