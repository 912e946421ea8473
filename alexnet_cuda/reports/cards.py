"""Pictures with captions (`Card`): test images, filters, feature maps; and figures that show them in rows."""

import functools
import io
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from ..data import ImageSet
from ..data.augmentation import Normalise, eval_transform
from ..recipe import Recipe
from ..words import percent
from .charts import BLUE, VERMILION, blank
from .maps import (
    convolutions,
    feature_maps,
    first_filters,
    grad_cam,
    occlusion,
    outputs,
    preferred_images,
    strongest_filters,
)


@dataclass
class Card:
    """Pixels, uint8 (C, H, W), with a caption in the colour of a right or a wrong prediction, or of neither. bars: name
    and probability of classes, and whether each is the true one. about: names that the caption cuts, whole."""

    pixels: Tensor
    title: str = ""
    text: str = ""
    right: bool | None = None
    bars: Sequence[tuple[str, float, bool]] = ()
    about: str = ""

    @functools.cached_property
    def uri(self) -> str:
        """The picture as a data URI: WebP of at most 224 pixels a side, lossless up to 64."""
        image, buffer = to_pil_image(self.pixels), io.BytesIO()
        image.thumbnail((224, 224))
        image.save(buffer, "webp", lossless=max(image.size) <= 64, quality=80, method=4)
        return "data:image/webp;base64," + b64encode(buffer.getvalue()).decode()


class SplitImages:
    """The images of a split as the network sees them: uint8 (C, H, W), the last 128 of them kept; and as batches."""

    def __init__(self, images: ImageSet, recipe: Recipe, split: str = "test"):
        transform, own = eval_transform(recipe, images.size), getattr(images, split)
        self.labels = own.labels
        self.pixels = functools.lru_cache(128)(lambda index: transform(own.images[index]))
        self.normalise = Normalise(recipe)

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels(int(index))

    def batch(self, indices: Iterable[int], model: nn.Module) -> Tensor:
        """Normalised images (N, C, H, W), on the device and in the dtype of the network."""
        return self.normalise(torch.stack([self[i] for i in indices])).to(next(model.parameters()))


def gallery(cards: Sequence[Card], title: str, columns: int = 10, edge: float = 1.3) -> Figure:
    """Cards in rows of `columns`, each `edge` inches wide, under their captions."""
    return sheet({n: cards[n : n + columns] for n in range(0, len(cards), columns)}, title, edge)


def sheet(rows: Mapping[Any, Sequence[Card]], title: str, edge: float, names: bool = False) -> Figure:
    """Rows of cards, each `edge` inches wide, below their captions or, with `names`, each row beside its key."""
    lines = 0 if names else max(bool(c.title) + bool(c.text) for row in rows.values() for c in row)
    longest = max(max(len(c.title), len(c.text)) for row in rows.values() for c in row)
    size = min(7.5, 120 * edge / max(longest, 1))  # no caption is wider than its picture
    gap, left, above = 0.06, 1.0 if names else 0.0, 0.17 * lines
    step, top = edge + above + gap, 0.35
    width = left + gap + max(map(len, rows.values())) * (edge + gap)
    height = top + len(rows) * step
    figure = blank(width, height, layout=False, dpi=110)
    axis = figure.add_axes((0, 0, 1, 1))  # in inches; one for all cards, which draws ten times as fast as one each
    for number, (name, cards) in enumerate(rows.items()):
        y = height - top - number * step - above
        if names:
            axis.text(left - 0.05, y - edge / 2, name, ha="right", va="center", size=9)
        for column, card in enumerate(cards):
            x = left + gap + column * (edge + gap)
            axis.imshow(to_pil_image(card.pixels), cmap="gray", vmin=0, vmax=255, extent=(x, x + edge, y - edge, y))
            if not names:
                colour = {True: BLUE, False: VERMILION, None: matplotlib.rcParams["text.color"]}[card.right]
                caption = "\n".join(filter(None, (card.title, card.text)))
                axis.text(x + edge / 2, y + 0.03, caption, ha="center", va="bottom", size=size, color=colour)
    axis.text(width / 2, height - 0.08, title, ha="center", va="top", size=11)
    axis.set_axis_off()
    axis.set(xlim=(0, width), ylim=(0, height))
    return figure


