"""A page on this machine alone: drop or draw a picture, see what a run's network says of it, and why."""

import functools
import io
import json
import os
import signal
import socket
import tempfile
import threading
from base64 import b64decode
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from .data import DataError, source
from .data.module import Normalise, plain
from .export import GREY
from .reports import cards, maps
from .training.evaluation import best_device, load_weights
from .training.recipe import Recipe

ADDRESS = "127.0.0.1"
MOST_BYTES, MOST_PIXELS = 32 * 2**20, 64_000_000  # of an upload
EDGE = 320  # pixels to which small images are enlarged
MOST_DRAWN = 2**20  # characters
# The share of the edge that the set leaves free on each side of what it shows.
MARGINS = {"digits": 0.02, "mnist": 4 / 28, "fashion-mnist": 0.02}
CSS = """
.message { min-height: 1.6em }
.pixels img { image-rendering: pixelated }
#filters { max-height: 110px }
footer { display: none !important }
"""
# A canvas, whose strokes end as a PNG in the component's value: gradio's own needs WebGL, and a tool to be chosen.
PAPER = """<canvas width=400 height=400 aria-label="paper to draw on"></canvas><button type=button>Clear</button>"""
PAPER_CSS = """
canvas { display: block; width: 100%; max-width: 440px; aspect-ratio: 1; margin: auto; background: white;
         border: 1px solid var(--border-color-primary); border-radius: 6px; touch-action: none; cursor: crosshair }
button { display: block; margin: 10px auto 0; padding: 4px 20px; border-radius: 6px; color: var(--body-text-color);
         border: 1px solid var(--border-color-primary); background: var(--button-secondary-background-fill) }
"""
PAPER_JS = """
const canvas = element.querySelector('canvas'), pen = canvas.getContext('2d');
let drawing = false;
function point(event) {
    const box = canvas.getBoundingClientRect();
    const scale = canvas.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
}
function clear() {
    pen.fillStyle = 'white';
    pen.fillRect(0, 0, canvas.width, canvas.height);
}
function tell() { props.value = canvas.toDataURL('image/png'); trigger('input'); }
canvas.addEventListener('pointerdown', event => {
    canvas.setPointerCapture(event.pointerId);
    drawing = true;
    Object.assign(pen, {lineWidth: 34, lineCap: 'round', lineJoin: 'round'});
    pen.beginPath();
    pen.moveTo(...point(event));
    pen.lineTo(...point(event));
    pen.stroke();
});
canvas.addEventListener('pointermove', event => {
    if (drawing) { pen.lineTo(...point(event)); pen.stroke(); }
});
for (const end of ['pointerup', 'pointercancel'])
    canvas.addEventListener(end, () => { if (drawing) { drawing = false; tell(); } });
element.querySelector('button').addEventListener('click', () => { clear(); tell(); });
watch('value', () => { if (!props.value) clear(); });  // another run was chosen
clear();
"""


@dataclass
class Network:
    """What a run folder holds, ready to look at pictures."""

    folder: Path
    model: nn.Module
    recipe: Recipe
    classes: list[str]

    @property
    def draws(self) -> bool:
        """Whether its pictures are such as a person can draw."""
        return self.recipe.data in GREY

    @property
    def title(self) -> str:
        """One line of Markdown."""
        title = f"**{self.recipe.variant}** trained on **{self.recipe.name}**, {len(self.classes)} classes"
        try:
            accuracy = json.loads((self.folder / "metrics.json").read_text())["test/accuracy"]
        except (OSError, ValueError, KeyError):
            return title
        return f"{title}, {accuracy:.1%} of the test images right"


@dataclass
class Answer:
    """Probabilities of the five likeliest classes, and pictures: what the network saw, where it looked, with what."""

    top: dict[str, float]
    seen: Image.Image
    attention: Image.Image
    filters: Image.Image


@functools.lru_cache(maxsize=2)
def load(folder: Path) -> Network:
    """The network of a run folder; DataError where it has none."""
    model, recipe, classes = load_weights(folder)
    return Network(folder, model.to(best_device()).eval(), recipe, classes)


_one_at_a_time = threading.Lock()  # the maps put hooks on the network


