"""The one reader of pictures: any file that Pillow decodes, as 8-bit grey or RGB."""

import contextlib
import functools
import io
import math
import threading
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor

from ..errors import DataError

# Formats that Pillow only names, or that it hands to another program.
NOT_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS"}
LARGEST = 2**24  # pixels that are kept of a picture
LONGEST = 10  # times the short side that is kept of the long one
EXIF_ORIENTATION = 0x0112
TURNS = dict(enumerate(("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE",
                        "ROTATE_90"), 2))  # fmt: skip
_one_large = threading.Lock()  # of several threads, one at a time decodes more than LARGEST pixels
warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters of a picture is an error or one of `changes`


class Picture(NamedTuple):
    """A decoded file: image in one of the modes L, LA, RGB, RGBA, the mode and size (width, height) of the file, and
    what was changed to come from one to the other."""

    image: Image.Image
    mode: str
    size: tuple[int, int]
    changes: list[str]


@functools.cache
def formats() -> list[str]:
    """Pillow's names of the formats that are read."""
    Image.init()
    return [name for name in Image.ID if name not in NOT_DECODED]


@functools.cache
def suffixes() -> frozenset[str]:
    """The suffixes of these formats, as ".png"."""
    known = formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def open_image(path: Path, mode: str, whole: bool = False, edge: int | None = None) -> Tensor:
    """Decodes one picture to uint8 (C, H, W); `mode` is "L" or "RGB". Raises DataError, naming the file, where it is
    missing, a folder, or not a whole image. See `decode` for `whole` and `edge`."""
    image = on_white(decode(path, whole, edge).image)
    pixels = np.array(image if image.mode == mode else image.convert(mode))
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)


def on_white(image: Image.Image) -> Image.Image:
    """An image without its alpha channel, as it looks on white paper."""
    if image.mode not in ("LA", "RGBA"):
        return image
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert(image.mode[:-1])


def decode(source: Path | io.BytesIO, whole: bool = False, edge: int | None = None, name: str = "") -> Picture:
    """The picture in a file, or in bytes that are called `name`, turned as its EXIF says.

    More than 8 bits a channel are scaled to 8 by the range of the format; of several frames the first is taken. Unless
    `whole`, memory is bounded: a side longer than LONGEST times the other is cut to its middle, and a picture of more
    than LARGEST pixels is made smaller by a whole factor. With `edge`, which is the short side that will be needed, a
    JPEG is decoded at a half, a quarter or an eighth of its size, as long as twice that much is left: in half the time
    or less. Raises DataError where the file cannot be decoded.
    """
    if isinstance(source, Path):
        name = str(source)
    try:
        if isinstance(source, Path) and not source.is_file():
            kind = "is a folder" if source.is_dir() else "is not a file" if source.exists() else "does not exist"
            raise DataError(f"{source} {kind}, expected an image file")
        with _open(source) as image:
            large = image.width * image.height > LARGEST
            with _one_large if large else contextlib.nullcontext():
                return _decoded(image, whole, edge)
    except DataError:
        raise
    except Exception as error:  # a damaged file raises almost anything
        why = _beginning(source) if isinstance(error, Image.UnidentifiedImageError) else reason(error)
        raise DataError(f"{name} cannot be read as an image: {why}") from error


def _beginning(source: Path | io.BytesIO) -> str:
    """What a file holds that Pillow does not know, as HEIC, a web page, or nothing."""
    data = (source.read_bytes() if isinstance(source, Path) else source.getvalue())[:24]
    return f"not an image that Pillow decodes; it begins with {data!r}" if data else "not an image; it is empty"


