"""The demo: its answers to pictures, drawings and bad files, and its page in Chromium."""

import io
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from browser import chromium
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits
from training_helpers import cli

from alexnet_cuda.classify import classify
from alexnet_cuda.data import load_images
from alexnet_cuda.data.augmentation import Normalise
from alexnet_cuda.demo import network, page
from alexnet_cuda.networks import build
from alexnet_cuda.recipe import Recipe, load_recipe
from alexnet_cuda.weights import load_weights, save_weights


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs/digits, which knows some digits, and the older runs/photos, of two classes and random weights."""
    folder = tmp_path_factory.mktemp("work") / "runs"
    (folder / "photos").mkdir(parents=True)
    recipe = Recipe().replace({"name": "birds", "data": "folder", "variant": "cifar"})
    save_weights(folder / "photos" / "weights.safetensors", build(recipe, 2), recipe, ["duck", "swan"])
    os.utime(folder / "photos" / "weights.safetensors", (0, 0))
    recipe = load_recipe("digits")
    images, model, normalise = load_images(recipe).train, build(recipe, 10).eval(), Normalise(recipe)
    with torch.no_grad():  # random features and, by least squares with a penalty, the last layer
        x = torch.cat([model.classifier[:-1](model.features(normalise(batch)).flatten(1))
                       for batch in images.images.split(100)])  # fmt: skip
        x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
        penalty = 1e-3 * x.square().sum(0).mean() * torch.eye(x.shape[1])
        solution = torch.linalg.solve(x.T @ x + penalty, 5 * x.T @ F.one_hot(images.labels).double())
        model.classifier[-1].weight.copy_(solution[:-1].T)
        model.classifier[-1].bias.copy_(solution[-1])
    (folder / "digits").mkdir()
    save_weights(folder / "digits" / "weights.safetensors", model, recipe, [str(n) for n in range(10)])
    (folder / "digits" / "metrics.json").write_text('{"test/accuracy": 0.976}')
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pictures, good and bad."""
    folder = tmp_path_factory.mktemp("files")
    digit = (255 - load_digits().images[4] / 16 * 255).astype(np.uint8)
    Image.fromarray(digit).resize((200, 200), Image.Resampling.BICUBIC).save(folder / "four.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)).save(folder / "photo.jpg")
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "four.png").read_bytes()[:3000])
    Image.new("1", (8001, 8001)).save(folder / "huge.png")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    (folder / "heavy.png").write_bytes(bytes(page.MAX_BYTES + 1))
    return folder


def data_url(image):
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return "data:image/png;base64," + b64encode(buffer.getvalue()).decode()


def ring(size=400):
    paper = Image.new("L", (size, size), 255)
    ImageDraw.Draw(paper).ellipse((140, 90, 290, 290), outline=0, width=34)
    return paper


@pytest.mark.parametrize(("run", "name"), [("digits", "four.png"), ("photos", "photo.jpg"), ("photos", "four.png")])
def test_the_page_says_what_predict_says(runs, files, run, name):
    loaded = network.load(runs / run)
    found = network.predict(loaded, files / name)
    expected = classify(*load_weights(runs / run)[:2], files / name)
    shares, labels = expected.topk(min(5, len(loaded.classes)))
    assert list(found.top) == [loaded.classes[k] for k in labels]
    assert list(found.top.values()) == pytest.approx(shares.tolist(), abs=1e-5)
    assert found.seen.size == found.attention.size == (320, 320)
    assert len(found.attention.convert("RGB").getcolors(2**20)) > 50
    assert found.filters.size == (8 * 88 - 8, 80)
    assert len(found.filters.getcolors(2**20)) > 20
    if run == "digits":
        assert next(iter(found.top)) == "4"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.png", "text.png is not an image"),
        ("cut.png", "cut.png cannot be read as an image"),
        ("huge.png", "huge.png has 8001x8001 pixels; the limit is 64 million"),
        ("bomb.png", "bomb.png has too many pixels; the limit is 64 million"),
    ],
)
def test_a_bad_file_is_a_sentence(runs, files, name, message):
    picture, text, *rest = page._ask_picture(str(runs / "digits"), str(files / name))
    assert message in text
    assert str(files) not in text
    assert picture is None
    assert rest == [None] * 4