def predicted(index: int, seen: SplitImages, classes: list[str], p: Tensor, labels: Tensor) -> Card:
    """A test image with its predicted class and, after a mistake, the true class."""
    guess, label = int(p[index].argmax()), int(labels[index])
    shares = percent(float(p[index, guess]), 0), percent(float(p[index, label]), 0)
    whole = f"{classes[guess]}, {shares[0]}"
    if guess == label:
        return Card(seen[index], f"✓ {short(classes[guess])}, {shares[0]}", "", True, about=f"{whole}, right")
    true, about = f"true: {short(classes[label])}, {shares[1]}", f"{whole}; true: {classes[label]}, {shares[1]}"
    return Card(seen[index], f"✗ {short(classes[guess])}, {shares[0]}", true, False, about=about)


def worst(p: Tensor, labels: Tensor, count: int) -> list[int]:
    """Indices of the wrong predictions with the smallest probabilities of the true class, the smallest first."""
    wrong = (p.argmax(1) != labels).nonzero().flatten()
    return wrong[p[wrong, labels[wrong]].argsort()][:count].tolist()


def surest(p: Tensor, labels: Tensor, count: int) -> list[int]:
    """Indices of the right predictions, one class after the other in turn, the most confident of each first."""
    right = (p.argmax(1) == labels).nonzero().flatten()
    return _turns(right[p[right, labels[right]].argsort(descending=True)], labels)[:count]


def sample(labels: Tensor, count: int) -> list[int]:
    """Random indices from a fixed seed, one class after the other in turn."""
    return _turns(torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)), labels)[:count]


def filters(model: nn.Module, grey: bool) -> list[Card]:
    """Every filter of the first layer, scaled to its own range; in colour if it has three channels."""
    x = first_filters(model, grey)
    x = x if x.shape[1] == 3 else x.mean(1, keepdim=True)
    return [Card(stretch(f)) for f in x]


def maps(model: nn.Module, index: int, seen: SplitImages, columns: int = 12, limit: int = 12) -> dict[str, list[Card]]:
    """A test image, then the channels with the largest outputs of each convolution and pooling layer, by layer. A deep
    network is represented by `limit` layers, evenly spaced."""
    rows = {f"input\n{_shape(seen[index])}": [Card(seen[index], "input")]}
    found = feature_maps(model, seen.batch([index], model))
    names = [name for name, y in found.items() if name.startswith(("conv", "pool")) and y[0].numel() > 1]
    for place in torch.linspace(0, len(names) - 1, min(limit, len(names))).round().int().tolist():
        name, y = names[place], found[names[place]]
        order = y.flatten(1).amax(1).nan_to_num().argsort(descending=True)[:columns].tolist()
        rows[f"{name}\n{_shape(y)}"] = [Card(coloured(stretch(y[k])), f"channel {k}") for k in order]
    return rows


def attention(
    model: nn.Module, indices: list[int], seen: SplitImages, classes: list[str], p: Tensor, labels: Tensor
) -> list[Card]:
    """Three cards for each test image: the image, Grad-CAM of the predicted class, and Grad-CAM of the true class or,
    where that was predicted, of the second most probable."""
    x, top = seen.batch(indices, model), p[indices].topk(2, dim=1).indices
    true = labels[indices]
    other = torch.where(top[:, 0] == true, top[:, 1], true)
    first, second = (grad_cam(model, x, c).cpu().nan_to_num() for c in (top[:, 0], other))
    cards = []
    for n, i in enumerate(indices):
        card, c = predicted(i, seen, classes, p, labels), int(other[n])
        cards.append(Card(seen[i], f"true: {short(classes[labels[i]])}"))
        notes = ["" if heat.any() else "nothing raises this class" for heat in (first[n], second[n])]
        cards.append(Card(overlay(seen[i], first[n]), card.title, notes[0], card.right))
        name = f"for {short(classes[c])}, {percent(float(p[i, c]), 0)}"
        cards.append(Card(overlay(seen[i], second[n]), name, notes[1]))
    return cards


