"""The drawing of every variant: its numbers, its legibility, and that the committed ones are of today."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyBboxPatch
from PIL import Image
from training_helpers import cli, legible_texts

from alexnet_cuda import AlexNet
from alexnet_cuda.reports.drawing import THEMES, architecture, draw
from alexnet_cuda.summary import model_summary
from alexnet_cuda.variants import VARIANTS

DOCS = Path(__file__).parents[1] / "docs"
TIMES = "\N{MULTIPLICATION SIGN}"


def network(name, classes=None):
    with torch.device("meta"):
        return AlexNet(name, classes)


def cells(path):
    """The texts of an SVG file by their id."""
    groups = ET.parse(path).getroot().iter("{http://www.w3.org/2000/svg}g")
    found = {g.get("id"): g.findall("{http://www.w3.org/2000/svg}text") for g in groups}
    return {key: "".join(t.itertext()) for key, text in found.items() for t in text}


@pytest.mark.parametrize(("name", "classes"), [*((name, None) for name in VARIANTS), ("paper", 21_841), ("cifar", 1)])
def test_no_two_texts_overlap_and_all_lie_on_the_paper(name, classes):
    legible_texts(architecture(network(name, classes)))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_numbers_are_those_of_the_summary(name, tmp_path):
    draw(name, tmp_path / "net.svg", 123)
    found, rows = cells(tmp_path / "net.svg"), model_summary(network(name, 123))
    parameters, macs = sum(row.parameters for row in rows), sum(row.macs for row in rows)
    assert f"{parameters:,} parameters, {macs / 1e6:,.1f} M multiply-accumulates" in found["totals"]
    assert found["description"] == VARIANTS[name].description
    layers = [row for row in rows if row.type in ("Conv2d", "Linear")]
    for i, row in enumerate(layers):
        column = f"{'conv' if row.type == 'Conv2d' else 'fc'}{i + 1}"
        size = (*row.output_size[1:], row.output_size[0])
        assert found[f"{column} output"] == TIMES.join(f"{n:,}" for n in size)
        assert found[f"{column} macs"] == (f"{row.macs / 1e6:,.1f} M" if row.macs >= 1e5 else f"{row.macs:,}")
    counts = [int(text.replace(",", "")) for key, text in found.items() if key.endswith(" parameters")]
    assert sum(counts) == parameters
    pools = [row.output_size[-1] for row in rows if row.type == "MaxPool2d"]
    assert [int(found[key].split(TIMES)[0]) for key in found if re.fullmatch(r"pool\d output", key)] == pools


@pytest.mark.parametrize("name", ["paper", "flowers_bn"])
@pytest.mark.parametrize("theme", THEMES)
def test_text_has_contrast(name, theme):
    figure = architecture(network(name), theme)
    texts = legible_texts(figure)
    patches = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]
    chips = [(patch.get_facecolor(), patch.get_window_extent()) for patch in patches]
    assert len(chips) > 10
    for text in texts:
        box = text.get_window_extent()
        under = [colour for colour, chip in chips if chip.overlaps(box)]
        assert contrast(text.get_color(), *(under or [figure.get_facecolor()])) >= 4.5, text.get_text()


def contrast(one, two):
    """WCAG 2.2's contrast ratio."""
    low, high = sorted(luminance(to_rgb(colour)) for colour in (one, two))
    return (high + 0.05) / (low + 0.05)


def luminance(rgb):
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_two_columns_say_which_layers_see_both(tmp_path):
    draw("paper", tmp_path / "paper.svg")
    found = cells(tmp_path / "paper.svg")
    sees = {key.split()[0]: text for key, text in found.items() if key.endswith(" sees")}
    both, own = "both GPUs", "its GPU"
    assert sees == {"conv1": "the image", "conv2": own, "conv3": both, "conv4": own, "conv5": own,
                    "fc6": both, "fc7": both, "fc8": both}  # fmt: skip
    svg = (tmp_path / "paper.svg").read_text()
    assert svg.count(f">27{TIMES}27{TIMES}128</text>") == 2
    draw("ungrouped", tmp_path / "ungrouped.svg")
    assert "both GPUs" not in (tmp_path / "ungrouped.svg").read_text()


def test_marks_stand_in_the_order_of_the_layers(tmp_path):
    draw("original2012", tmp_path / "net.svg")
    svg = (tmp_path / "net.svg").read_text()
    labels = [f"LRN 5{TIMES}5 in plane", "LRN 5, per column", "dropout 0.5"]
    assert [svg.count(f">{label}</text>") for label in labels] == [1, 2, 2]
    draw("flowers_bn", tmp_path / "net.svg")
    assert (tmp_path / "net.svg").read_text().count(">BatchNorm</text>") == 7


COMMITTED = {name: (name, "light", True) for name in VARIANTS}
COMMITTED |= {"paper-figure": ("paper", "light", False), "paper-figure-dark": ("paper", "dark", False)}


@pytest.mark.parametrize("file", COMMITTED)
def test_the_committed_drawings_are_of_today(file, tmp_path):
    name, theme, table = COMMITTED[file]
    draw(name, tmp_path / "net.svg", theme=theme, table=table)
    old, new = (path.read_text() for path in (DOCS / "architecture" / f"{file}.svg", tmp_path / "net.svg"))
    assert re.findall(r"<text[^>]*>([^<]*)", old) == re.findall(r"<text[^>]*>([^<]*)", new)
    if f"Matplotlib v{matplotlib.__version__}," in old:  # others may round otherwise
        assert old == new, f"out of date: alexnet-cuda draw {name} --output docs/architecture/{file}.svg"


def test_the_command_writes_svg_and_png_in_both_themes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "Drawing: cifar.svg" in cli("draw", "cifar")
    assert cells("cifar.svg")["fc7 layer"] == "10 units"
    cli("draw", "cifar", "--theme", "dark", "--classes", 2, "--output", "new/dark.PNG")
    with Image.open("new/dark.PNG") as picture:
        assert picture.format == "PNG"
        assert picture.width > 2000
        assert max(picture.convert("RGB").getpixel((3, 3))) < 60
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar.svg", "new"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    message = cli("draw", "cifar", "--output", tmp_path / "file" / "net.svg", code=1)
    assert f"error: {tmp_path / 'file'}: File exists" in message


def test_a_path_is_printed_as_it_is(tmp_path):
    assert f"Drawing: {tmp_path}/cifar[bold].svg" in cli("draw", "cifar", "--output", tmp_path / "cifar[bold].svg")