def test_a_drawing_is_framed_as_the_set_frames_its_own():
    frame = network._framed(ring(), 4 / 28)
    left, top, right, bottom = frame.getbbox()
    assert frame.width == frame.height == pytest.approx(201 * 28 / 20, abs=2)
    assert top == pytest.approx(frame.height * 4 / 28, abs=2)
    assert abs((left + right) - (top + bottom)) <= 2
    assert frame.getpixel((frame.width // 2, top + 5)) == 255
    assert frame.getpixel((0, 0)) == frame.getpixel((frame.width // 2, frame.height // 2)) == 0


def test_drawings(runs):
    message, top, *_ = page._ask_drawing(str(runs / "digits"), data_url(ring()))
    assert message == ""
    assert next(iter(top)) == "0"
    message, top, *_ = page._ask_drawing(str(runs / "digits"), data_url(Image.new("L", (400, 400), 255)))
    assert "Nothing is drawn yet" in message
    assert top is None


@pytest.mark.parametrize(
    "url",
    ["", "data:text/html;base64,PGI+", "data:image/png;base64,???", "data:image/png;base64,PGI+", "A" * 2**21,
     "data:image/png;base64," + "A" * 2**21, data_url(Image.new("1", (5000, 5000)))],
    ids=["empty", "html", "no base64", "no png", "long", "long png", "large"],
)  # fmt: skip
def test_only_a_drawing_of_the_page_is_read(runs, url):
    assert "The drawing is incomplete" in page._ask_drawing(str(runs / "digits"), url)[0]


def test_errors_of_the_command_are_sentences(runs, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        output = cli("demo", "--run", runs / "digits", "--port", port, code=1)
    assert f"port {port} of 127.0.0.1 cannot be used (Address already in use)" in output
    assert "does not exist" in cli("demo", "--run", tmp_path / "absent", "--port", 0, code=1)


@pytest.fixture(scope="module")
def server(runs, tmp_path_factory):
    """(address, process, its folder for temporary files) of `alexnet-cuda demo` beside runs/."""
    temporary = tmp_path_factory.mktemp("temporary")
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "alexnet_cuda.cli", "demo", "--port", "0"], cwd=runs.parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"TMPDIR": str(temporary)},
    )  # fmt: skip
    line = process.stdout.readline()
    assert "Ctrl-C" in line, line + process.stdout.read()
    yield re.search(r"http://[^ ]+/", line).group(), process, temporary
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def browser(server):
    driver = chromium("performance", "window-size=1280,1100")
    driver.get(server[0])
    yield driver
    driver.quit()


def wait_for(condition, what):
    from selenium.webdriver.support.wait import WebDriverWait

    wait = WebDriverWait(None, 30, 0.1, [Exception])  # the page changes while it is read
    return wait.until(lambda _: condition(), f"no {what} within 30 s")


def find(browser, selector):
    return browser.find_element("css selector", selector)


def text(browser, selector):
    return find(browser, selector).text


def answer(browser):
    """The lines of the prediction: classes and percentages."""
    lines = wait_for(lambda: text(browser, "#answer") if "%" in text(browser, "#answer") else "", "answer").split("\n")
    wait_for(lambda: loaded(browser, "#attention"), "overlay")
    return lines


def open_tab(browser, name):
    wait_for(lambda: [tab.click() or True for tab in browser.find_elements("css selector", "button[role=tab]")
                      if tab.text == name], f"tab {name}")  # fmt: skip


def upload(browser, path):
    open_tab(browser, "Picture")
    for button in browser.find_elements("css selector", "#picture button[aria-label='Remove Image']"):
        button.click()
        wait_for(lambda: not browser.find_elements("css selector", "#seen img"), "empty page")
    wait_for(lambda: find(browser, "#picture input[type=file]"), "place to drop").send_keys(str(path))


def loaded(browser, selector):
    """Whether a picture is there, whole and larger than a placeholder."""
    script = "const i = document.querySelector(arguments[0]); return i && i.complete ? i.naturalWidth : 0"
    return browser.execute_script(script, f"{selector} img")


def test_pictures_and_bad_files_in_the_browser(browser, files):
    upload(browser, files / "four.png")
    lines = answer(browser)
    assert lines[1] == "4"
    assert sum(line.endswith("%") for line in lines) == 5
    for name, width in (("attention", 320), ("seen", 320), ("filters", 8 * 88 - 8)):
        assert wait_for(lambda name=name: loaded(browser, f"#{name}"), name) == width
    upload(browser, files / "text.png")
    wait_for(lambda: "text.png is not an image" in text(browser, "#message"), "message")
    assert "%" not in text(browser, "#answer")
    assert not loaded(browser, "#attention")
    upload(browser, files / "heavy.png")
    wait_for(lambda: "maximum allowed size" in text(browser, "body"), "message")
    assert "Traceback" not in text(browser, "body")


def test_a_drawing_is_named_in_the_browser(browser):
    from selenium.webdriver.common.action_chains import ActionChains

    open_tab(browser, "Draw")
    canvas = wait_for(lambda: find(browser, "#canvas canvas"), "paper")
    wait_for(canvas.is_displayed, "paper")
    actions = ActionChains(browser, duration=10).move_to_element_with_offset(canvas, 0, -90).click_and_hold()
    for step in range(1, 25):
        angle = step / 24 * 2 * math.pi
        actions.move_to_element_with_offset(canvas, round(65 * math.sin(angle)), round(-90 * math.cos(angle)))
    actions.release().perform()
    assert answer(browser)[1] == "0"
    find(browser, "#canvas button").click()
    wait_for(lambda: "Nothing is drawn yet" in text(browser, "#message"), "message")
    assert "%" not in text(browser, "#answer")


def test_another_run_is_chosen_in_the_browser(browser, files):
    assert "trained on digits, 10 classes, test accuracy 97.6" in text(browser, "body")
    find(browser, "#run input").click()
    wait_for(lambda: [option for option in browser.find_elements("css selector", "[role=option]")
                      if "photos" in option.text], "run")[0].click()  # fmt: skip
    wait_for(lambda: "trained on birds, 2 classes" in text(browser, "body"), "title")
    draw = [tab for tab in browser.find_elements("css selector", "button[role=tab]") if tab.text == "Draw"]
    wait_for(lambda: not draw[0].is_enabled(), "photographs cannot be drawn")
    upload(browser, files / "photo.jpg")
    assert {"duck", "swan"} <= set(answer(browser))


def test_nothing_leaves_this_machine(browser, server):
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert len(urls) > 10
    assert not [url for url in urls if not url.startswith((server[0], "data:", "blob:"))]


def test_the_page_answers_on_localhost_only(server):
    port = int(server[0].rstrip("/").rsplit(":", 1)[1])
    rows = (Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()).splitlines()
    listening = [row.split()[1] for row in rows if f":{port:04X} " in row and row.split()[3] == "0A"]
    assert listening == [f"0100007F:{port:04X}"]


def test_ctrl_c_ends_quietly(server):
    _, process, temporary = server
    assert list(temporary.glob("alexnet-demo-*"))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert not output.strip()
    assert not list(temporary.glob("alexnet-demo-*"))