def occluded(
    model: nn.Module, indices: list[int], seen: SplitImages, classes: list[str], p: Tensor, labels: Tensor
) -> list[Card]:
    """Two cards for each test image: the image, and where covering it costs probability of the predicted class."""
    lost = occlusion(model, seen.batch(indices, model), p[indices].argmax(1)).nan_to_num(0, 0, 0)
    cards = []
    for i, heat in zip(indices, lost):
        card, most = predicted(i, seen, classes, p, labels), float(heat.max())
        note = f"at most {percent(most, 0)} lost" if most >= 0.005 else "no place matters alone"
        cards += [card, Card(overlay(seen[i], heat.clamp(min=0) / max(most, 0.05)), "", note)]
    return cards


def preferred(model: nn.Module, indices: list[int], seen: SplitImages, count: int = 6) -> dict[str, list[Card]]:
    """For the middle and the last convolution: images made to raise its channels with the largest outputs for some test
    images."""
    x, names = seen.batch(indices, model), list(convolutions(model))
    rows: dict[str, list[Card]] = {}
    found = outputs(model, x, convolutions(model))
    for name in dict.fromkeys((names[len(names) // 2], names[-1])):
        order = found[name].amax((2, 3)).mean(0).nan_to_num().argsort(descending=True)[:count].tolist()
        made = preferred_images(model, name, order, x.shape[1:])
        rows[name] = [Card(stretch(x), f"channel {k}") for x, k in zip(made, order)]
    return rows


def responses(
    model: nn.Module, indices: list[int], seen: SplitImages, tiles: list[Card], count: int = 6
) -> list[list[Card]]:
    """A row for each test image: the image, then the first layer's filters (`tiles`) with the largest responses."""
    order, _ = strongest_filters(model, seen.batch(indices, model), count)
    return [
        [Card(seen[i], "image"), *(Card(tiles[k].pixels, f"#{k}") for k in row)]
        for i, row in zip(indices, order.tolist(), strict=True)
    ]


def stretch(x: Tensor) -> Tensor:
    """Scales values (C, H, W) or (H, W) linearly to 0..255, uint8 (C, H, W); values that are not finite count as 0."""
    x = x.nan_to_num(0, 0, 0)
    x = (x - x.min()) / (x.max() - x.min()).clamp(min=1e-12)
    return (x if x.dim() == 3 else x[None]).mul(255).round().to(torch.uint8)


def coloured(x: Tensor, name: str = "viridis") -> Tensor:
    """Applies one of matplotlib's colour maps: uint8 (1, H, W) to (3, H, W)."""
    return torch.from_numpy(matplotlib.colormaps[name](x[0].numpy(), bytes=True)[..., :3]).permute(2, 0, 1)


def overlay(pixels: Tensor, heat: Tensor) -> Tensor:
    """A heat map (H, W) in 0..1, of any size, over a grey version of an image: uint8 (3, H, W)."""
    grey = pixels.float().mean(0, keepdim=True)
    heat = F.interpolate(heat[None, None], pixels.shape[1:], mode="bilinear", antialias=True)[0].clamp(0, 1)
    colour = coloured(heat.mul(255).round().to(torch.uint8), "inferno").float()
    share = 0.25 + 0.4 * heat
    return (grey * (1 - share) + colour * share).round().to(torch.uint8)


def short(name: str, limit: int = 13) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _turns(indices: Tensor, labels: Tensor) -> list[int]:
    """The indices reordered: the first of every class, then the second of every class, and so on."""
    seen, turns = Counter[int](), []
    for index, label in zip(indices.tolist(), labels[indices].tolist()):
        turns.append((seen[label], label, index))
        seen[label] += 1
    return [index for _, _, index in sorted(turns)]


def _shape(x: Tensor) -> str:
    return "\N{MULTIPLICATION SIGN}".join(map(str, x.shape))
