"""The reader of pictures: whatever Pillow opens comes out as 8 bits on white, or is refused by name."""

import io
import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from alexnet_cuda.data import picture
from alexnet_cuda.data.imageset import read_glyph
from alexnet_cuda.data.picture import decode, open_image, suffixes
from alexnet_cuda.data.verify import examine
from alexnet_cuda.errors import DataError

GREY = np.random.default_rng(0).integers(0, 256, (12, 16)).astype(np.uint8)


def lab():
    srgb, profile = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(Image.fromarray(GREY).convert("RGB"), srgb, profile, outputMode="LAB")


def twelve_bits(path):
    values = GREY.astype(int) * 4095 // 255
    pairs = zip(values.flatten()[0::2].tolist(), values.flatten()[1::2].tolist(), strict=True)
    tiff(path, b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs), 12, 1)


def white_is_zero(path):
    tiff(path, (65535 - WIDE).astype("<u2").tobytes(), 16, 0)


def tiff(path, data, bits, white):
    """A TIFF file of 12x16 pixels of a kind that Pillow does not write; white: 0, if zero is white."""
    tags = [(256, 16), (257, 12), (258, bits), (259, 1), (262, white), (273, 8), (277, 1), (278, 12), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", 9) + entries + bytes(4))


def ten_bits(path):
    path.write_bytes(b"P5 16 12 1023\n" + (GREY.astype(int) * 1023 // 255).astype(">u2").tobytes())


def saved(image, **options):
    return lambda path: image.save(path, **options)


WIDE = GREY.astype(np.uint16) * 257


@pytest.mark.parametrize(
    ("name", "write", "tolerance"),
    [
        ("16.png", saved(Image.fromarray(WIDE)), 0),
        ("16.tif", saved(Image.fromarray(WIDE)), 0),
        ("big-endian.tif", saved(Image.fromarray(WIDE.astype(">u2"))), 0),
        ("12.tif", twelve_bits, 0),
        ("white-is-zero.tif", white_is_zero, 0),
        ("10.pgm", ten_bits, 1),
        ("16.jp2", saved(Image.fromarray(WIDE)), 0),
        ("float.tif", saved(Image.fromarray((GREY / 255).astype(np.float32))), 0),
        ("float255.tif", saved(Image.fromarray(GREY.astype(np.float32))), 0),
        ("lab.tif", saved(lab()), 2),
        ("cmyk.tif", saved(Image.fromarray(GREY).convert("RGB").convert("CMYK")), 0),
        ("opaque.png", saved(Image.fromarray(GREY).convert("RGBA")), 0),
        ("palette.gif", saved(Image.fromarray(GREY)), 0),
        ("grey.tga", saved(Image.fromarray(GREY)), 0),
    ],
)
def test_every_mode_and_depth_gives_the_same_pixels(tmp_path, name, write, tolerance):
    write(tmp_path / name)
    x = open_image(tmp_path / name, "RGB")
    assert x.shape == (3, 12, 16)
    assert (x.int() - torch.from_numpy(GREY).int()).abs().max() <= tolerance
    assert f".{name.rpartition('.')[2]}" in suffixes()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (GREY.astype(np.float32) * 10, "floats from 0 to 2550"),
        (GREY.astype(np.float32) - 300, "floats from -300 to"),
        (np.where(GREY == 7, np.nan, 0.5).astype(np.float32), "floats from nan"),
        (GREY.astype(np.int32) * 70000, "integers from 0 to"),
    ],
)
def test_a_range_that_is_not_known_is_refused(tmp_path, values, message):
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=rf"x\.tif cannot be read as an image: it holds {message}"):
        open_image(tmp_path / "x.tif", "L")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an image; it is empty"),
        (b"\0\0\0\x18ftypheic\0\0", r"not an image that Pillow decodes; it begins with .*ftypheic"),
        (b"<html>404</html>", r"it begins with b'<html>404"),
    ],
)
def test_what_is_no_image_is_shown(tmp_path, data, message):
    (tmp_path / "x.jpg").write_bytes(data)
    for source in (tmp_path / "x.jpg", io.BytesIO(data)):
        with pytest.raises(DataError, match=message):
            decode(source)


def test_what_cannot_be_a_picture_is_one_sentence(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in (("pipe.png", "is not a file"), ("x" * 300, "name too long"), ("none.png", "does not exist")):
        with pytest.raises(DataError, match=message):
            decode(tmp_path / name)


def test_a_picture_that_shows_nothing_is_told(tmp_path):
    image = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (2, 2, 6, 6))  # white ink
    image.save(tmp_path / "x.png")
    assert examine(tmp_path / "x.png").changes == ["transparency laid on white", "one colour all over"]


