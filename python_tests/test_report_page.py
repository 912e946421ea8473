"""The report of a run: its files, and its page in a browser."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from browser import chromium
from PIL import Image
from training_helpers import cli, read_csv

from alexnet_cuda.reports import cards, charts, hidden
from alexnet_cuda.words import percent

PICTURES = {"calibration", "best_worst", "confusion_matrix", "curves", "feature_maps", "filters", "grad_cam"}
PICTURES |= {"predictions", "embedding", "figure4", "occlusion", "preferred"}
TABS = ("overview", "training", "mistakes", "inside", "data")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Digits, one epoch of 200 images."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    output = cli("train", "digits", "--epochs", 1, "--limit", 200, "--accelerator", "cpu", "--output", folder)
    assert f"{folder}/report.html" in output
    return folder


def test_a_run_leaves_pictures_tables_and_the_page(run):
    assert {path.stem for path in run.glob("*.png")} == PICTURES
    for path in run.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 200, path
            assert len(picture.convert("RGB").getcolors(2**24)) > 50, path
    metrics = json.loads((run / "metrics.json").read_text())
    assert sum(int(row["support"]) for row in read_csv(run / "per_class.csv")) == metrics["images"]["test"]
    text = (run / "report.html").read_text()
    assert len(text) < 3e6
    assert percent(metrics["test/accuracy"]) in text
    assert f"{metrics['parameters']:,}" in text
    assert metrics["versions"]["lightning"] in text
    assert "batch_size" in text
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:|#|"#)[a-z]+:""", text)


def test_report_draws_everything_again(run, tmp_path):
    for name in ("weights.safetensors", "metrics.json", "metrics.csv"):
        shutil.copy(run / name, tmp_path / name)
    answer = json.loads(cli("report", "--run", tmp_path, "--json"))
    assert answer["report"] == str(tmp_path / "report.html")
    assert {Path(name).name for name in answer["files"]} == {"per_class.csv", *(f"{name}.png" for name in PICTURES)}
    assert (tmp_path / "per_class.csv").read_text() == (run / "per_class.csv").read_text()
    assert (tmp_path / "predictions.png").read_bytes() == (run / "predictions.png").read_bytes()
    assert (tmp_path / "metrics.json").read_text() == (run / "metrics.json").read_text()
    assert "does not exist" in cli("report", "--run", tmp_path / "absent", code=1)


def test_report_of_weights_alone(run, tmp_path, monkeypatch):
    monkeypatch.setattr(hidden, "hidden", lambda *arguments: None)
    monkeypatch.setattr(cards, "preferred", lambda *arguments: {"conv1": [cards.Card(torch.zeros(1, 8, 8).byte())]})
    monkeypatch.setattr(cards, "sheet", lambda *arguments, **options: charts.blank(1, 1))  # they take long
    shutil.copy(run / "weights.safetensors", tmp_path)
    (tmp_path / "throughput.png").write_bytes(b"of an earlier report")
    assert f"{tmp_path}/report.html" in cli("report", "--run", tmp_path / "weights.safetensors")
    assert not (tmp_path / "throughput.png").exists()
    assert "Training ended during its first epoch" in (tmp_path / "report.html").read_text()


@pytest.fixture(scope="module")
def browser():
    driver = chromium("browser", "hide-scrollbars")
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, run):
    """A function that opens the page at a width, in a colour scheme."""

    def open_page(width=1280, scheme="light", script=True, anchor=""):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get("about:blank")
        browser.get((run / "report.html").as_uri() + anchor)
        return browser

    return open_page


SHOWN = "return [...document.querySelectorAll('section')].filter(s => s.offsetParent).map(s => s.id)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_window_and_is_whole(opened, width, scheme):
    page = opened(width, scheme)
    for tab in TABS:
        page.execute_script(f"document.getElementById('{tab}-tab').click()")
        assert page.execute_script(SHOWN) == [tab]
        assert page.execute_script("return document.documentElement.scrollWidth") == width
    pictures = page.execute_script("return [...document.images].map(i => [i.complete, i.naturalWidth, i.alt.trim()])")
    assert len(pictures) > 150
    assert all(complete and natural and alt for complete, natural, alt in pictures)
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    assert page.get_log("browser") == []
    colour = "return getComputedStyle(document.{}).{}.match(/[0-9]+/g).slice(0, 3).reduce((a, b) => +a + +b) / 3"
    back = page.execute_script(colour.format("body", "backgroundColor"))
    ink = page.execute_script(colour.format("querySelector('svg text')", "fill"))
    assert (back > 240 and ink < 60) if scheme == "light" else (back < 40 and ink > 200)


