"""The page in gradio, and the server on 127.0.0.1."""

import os
import signal
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported

import gradio as gr

from ..errors import DataError
from .network import Network, load, predict, predict_drawing

ADDRESS = "127.0.0.1"
MAX_BYTES = 32 * 2**20  # of an upload
NO_ANSWER = [None] * 4  # in place of an `Answer`


def page(runs: list[Path]) -> gr.Blocks:
    """The page for the networks of these run folders, with the first one selected."""
    first = load(runs[0])
    with gr.Blocks(title="AlexNet", analytics_enabled=False) as blocks:
        gr.Markdown("# What does the network see?")
        choices = [(run.name.removesuffix(".safetensors"), str(run)) for run in runs]
        run = gr.Dropdown(choices, value=str(runs[0]), label="Run", visible=len(runs) > 1, elem_id="run")
        title = gr.Markdown(first.title)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                with gr.Tabs(selected="draw" if first.takes_drawings else "photo") as tabs:
                    with gr.Tab(
                        "Draw", id="draw", interactive=first.takes_drawings,
                        visible=first.takes_drawings or len(runs) > 1,
                    ) as draw_tab:  # fmt: skip
                        # gradio's own drawing component needs WebGL
                        canvas = gr.HTML(
                            "", html_template=_file("canvas.html"), css_template=_file("canvas.css"),
                            js_on_load=_file("canvas.js"), elem_id="canvas",
                        )  # fmt: skip
                    with gr.Tab("Picture", id="photo"):
                        picture = gr.Image(
                            sources=["upload", "clipboard"], label="Picture", show_label=False, height=400,
                            elem_id="picture", buttons=[], alt_text="the picture",
                        )  # fmt: skip
                message = gr.Markdown(_greeting(first), elem_id="message", elem_classes="message")
            with gr.Column(scale=3, min_width=300):
                label = gr.Label(label="Prediction", num_top_classes=5, elem_id="answer")
                style: dict[str, Any] = dict(show_label=False, interactive=False, buttons=[], elem_classes="pixels")
                with gr.Row():
                    with gr.Column(min_width=140):
                        gr.Markdown("The input of the network")
                        seen = gr.Image(elem_id="seen", alt_text="the input of the network", **style)
                    with gr.Column(min_width=140):
                        gr.Markdown("Evidence for the first class (Grad-CAM)")
                        attention = gr.Image(elem_id="attention", alt_text="evidence for the first class", **style)
                gr.Markdown("The first layer's filters with the largest responses")
                filters = gr.Image(elem_id="filters", alt_text="filters of the first layer", image_mode=None, **style)
        outputs = [message, label, seen, attention, filters]
        choose: dict[str, Any] = dict(show_progress="hidden", api_visibility="private")
        ask: dict[str, Any] = dict(show_progress="minimal", api_visibility="private", trigger_mode="always_last")
        run.change(_choose, run, [title, draw_tab, tabs, canvas, picture, *outputs], **choose)

        def uploaded(name: str, file: dict) -> list:
            if name not in map(str, runs):  # a request that the page did not make
                raise ValueError(f"unknown run {name!r}")
            return _ask_picture(name, file["path"])

        # Without preprocessing, in which gradio would decode the picture: the error messages are those of `predict`.
        picture.upload(uploaded, [run, picture], [picture, *outputs], preprocess=False, **ask)
        picture.clear(lambda run: [_greeting(load(Path(run))), *NO_ANSWER], run, outputs, **choose)
        canvas.input(_ask_drawing, [run, canvas], outputs, **ask)
    return blocks


def serve(runs: list[Path], port: int, announce: Any) -> None:
    """Serves `page` on 127.0.0.1 until SIGINT or SIGTERM, and calls `announce` with its address once it is ready.
    Uploads are kept in a temporary folder, which is removed at the end. Raises OSError if the port cannot be used,
    DataError if the first run folder has no network."""
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
            max_file_size=MAX_BYTES, theme=theme, css=_file("page.css"), footer_links=[], enable_monitoring=False,
            pwa=False, mcp_server=False,
        )  # fmt: skip
        try:
            announce(url)
            stop.wait()
        finally:
            blocks.close(verbose=False)


def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text("utf-8")


def _greeting(network: Network) -> str:
    return "Draw something, or drop a picture." if network.takes_drawings else "Drop a photograph, or paste one."


def _choose(run: str) -> list:
    try:
        network = load(Path(run))
    except DataError as error:
        return [f"**{error}**", gr.skip(), gr.skip(), None, None, "", *NO_ANSWER]
    tabs = gr.Tabs(selected="draw" if network.takes_drawings else "photo")
    draw_tab = gr.Tab(interactive=network.takes_drawings)
    return [network.title, draw_tab, tabs, None, None, _greeting(network), *NO_ANSWER]


def _ask_picture(run: str, path: str) -> list:
    try:
        return [gr.skip(), "", *predict(load(Path(run)), Path(path))]
    except DataError as error:
        message = str(error).replace(f"{Path(path).parent}/", "")
        return [None, f"**{message}**", *NO_ANSWER]


def _ask_drawing(run: str, url: str) -> list:
    try:
        return ["", *predict_drawing(load(Path(run)), url)]
    except DataError as error:
        return [f"**{error}**", *NO_ANSWER]