def test_sixteen_bits_that_hold_eight_are_told(tmp_path):
    Image.fromarray(GREY.astype(np.uint16)).save(tmp_path / "x.png")
    assert any("nearly black" in change for change in decode(tmp_path / "x.png").changes)


def transparent(kind, path):
    """A picture whose pixel (0, 0) is transparent, the others opaque."""
    alpha = np.full(GREY.shape, 255, np.uint8)
    alpha[0, 0] = 0
    if kind in ("LA", "RGBA"):
        image = Image.fromarray(GREY).convert(kind[:-1])
        image.putalpha(Image.fromarray(alpha))
        image.save(path)
    else:
        values = {"L": GREY.copy(), "I;16": WIDE.copy()}[kind.removesuffix(" as P")]
        values[values == values[0, 0]] += 1
        values[0, 0] = GREY[0, 0]
        image = Image.fromarray(values)
        (image.convert("P") if kind.endswith("P") else image).save(path, transparency=int(values[0, 0]))


@pytest.mark.parametrize("kind", ["LA", "RGBA", "L", "L as P", "I;16"])
def test_transparency_lies_on_white(tmp_path, kind):
    transparent(kind, tmp_path / "x.png")
    x = open_image(tmp_path / "x.png", "L")[0]
    assert x[0, 0] == 255
    assert (x.int() - torch.from_numpy(GREY).int()).abs()[1:].max() <= 1


@pytest.mark.parametrize("ink", [0, 255, 120])
def test_ink_on_a_transparent_ground_is_the_glyph(tmp_path, ink):
    glyph = np.zeros((8, 8), np.uint8)
    glyph[2:6, 3:5] = 255
    image = Image.new("RGB", (8, 8), (ink, ink, ink))
    image.putalpha(Image.fromarray(glyph))
    image.save(tmp_path / "x.png")
    assert torch.equal(read_glyph(tmp_path / "x.png", 8)[0], torch.from_numpy(glyph))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_broken_exif_never_costs_the_picture(kind):
    image, random = Image.fromarray(GREY).convert("RGB"), np.random.default_rng(0)
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010E: "a title", 0x011A: 72.0, 0x0128: 2})
    whole = exif.tobytes()
    for _ in range(150 * (kind != "tiff")):  # whose EXIF is the file itself
        block = bytearray(whole)
        for place in random.integers(6, len(block), 4):
            block[place] = random.integers(256)
        buffer = io.BytesIO()
        image.save(buffer, kind, exif=bytes(block[: random.integers(7, len(block) + 1)]))
        assert sorted(decode(buffer).image.size) == [12, 16]
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=whole)
    assert decode(buffer).image.size == (12, 16)  # turned


def test_any_error_of_the_decoder_names_the_file(tmp_path, monkeypatch):
    Image.fromarray(GREY).save(tmp_path / "x.png")
    for error in (
        struct.error("unpack"),
        AttributeError("tag"),
        ZeroDivisionError(),
        RuntimeError("codec"),
        MemoryError(),
    ):
        monkeypatch.setattr(picture, "_decoded", lambda *arguments, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(DataError, match=r"x\.png cannot be read as an image: \w+"):
            open_image(tmp_path / "x.png", "L")


@pytest.mark.parametrize(
    ("size", "kept"),
    [((60000, 1), (10, 1)), ((3, 5000), (3, 30)), ((5000, 4000), (2500, 2000)), ((400, 40), (400, 40))],
)
def test_memory_is_bounded_whatever_the_shape(tmp_path, size, kept):
    Image.new("L", size, 7).save(tmp_path / "x.png")
    found = decode(tmp_path / "x.png")
    assert found.image.size == kept
    assert bool(found.changes) == (size != kept)
    assert decode(tmp_path / "x.png", whole=True).image.size == size


def test_more_pixels_than_pillow_allows_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90)
    Image.fromarray(GREY).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"x\.png cannot be read as an image: Image size \(192 pixels\)"):
        open_image(tmp_path / "x.png", "L")


def test_a_large_jpeg_is_decoded_at_a_part_of_its_size(tmp_path):
    path = tmp_path / "large.jpg"
    wave = np.sin(np.arange(1600) / 20)
    pixels = 127 + 60 * wave[None, :, None] + 60 * wave[:1200, None, None] * [1, 0.5, -1]
    Image.fromarray(pixels.round().astype(np.uint8)).save(path, quality=95)
    whole, part = open_image(path, "RGB"), open_image(path, "RGB", edge=150)
    assert (whole.shape, part.shape) == ((3, 1200, 1600), (3, 300, 400))
    means = torch.nn.functional.avg_pool2d(whole.float(), 4)
    assert (part - means).abs().mean() < 1
    assert open_image(path, "RGB", edge=301).shape == whole.shape
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(DataError, match=r"large\.jpg cannot be read as an image"):
        open_image(path, "RGB", edge=150)