def test_tabs_by_keyboard_and_by_address(opened):
    from selenium.webdriver import Keys

    page = opened(anchor="#mistakes")
    assert page.execute_script(SHOWN) == ["mistakes"]
    tab = page.find_element("id", "mistakes-tab")
    assert tab.get_attribute("aria-selected") == "true"
    page.execute_script("arguments[0].focus()", tab)
    for key, expected in ((Keys.ARROW_RIGHT, "inside"), (Keys.END, "data"), (Keys.ARROW_RIGHT, "overview")):
        page.switch_to.active_element.send_keys(key)
        assert page.execute_script(SHOWN) == [expected]
        assert page.switch_to.active_element.get_attribute("id") == f"{expected}-tab"
    assert page.execute_script("return document.querySelectorAll('nav a[tabindex=\"0\"]').length") == 1


def test_the_table_of_classes_sorts_by_number_and_by_name(opened):
    page = opened(anchor="#mistakes")
    heading = page.find_elements("css selector", "#per-class th button")
    cells = "return [...document.querySelectorAll('#per-class tbody tr')].map(r => r.cells[{}].{})"
    for column, descending in ((2, True), (3, True), (3, False)):
        heading[column].click()
        values = [float(v) for v in page.execute_script(cells.format(column, "dataset.value"))]
        numbers = [v for v in values if v == v]
        assert numbers == sorted(numbers, reverse=descending)
        assert all(v != v for v in values[len(numbers) :])  # those that are no number come last
    assert page.execute_script("return [...document.querySelectorAll('#per-class [aria-sort]')].length") == 1
    heading[0].click()
    assert page.execute_script(cells.format(0, "textContent")) == [str(n) for n in range(10)]


def test_a_figure_opens_larger_with_its_download(opened, run):
    page = opened(anchor="#training")
    opening = (
        "return [document.querySelector('dialog').open, document.querySelectorAll('dialog svg, dialog img').length]"
    )
    assert page.execute_script(opening) == [False, 0]
    for chart in ("#training .chart", "#training .enlarge"):
        page.find_element("css selector", chart).click()
        assert page.execute_script(opening) == [True, 1]
        link = page.find_element("css selector", "dialog a")
        assert link.get_attribute("href") == (run / "curves.png").as_uri()
        assert page.find_element("css selector", "dialog p").text.startswith("Loss and learning rate")
        assert page.execute_script("return document.querySelector('dialog svg').clientWidth") > 1100
        page.find_element("css selector", "dialog button").click()
        assert page.execute_script(opening)[0] is False
    page.find_element("id", "overview-tab").click()
    tile = page.find_element("css selector", ".tile.wrong img")
    tile.click()
    assert page.execute_script("return document.querySelector('dialog img').clientWidth") > 400
    caption = page.find_element("css selector", "dialog p").text
    assert caption == tile.get_attribute("title")
    assert re.fullmatch(r"\d, \d+ %; true: \d, \d+ %", caption)
    assert page.find_element("css selector", "dialog a").get_attribute("href") == tile.get_attribute("src")
    assert re.fullmatch(
        r"\d-\d+-true-\d-\d+.webp", page.find_element("css selector", "dialog a").get_attribute("download")
    )
    assert page.get_log("browser") == []


def test_the_pointer_finds_the_values_of_charts(opened, run):
    page = opened(anchor="#training")
    said = page.execute_script("return [...document.querySelectorAll('svg title')].map(t => t.textContent)")
    epoch = next(row for row in read_csv(run / "metrics.csv") if row["train/accuracy"])
    assert f"epoch 1: training accuracy {percent(float(epoch['train/accuracy']))}" in said
    cells = [re.fullmatch(r"\d, predicted as \d: [\d.]+ % of (\d+)", text) for text in said]
    assert any(cells)
    counts = [re.fullmatch(r"confidence \d+ % to \d+ %: [\d.]+ % of ([\d,]+) right", text) for text in said]
    support = json.loads((run / "metrics.json").read_text())["images"]["test"]
    assert sum(int(count[1]) for count in counts if count) == support


def test_without_scripts_everything_shows(opened):
    page = opened(script=False)
    assert all(page.find_element("id", tab).is_displayed() for tab in TABS)
