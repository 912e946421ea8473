"""What the last hidden layer makes of images: the nearest neighbours of test images, the paper's Figure 4, and a plane
in which similar images lie close together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from .cards import Card, SplitImages, sample, short
from .charts import BLUE, VERMILION, blank
from .maps import last_hidden

TRAINING, TEST = 2000, 500  # images that are looked at


@dataclass
class Hidden:
    """Outputs of the last hidden layer. test, train: (N, units); the places of these images in their splits."""

    test: Tensor
    train: Tensor
    test_places: list[int]
    train_places: list[int]


def hidden(model: nn.Module, test: SplitImages, train: SplitImages) -> Hidden | None:
    """Of at most 500 random test images and 2,000 training images. None for a network without a linear layer."""
    found: list[Tensor] = []
    places: list[list[int]] = []
    for seen, limit in ((test, TEST), (train, TRAINING)):
        places.append(sample(seen.labels, limit))
        batches = [last_hidden(model, seen.batch(part.tolist(), model)) for part in torch.tensor(places[-1]).split(32)]
        if not batches or batches[0] is None:
            return None
        found.append(torch.cat([batch for batch in batches if batch is not None]).nan_to_num(0, 0, 0))
    return Hidden(found[0], found[1], places[0], places[1])


def neighbours(
    features: Hidden, test: SplitImages, train: SplitImages, classes: list[str], rows: int = 5, columns: int = 6
) -> list[list[Card]]:
    """A row for each of the first test images: the image, then the training images whose outputs of the last hidden
    layer have the smallest Euclidean distances from its own."""
    columns = min(columns, len(features.train))
    nearest = torch.cdist(features.test[:rows], features.train).topk(columns, largest=False)
    shown = []
    for i, near in zip(features.test_places, nearest.indices.tolist()):
        label = int(test.labels[i])
        row = [Card(test[i], short(classes[label]))]
        for k in near:
            other = int(train.labels[features.train_places[k]])
            row.append(Card(train[features.train_places[k]], short(classes[other]), "", other == label))
        shown.append(row)
    return shown


def top_five(indices: Sequence[int], seen: SplitImages, classes: list[str], p: Tensor, labels: Tensor) -> list[Card]:
    """Test images with their true class and the probabilities of the five most probable classes."""
    cards = []
    for i in indices:
        shares, order = p[i].topk(min(5, len(classes)))
        label = int(labels[i])
        bars = [(short(classes[k], 18), share, k == label) for k, share in zip(order.tolist(), shares.tolist())]
        cards.append(Card(seen[i], short(classes[label], 18), "", int(order[0]) == label, bars))
    return cards


def figure4(top: Sequence[Card], rows: Sequence[Sequence[Card]], title: str) -> Figure:
    """The paper's Figure 4. Left: `top_five`, the bar of the true class in another colour. Right: `neighbours`."""
    edge, gap, across, bar = 1.25, 0.12, 4, 0.19
    deep = edge + 0.25 + 5 * bar + 0.25  # of a test image, its class and its bars
    left = across * (edge + gap) + gap
    small, columns = 0.86, max((len(row) for row in rows), default=0)
    width = left + 0.35 + columns * (small + 0.06) + 0.15
    height = 0.75 + max(-(-len(top) // across) * deep, len(rows) * (small + 0.25))
    figure = blank(width, height, layout=False, dpi=110)
    axis = figure.add_axes((0, 0, 1, 1))  # in inches
    axis.set(xlim=(0, width), ylim=(0, height))
    axis.set_axis_off()
    for n, card in enumerate(top):
        x, y = gap + n % across * (edge + gap), height - 0.75 - n // across * deep - edge
        _picture(axis, card, x, y, edge)
        axis.text(x + edge / 2, y - 0.06, card.title, ha="center", va="top", size=9, weight="bold")
        for k, (name, share, right) in enumerate(card.bars):
            low = y - 0.25 - (k + 1) * bar
            colour = BLUE if right else VERMILION
            axis.bar(x, bar - 0.03, edge * share, low, align="edge", color=colour, alpha=0.45, linewidth=0)
            axis.text(x + 0.03, low + bar / 2 - 0.015, name, va="center", size=7.5)
    for n, row in enumerate(rows):
        for k, card in enumerate(row):
            x = left + 0.2 + k * (small + 0.06) + (0.15 if k else 0)
            y = height - 0.75 - n * (small + 0.25) - small
            _picture(axis, card, x, y, small)
            colour = {True: BLUE, False: VERMILION, None: "black"}[card.right]
            axis.text(x + small / 2, y - 0.03, card.title, ha="center", va="top", size=7, color=colour)
    axis.text(width / 2, height - 0.08, title, ha="center", va="top", size=11)
    axis.text(gap, height - 0.42, "five most probable classes (blue: the true one)", va="top", size=9)
    axis.text(left + 0.2, height - 0.42, "a test image, then the nearest training images", va="top", size=9)
    return figure


def embedding(features: Hidden, labels: Tensor, classes: list[str], title: str) -> Figure | None:
    """The test images in the plane of the two largest principal components, and by t-SNE, coloured by class. None for
    fewer than ten images."""
    x, own = features.test.numpy(), labels[features.test_places]
    if len(x) < 10 or x.shape[1] < 2 or not x.std():
        return None
    pca = PCA(2, random_state=0).fit(x)
    close = TSNE(perplexity=min(30, len(x) / 4), init="pca", random_state=0).fit_transform(x)
    kept = pca.explained_variance_ratio_.sum()
    planes = {f"PCA: {100 * kept:.0f} % of the variance": pca.transform(x), "t-SNE: close images stay close": close}
    names = own.unique().tolist()
    few = len(names) <= 20
    figure = blank(10, 5 if few else 4.6)
    for axis, (name, plane) in zip(figure.subplots(1, 2), planes.items()):
        for n, k in enumerate(names):
            points = plane[(own == k).numpy()]
            axis.scatter(*points.T, s=14, alpha=0.8, linewidths=0, **_look(n, len(names)))
        axis.set(title=name, xticks=[], yticks=[])
    if few:
        handles = [Line2D([], [], linestyle="", markersize=5, **_look(n, len(names))) for n in range(len(names))]
        texts = [short(classes[k], 18) for k in names]
        figure.legend(handles, texts, loc="outside lower center", ncols=min(6, len(names)), fontsize=8)
    figure.suptitle(f"{title}: test images by the outputs of the last hidden layer")
    return figure


def _look(n: int, of: int) -> dict[str, Any]:
    """Colour and marker of class n: ten colours with two markers, or for more classes a scale of colours."""
    if of > 20:
        return {"color": matplotlib.colormaps["turbo"](n / of), "marker": "o"}
    return {"color": matplotlib.colormaps["tab10"](n % 10), "marker": "o^"[n // 10]}


def _picture(axis: Axes, card: Card, x: float, y: float, edge: float) -> None:
    """A card's pixels, whole, in a square with the lower left corner (x, y)."""
    high, wide = (edge * n / max(card.pixels.shape[1:]) for n in card.pixels.shape[1:])
    x, y = x + (edge - wide) / 2, y + (edge - high) / 2
    axis.imshow(to_pil_image(card.pixels), cmap="gray", vmin=0, vmax=255, extent=(x, x + wide, y, y + high))
