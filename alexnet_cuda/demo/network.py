"""A trained network for the page: its prediction for a picture or a drawing, with explanations."""

import functools
import io
import tempfile
import threading
from base64 import b64decode
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from ..classify import best_device, read_pixels
from ..data.augmentation import Normalise
from ..data.picture import formats, on_white
from ..errors import AlexNetError, DataError
from ..files import read_metrics
from ..recipe import Recipe
from ..reports import cards, maps
from ..weights import load_weights
from ..words import percent

MAX_PIXELS = 64_000_000
MAX_DRAWING = 2**20  # characters of the data URL, and pixels
EDGE = 320  # to which small images are enlarged, in pixels
# Free margin around the glyph, as in the data set, as a share of the edge.
MARGINS = {"digits": 0.02, "mnist": 4 / 28, "fashion-mnist": 0.02}


@dataclass
class Network:
    """The network of a run folder."""

    folder: Path
    model: nn.Module
    recipe: Recipe
    classes: list[str]

    @property
    def takes_drawings(self) -> bool:
        """Whether its images show one glyph, which a person can draw."""
        return self.recipe.data in MARGINS

    @property
    def title(self) -> str:
        """One line of Markdown."""
        title = f"**{self.recipe.variant}** trained on **{self.recipe.name}**, {len(self.classes)} classes"
        try:
            accuracy = read_metrics(self.folder)["test/accuracy"]
        except (OSError, AlexNetError, KeyError):
            return title
        return f"{title}, test accuracy {percent(accuracy)}"


class Answer(NamedTuple):
    """A prediction: the probabilities of the five most probable classes, and pictures that explain it.

    seen: the picture after preprocessing. attention: Grad-CAM of the first class. filters: the filters of the first
    layer with the largest responses.
    """

    top: dict[str, float]
    seen: Image.Image
    attention: Image.Image
    filters: Image.Image


@functools.lru_cache(maxsize=2)
def load(folder: Path) -> Network:
    """The network of a run folder. Raises DataError if there is none."""
    model, recipe, classes = load_weights(folder)
    return Network(folder, model.to(best_device()).eval(), recipe, classes)


_hooks_lock = threading.Lock()  # `maps` adds hooks to the network


def predict(network: Network, path: Path) -> Answer:
    """The network's prediction for a picture file, with the preprocessing of `classify`. Raises
    DataError if the file is not an image or has more than 64 million pixels."""
    _check_size(path)
    pixels = read_pixels(network.recipe, path)
    x = Normalise(network.recipe)(pixels[None]).to(best_device())
    with _hooks_lock:
        with torch.no_grad():
            p = network.model(x).float().softmax(1).cpu()
        shares, labels = p[0].topk(min(5, p.shape[1]))
        heat = maps.grad_cam(network.model, x, labels[:1])[0].cpu()
        order, _ = maps.strongest_filters(network.model, x)
        tiles = cards.filters(network.model, grey=pixels.shape[0] == 1)
    factor = max(1, EDGE // max(pixels.shape[1:]))
    large = F.interpolate(pixels[None].float(), scale_factor=factor, mode="nearest")[0].to(torch.uint8)
    top = {network.classes[k]: share for k, share in zip(labels.tolist(), shares.tolist())}
    strip = _strip([tiles[k].pixels for k in order[0].tolist()])
    return Answer(top, to_pil_image(large), to_pil_image(cards.overlay(large, heat)), strip)


def predict_drawing(network: Network, url: str) -> Answer:
    """The network's prediction for a drawing, dark on white, in a data URL. Raises DataError if nothing is drawn."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "drawing.png"
        _framed(_decoded(url), MARGINS[network.recipe.data]).save(path)
        return predict(network, path)


def _framed(drawing: Image.Image, margin: float) -> Image.Image:
    """A grey drawing, dark on white, as the data sets show their glyphs: bright on black, centred, with a margin."""
    ink = ImageOps.invert(drawing)
    box = ink.point(lambda value: 255 * (value > 32)).getbbox()
    if box is None:
        raise DataError("Nothing is drawn yet.")
    glyph = ink.crop(box)
    edge = round(max(glyph.size) / (1 - 2 * margin))
    frame = Image.new("L", (edge, edge))
    frame.paste(glyph, ((edge - glyph.width) // 2, (edge - glyph.height) // 2))
    return frame


def _decoded(url: str) -> Image.Image:
    """The image in a data URL. A client may send anything, so only PNG of limited size is decoded."""
    start, _, data = url.partition(",")
    try:
        if start != "data:image/png;base64" or len(data) > MAX_DRAWING:
            raise ValueError
        with Image.open(io.BytesIO(b64decode(data, validate=True)), formats=["PNG"]) as image:
            if image.width * image.height > MAX_DRAWING:
                raise ValueError
            return on_white(image.convert("RGBA")).convert("L")
    except Exception as error:  # a damaged file raises almost anything
        raise DataError("The drawing is incomplete; draw it again.") from error


def _check_size(path: Path) -> None:
    try:
        with Image.open(path, formats=formats()) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise DataError(f"{path.name} has too many pixels; the limit is {MAX_PIXELS / 1e6:.0f} million") from error
    except Exception as error:  # a damaged file raises almost anything
        raise DataError(f"{path.name} is not an image") from error
    if width * height > MAX_PIXELS:
        raise DataError(f"{path.name} has {width}x{height} pixels; the limit is {MAX_PIXELS / 1e6:.0f} million")


def _strip(tiles: list[Tensor], edge: int = 80, gap: int = 8) -> Image.Image:
    strip = Image.new("RGBA", (len(tiles) * (edge + gap) - gap, edge))
    for k, tile in enumerate(tiles):
        strip.paste(to_pil_image(tile).resize((edge, edge), Image.Resampling.NEAREST), (k * (edge + gap), 0))
    return strip