def look(network: Network, path: Path) -> Answer:
    """What the network says of a picture file, which it takes as `evaluation.predict_files` does.

    Raises DataError where the file is no image, or one of more than 64 million pixels.
    """
    _check_size(path)
    images, normalise = source(network.recipe), Normalise(network.recipe)
    pixels = plain(network.recipe, images.SIZE)(images.read(network.recipe, path))
    x = normalise(pixels[None]).to(best_device())
    with _one_at_a_time:
        with torch.no_grad():
            p = network.model(x).float().softmax(1).cpu()
        shares, labels = p[0].topk(min(5, p.shape[1]))
        heat = maps.grad_cam(network.model, x, labels[:1])[0].cpu()
        order, _ = maps.strongest_filters(network.model, x)
        tiles = cards.filters(network.model, grey=pixels.shape[0] == 1)
    large = _enlarged(pixels)
    top = {network.classes[k]: share for k, share in zip(labels.tolist(), shares.tolist())}
    return Answer(
        top, _picture(large), _picture(cards.overlay(large, heat)), _strip([tiles[k].pixels for k in order[0].tolist()])
    )


def framed(drawing: Image.Image, data: str) -> Image.Image:
    """A grey drawing, dark on white, as the data set shows its own: bright on black, centred, with the set's margin.

    Raises DataError where nothing is drawn.
    """
    ink = ImageOps.invert(drawing)
    box = ink.point(lambda value: 255 * (value > 32)).getbbox()
    if box is None:
        raise DataError("Nothing is drawn yet.")
    shape = ink.crop(box)
    edge = round(max(shape.size) / (1 - 2 * MARGINS[data]))
    frame = Image.new("L", (edge, edge))
    frame.paste(shape, ((edge - shape.width) // 2, (edge - shape.height) // 2))
    return frame


def _check_size(path: Path) -> None:
    try:
        with Image.open(path) as image:
            width, height = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, Image.DecompressionBombError):
            raise DataError(f"{path.name} has too many pixels; {MOST_PIXELS / 1e6:.0f} million are the most") from error
        raise DataError(f"{path.name} is not an image") from error
    if width * height > MOST_PIXELS:
        raise DataError(f"{path.name} has {width}x{height} pixels; {MOST_PIXELS / 1e6:.0f} million are the most")


def _enlarged(pixels: Tensor) -> Tensor:
    factor = max(1, EDGE // max(pixels.shape[1:]))
    return F.interpolate(pixels[None].float(), scale_factor=factor, mode="nearest")[0].to(torch.uint8)


def _strip(tiles: list[Tensor], edge: int = 80, gap: int = 8) -> Image.Image:
    strip = Image.new("RGBA", (len(tiles) * (edge + gap) - gap, edge))
    for k, tile in enumerate(tiles):
        strip.paste(_picture(tile).resize((edge, edge), Image.Resampling.NEAREST), (k * (edge + gap), 0))
    return strip


def _picture(pixels: Tensor) -> Image.Image:
    x = pixels.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(x.squeeze(2) if x.shape[2] == 1 else x)


with mock.patch("gradio.component_meta.create_or_modify_pyi"):  # it would write a file beside this one

    class Picture(gr.Image):
        """Hands the uploaded file on as it is: `look` reads it, and says in words what is wrong with it."""

        is_template = True

        def preprocess(self, payload: Any) -> Any:
            return None if payload is None else payload.path


def page(runs: list[Path]) -> gr.Blocks:
    """The page for the networks of these run folders, the first of which is shown first."""
    first = load(runs[0])
    with gr.Blocks(title="AlexNet", analytics_enabled=False) as blocks:
        gr.Markdown("# What does the network see?")
        choices = [(run.name, str(run)) for run in runs]
        run = gr.Dropdown(choices, value=str(runs[0]), label="Run", visible=len(runs) > 1, elem_id="run")
        title = gr.Markdown(first.title)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                with gr.Tabs(selected="draw" if first.draws else "photo") as tabs:
                    with gr.Tab(
                        "Draw", id="draw", interactive=first.draws, visible=first.draws or len(runs) > 1
                    ) as draw_tab:
                        paper = gr.HTML(
                            "", html_template=PAPER, css_template=PAPER_CSS, js_on_load=PAPER_JS, elem_id="paper"
                        )
                    with gr.Tab("Picture", id="photo"):
                        picture = Picture(
                            sources=["upload", "clipboard"], label="Picture", show_label=False, height=400,
                            elem_id="picture", buttons=[], alt_text="the picture",
                        )  # fmt: skip
                message = gr.Markdown(_greeting(first), elem_id="message", elem_classes="message")
            with gr.Column(scale=3, min_width=300):
                label = gr.Label(label="It could be", num_top_classes=5, elem_id="answer")
                style: dict[str, Any] = dict(show_label=False, interactive=False, buttons=[], elem_classes="pixels")
                with gr.Row():
                    with gr.Column(min_width=140):
                        gr.Markdown("What it gets")
                        seen = gr.Image(elem_id="seen", alt_text="the picture as it gets it", **style)
                    with gr.Column(min_width=140):
                        gr.Markdown("Where it looks")
                        attention = gr.Image(elem_id="attention", alt_text="where it looks", **style)
                gr.Markdown("The first layer's filters that answer most, the strongest first")
                filters = gr.Image(elem_id="filters", alt_text="filters of the first layer", image_mode=None, **style)
        shown = [message, label, seen, attention, filters]
        choose: dict[str, Any] = dict(show_progress="hidden", api_visibility="private")
        ask: dict[str, Any] = dict(show_progress="minimal", api_visibility="private", trigger_mode="always_last")
        run.change(_choose, run, [title, draw_tab, tabs, paper, picture, *shown], **choose)
        picture.upload(_ask_picture, [run, picture], [picture, *shown], **ask)
        picture.clear(lambda run: _nothing(_greeting(load(Path(run)))), run, shown, **choose)
        paper.input(_ask_drawing, [run, paper], shown, **ask)
    return blocks


def serve(runs: list[Path], port: int, announce: Any) -> None:
    """Serves `page` on 127.0.0.1 until SIGINT or SIGTERM; `announce` gets the address once it answers.

    Raises OSError where the port is taken, DataError where the first run folder has no network. What is uploaded is
    kept in a temporary folder that ends with the page.
    """
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((ADDRESS, port))
        port = probe.getsockname()[1]
    system = gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")
    theme = gr.themes.Default(font=system, font_mono=(gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")))
    with tempfile.TemporaryDirectory(prefix="alexnet-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        blocks = page(runs)
        _, url, _ = blocks.launch(
            server_name=ADDRESS, server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
            max_file_size=MOST_BYTES, theme=theme, css=CSS, footer_links=[], enable_monitoring=False, pwa=False,
            mcp_server=False,
        )  # fmt: skip
        try:
            announce(url)
            stop.wait()
        finally:
            blocks.close(verbose=False)


def _greeting(network: Network) -> str:
    return "Draw something, or drop a picture." if network.draws else "Drop a photograph, or paste one."


def _nothing(message: str) -> list:
    return [message, None, None, None, None]


def _shown(answer: Answer) -> list:
    return ["", answer.top, answer.seen, answer.attention, answer.filters]


def _choose(run: str) -> list:
    try:
        network = load(Path(run))
    except DataError as error:
        return [f"**{error}**", gr.skip(), gr.skip(), None, None, *_nothing("")]
    tabs = gr.Tabs(selected="draw" if network.draws else "photo")
    return [network.title, gr.Tab(interactive=network.draws), tabs, None, None, *_nothing(_greeting(network))]


def _ask_picture(run: str, path: str | None) -> list:
    if path is None:
        return [gr.skip(), *_nothing("")]
    try:
        return [gr.skip(), *_shown(look(load(Path(run)), Path(path)))]
    except DataError as error:
        message = str(error).replace(f"{Path(path).parent}/", "")
        return [None, *_nothing(f"**{message}**")]


def _ask_drawing(run: str, url: str) -> list:
    network = load(Path(run))
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "drawing.png"
            framed(_drawing(url), network.recipe.data).save(path)
            return _shown(look(network, path))
    except DataError as error:
        return _nothing(f"**{error}**")


def _drawing(url: str) -> Image.Image:
    """The picture in a data URL as the canvas makes it; the page may send anything."""
    start, _, data = url.partition(",")
    try:
        if start != "data:image/png;base64" or len(data) > MOST_DRAWN:
            raise ValueError
        with Image.open(io.BytesIO(b64decode(data, validate=True)), formats=["PNG"]) as image:
            if image.width * image.height > MOST_DRAWN:
                raise ValueError
            return image.convert("L")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError("The drawing did not arrive whole; draw it again.") from error