def reason(error: Exception) -> str:
    """Why Pillow cannot decode a file, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _open(source: Path | io.BytesIO) -> Image.Image:
    """Image.open; a JPEG whose metadata stop it is opened without them."""
    try:
        return Image.open(source, formats=formats())
    except (Image.UnidentifiedImageError, Image.DecompressionBombError, OSError):
        raise
    except Exception:
        data = source.read_bytes() if isinstance(source, Path) else source.getvalue()
        if not data.startswith(b"\xff\xd8"):
            raise
        return Image.open(io.BytesIO(_without_metadata(data)), formats=["JPEG"])


def _without_metadata(jpeg: bytes) -> bytes:
    """A JPEG file without its APP1 segments, where EXIF lies."""
    kept, at = bytearray(jpeg[:2]), 2
    while jpeg[at : at + 1] == b"\xff" and jpeg[at + 1 : at + 2] not in (b"\xda", b""):
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if jpeg[at + 1] != 0xE1:
            kept += jpeg[at:end]
        at = end
    return bytes(kept + jpeg[at:])


def _decoded(image: Image.Image, whole: bool, edge: int | None) -> Picture:
    mode, size, changes = image.mode, image.size, []
    if getattr(image, "is_animated", False):
        changes.append("the first of several frames is taken")
    box = None if whole else _middle(image.size)
    kept = (box[2] - box[0], box[3] - box[1]) if box else image.size
    factor = 1 if whole else math.ceil(math.sqrt(kept[0] * kept[1] / LARGEST))
    part = max(factor, min(size) // (2 * edge) if edge else 1)
    if part > 1 and not box:
        image.draft(None, (size[0] // part, size[1] // part))
    image.load()
    result, told = _eight_bits(image.crop(box) if box else image)
    changes += told
    if box:
        changes.append(f"more than {LONGEST} times as long as wide, cut to the middle")
    if factor > 1:
        changes.append(f"made smaller, to at most {LARGEST / 1e6:.1f} million pixels")
        rest = math.ceil(math.sqrt(result.width * result.height / LARGEST))
        result = result.reduce(rest) if rest > 1 else result
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION)
        turn = TURNS.get(orientation or 1)
    except Exception:  # damaged EXIF raises almost anything; the pixels are whole
        turn = None
        changes.append("EXIF cannot be read")
    return Picture(result.transpose(Image.Transpose[turn]) if turn else result, mode, size, changes)


def _middle(size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """The box to which a side that is too long is cut; None where none is."""
    longest = LONGEST * min(size)
    if max(size) <= longest:
        return None
    width, height = (min(edge, longest) for edge in size)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return left, top, left + width, top + height


def _eight_bits(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """The same image in one of the modes L, LA, RGB, RGBA, and what was changed."""
    changes: list[str] = []
    if image.mode[0] in "IF":
        image, changes = _scaled(image)
    if image.has_transparency_data:
        premultiplied = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)
        grey = image.mode in ("1", "L", "LA", "La")
        image = (image.convert(premultiplied) if premultiplied else image).convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            return image.convert("LA") if grey else image, [*changes, "transparency laid on white"]
    if image.mode in ("L", "RGB"):
        return image, changes
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        return converted or image, [*changes, "LAB converted to RGB"]
    if image.mode in ("CMYK", "HSV", "YCbCr"):
        changes.append(f"{image.mode} converted to RGB")
    return image.convert("L" if image.mode == "1" else "RGB"), changes


def _scaled(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """An image of integers or floats as one of bytes."""
    values, transparent, bits = np.asarray(image), image.info.get("transparency"), 16
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not 0 <= low <= high <= 255:  # nor where one is not a number
            raise ValueError(f"it holds floats from {low:g} to {high:g}, expected 0 to 1, or 0 to 255")
        made = Image.fromarray((values * (255 if high <= 1 else 1)).round().astype(np.uint8))
        return made, ["floats of 0 to 1 scaled to 8 bits" if high <= 1 else "floats rounded to 8 bits"]
    if image.mode == "I" and image.format != "PPM":  # of a PPM file, Pillow scales them to 16 bits
        low, high = int(values.min()), int(values.max())
        if not 0 <= low <= high <= 255:
            raise ValueError(f"it holds integers from {low} to {high}, expected 0 to 255, or unsigned ones of 16 bits")
        return Image.fromarray(values.astype(np.uint8)), ["wide integers taken as 8 bits"]
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits = tags.get(258, (16,))[0]
        if tags.get(262) == 0:  # white is zero, which Pillow minds in 8 bits only
            values = 2**bits - 1 - values
    changes = [f"{bits} bits scaled to 8"]
    if 0 < values.max() < 2**bits // 16:
        changes.append(f"nearly black: it uses less than a sixteenth of its {bits} bits")
    made = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    if isinstance(transparent, int):
        made.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return made, changes
