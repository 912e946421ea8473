"""What a run leaves to look at: maps against hand-computed ones, tables against scikit-learn, the page in a browser."""

import copy
import csv
import json
import math
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("lightning")
pytest.importorskip("sklearn")
pytest.importorskip("jinja2")

import sklearn.metrics
import torch
import torchmetrics.functional.classification as tm
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from alexnet_cuda import AlexNet
from alexnet_cuda.cli import app
from alexnet_cuda.data import ImageSet, Split
from alexnet_cuda.reports import cards, charts, page, tables, write_report
from alexnet_cuda.reports.maps import feature_maps, first_filters, grad_cam, layers, strongest_filters
from alexnet_cuda.training import Recipe
from alexnet_cuda.training.evaluation import Predictions

PICTURES = {"calibration", "best_worst", "confusion_matrix", "curves", "feature_maps", "filters", "grad_cam"}
PICTURES |= {"predictions", "throughput"}
TABS = ("overview", "training", "mistakes", "inside", "data")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cli(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False, env={"COLUMNS": "120"})
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Digits, one epoch of 200 images."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    output = cli("train", "digits", "--epochs", 1, "--limit", 200, "--accelerator", "cpu", "--output", folder)
    assert f"{folder}/report.html" in output
    return folder


class Tiny(nn.Module):
    """Two channels, x and -x, then ReLU in place, then a linear layer."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(inplace=True))
        self.last = nn.Linear(8, 2, bias=False)
        self.features[0].weight.data = torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1)
        self.last.weight.data = torch.tensor([[4.0, 4, 4, 4, 0, 0, 0, 8], [-1.0, -1, -1, -1, 0, 0, 0, 0]])

    def forward(self, x):
        return self.last(self.features(x).flatten(1))


X = torch.tensor([1.0, 2.0, 3.0, -4.0]).reshape(1, 1, 2, 2)


def test_grad_cam_is_the_one_computed_by_hand():
    # Class 0: derivatives by channel 0 are 4, 4, 4, 0 (ReLU is off), mean 3; by channel 1 0, 0, 0, 8, mean 2. The sum
    # 3 x + 2 (-x) = x is positive at three places, at most 3. Class 1: -3/4 x is positive at the last place only.
    maps = grad_cam(Tiny().eval(), X.expand(2, -1, -1, -1), torch.tensor([0, 1]))
    expected = torch.tensor([[[1 / 3, 2 / 3], [1, 0]], [[0, 0], [0, 1]]])
    torch.testing.assert_close(maps, expected)


@pytest.mark.parametrize("variant", ["cifar", "caffe", "torchvision/resnet18"])
def test_grad_cam_of_every_kind_of_network_leaves_it_as_it_was(variant):
    from torchvision.models import get_model

    alexnet = "/" not in variant
    model = (AlexNet(variant, 5) if alexnet else get_model(variant[12:], num_classes=5)).eval().requires_grad_(False)
    edge = model.variant.input_size if alexnet else 64
    x, before = torch.randn(2, 3, edge, edge), copy.deepcopy(model.state_dict())
    scores = model(x)
    maps = grad_cam(model, x, torch.tensor([3, 0]))
    assert maps.shape == (2, edge, edge)
    assert maps.min() >= 0
    assert all(m == 0 or m == pytest.approx(1) for m in maps.amax((1, 2)))
    assert maps.std() > 0
    assert torch.equal(model(x), scores)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert not any(m._forward_hooks for m in model.modules())


def test_grad_cam_of_weights_and_images_made_in_inference_mode():
    with torch.inference_mode():
        model, x = Tiny().eval(), X.clone()
        inside = grad_cam(model, x, torch.tensor([0]))
    assert next(model.parameters()).is_inference()
    torch.testing.assert_close(inside, grad_cam(Tiny(), X, torch.tensor([0])))


@pytest.mark.parametrize("variant", ["cifar", "caffe"])
def test_feature_maps_are_what_the_modules_give_one_by_one(variant):
    model = AlexNet(variant, 5).eval()
    x = torch.randn(3, *(model.variant.input_size,) * 2)
    found = feature_maps(model, x)
    y, convolutions = x[None] * model.input_scale, 0
    assert len(found) == len(model.features)
    with torch.no_grad():
        for module, (name, z) in zip(model.features, found.items(), strict=True):
            y = module(y)
            convolutions += isinstance(module, nn.Conv2d)
            assert name.endswith(str(convolutions))
            torch.testing.assert_close(z, y[0], rtol=1e-4, atol=1e-4)
    assert [name for name in found if name.startswith("conv")] == [f"conv{n}" for n in range(1, 6)]


def test_feature_maps_are_taken_before_a_layer_that_works_in_place():
    found = feature_maps(Tiny(), X)
    assert found["conv1"].flatten().tolist() == [1, 2, 3, -4, -1, -2, -3, 4]
    assert found["relu1"].flatten().tolist() == [1, 2, 3, 0, 0, 0, 0, 4]


def test_layers_of_the_same_name_are_kept_apart():
    names = [*layers(AlexNet("original2012", 2))]
    assert "lrn2'" in names
    assert len(names) == len(AlexNet("original2012", 2).features)


def test_the_filters_that_fire_most():
    model = AlexNet("cifar", 2).eval()
    conv = model.features[0]
    conv.weight.data.zero_()
    conv.weight.data[:, 0, 1, 1] = torch.arange(48.0).roll(7) - 40
    order, values = strongest_filters(model, torch.ones(2, 3, 32, 32), 4)
    assert order.tolist() == [[6, 5, 4, 3]] * 2
    assert values[0].tolist() == [7, 6, 5, 4]
    conv.weight.data[0, :, 0, 0] = torch.tensor([1.0, 2.0, 4.0])
    assert first_filters(model).shape == (48, 3, 3, 3)
    assert first_filters(model, grey=True)[0, 0, 0, 0] == 7


@pytest.fixture
def guesses():
    """Probabilities of 8 classes, the last of which never occurs, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(7, (300,), generator=generator)
    logits = torch.randn(300, 8, generator=generator) * 1.5
    logits[:, 6] -= 100  # never predicted
    logits[torch.arange(300), labels] += 1
    return logits.softmax(1), labels


def test_the_figures_of_every_class_are_those_of_scikit_learn(guesses, tmp_path):
    p, labels = guesses
    names = [f"class, {n}" for n in range(8)]
    rows = tables.per_class(p, labels, names)
    report = sklearn.metrics.classification_report(
        labels, p.argmax(1), labels=range(8), target_names=names, output_dict=True, zero_division=math.nan
    )
    for n, row in enumerate(rows):
        expected = report[row["class"]]
        assert row["support"] == expected["support"]
        for key, name in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
            assert row[key] == pytest.approx(expected[name], nan_ok=True)
        five = [int(n in p[i].topk(5).indices) for i in (labels == n).nonzero().flatten()]
        assert row["top5"] == pytest.approx(sum(five) / len(five) if five else math.nan, nan_ok=True)
    (tmp_path / "per_class.csv").write_text(tables.to_csv(rows))
    with (tmp_path / "per_class.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [r["class"] for r in read] == names
    assert read[6]["precision"] == ""
    assert read[7]["recall"] == read[7]["top5"] == ""
    assert float(read[0]["f1"]) == pytest.approx(rows[0]["f1"], abs=1e-6)
    assert "top5" not in tables.per_class(p[:, :5].softmax(1), labels.clamp(max=4), names[:5])[0]


def test_the_bins_of_calibration_give_the_calibration_error(guesses):
    p, labels = guesses
    count, confidence, accuracy = charts.reliability(p, labels)
    assert count.sum() == len(labels)
    error = (count * (confidence - accuracy).abs()).nan_to_num().sum() / count.sum()
    assert charts.reliability(torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([0, 1]))[0].nonzero().tolist() == [
        [7],
        [14],
    ]
    assert error.item() == pytest.approx(tm.multiclass_calibration_error(p, labels, 8).item(), abs=1e-6)


def test_the_commonest_mistakes_and_which_images_are_shown(guesses):
    p, labels = guesses
    counts = charts.confusion_counts(p.argmax(1), labels, 8)
    pairs = tables.confused_pairs(counts, [str(n) for n in range(8)], 3)
    for label, guess, times, of in pairs:
        assert label != guess
        assert times == ((labels == int(label)) & (p.argmax(1) == int(guess))).sum()
        assert of == (labels == int(label)).sum()
    assert [pair[2] for pair in pairs] == sorted((counts - counts.diag().diag()).flatten().tolist())[:-4:-1]
    wrong, right = cards.worst(p, labels, 5), cards.surest(p, labels, 6)
    shares = p[torch.arange(300), labels]
    assert shares[wrong].tolist() == sorted(shares[p.argmax(1) != labels].tolist())[:5]
    assert labels[right].tolist() == [0, 1, 2, 3, 4, 5]
    assert all(p[i].argmax() == labels[i] for i in right)
    assert labels[cards.sample(labels, 7)].tolist() == list(range(7))


def test_a_run_leaves_pictures_tables_and_the_page(run):
    assert {path.stem for path in run.glob("*.png")} == PICTURES
    for path in run.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 200, path
            assert len(picture.convert("RGB").getcolors(2**24)) > 50, path
    metrics = json.loads((run / "metrics.json").read_text())
    with (run / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["support"]) for row in rows) == metrics["images"]["test"]
    text = (run / "report.html").read_text()
    assert len(text) < 3e6
    assert f"{metrics['test/accuracy']:.2%}" in text
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


def test_report_of_weights_alone(run, tmp_path):
    shutil.copy(run / "weights.safetensors", tmp_path)
    shutil.copy(run / "throughput.png", tmp_path)
    assert f"{tmp_path}/report.html" in cli("report", "--run", tmp_path / "weights.safetensors")
    assert not (tmp_path / "throughput.png").exists()
    assert "Training ended before its first epoch did" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("classes", "channels", "count", "spoil"),
    [(2, 1, 1, False), (3, 3, 4, True), (17, 3, 40, False), (1000, 3, 60, False)],
    ids=["one-image", "no-numbers", "17", "1000"],
)
def test_any_number_of_classes_and_images(classes, channels, count, spoil, tmp_path):
    names = [f"<b>$\\frac$ & {n} a rather long name" for n in range(classes)]
    pixels, labels = torch.randint(256, (count, channels, 32, 32), dtype=torch.uint8), torch.arange(count) % classes
    split = Split(pixels, labels)
    images = ImageSet(names, split, split, split, 32, ["a <note>"])
    recipe = Recipe().replace({"variant": "cifar", "channels": channels})
    model = AlexNet("cifar", classes, channels)
    logits = torch.randn(count, classes)
    if spoil:
        logits.fill_(math.nan)
        model.features[0].weight.data.fill_(math.nan)
        (tmp_path / "metrics.csv").write_text("epoch,step,train/loss,val/loss\n0,3,nan,inf\n1,6,,\n")
    metrics = {"test/accuracy": math.nan if spoil else 0.5, "test/loss": math.nan, "parameters": 3}
    metrics |= {"test/calibration_error": math.nan, "images": {"test": count}}
    paths = write_report(tmp_path, recipe, images, model, Predictions(logits, labels), metrics)
    assert all(path.stat().st_size for path in paths)
    text = paths[0].read_text()
    assert len(text) < 3e6
    assert "<b>" not in text
    assert "a &lt;note&gt;" in text
    assert len((tmp_path / "per_class.csv").read_text().splitlines()) == classes + 1


def test_photographs_are_decoded_only_where_they_are_shown(tmp_path):
    decoded = []

    class Files(list):
        def __getitem__(self, index):
            decoded.append(index)
            return torch.randint(256, (3, 40 + index % 7, 60), dtype=torch.uint8)

    labels = torch.arange(500) % 2
    split = Split(Files(range(500)), labels)
    images = ImageSet(["a", "b"], split, split, split, None)
    recipe = Recipe().replace({"variant": "cifar"})
    metrics = {"test/accuracy": 0.5, "parameters": 3, "images": {"test": 500}}
    write_report(tmp_path, recipe, images, AlexNet("cifar", 2), Predictions(torch.randn(500, 2), labels), metrics)
    assert len(decoded) == len(set(decoded)) <= 40 + 20 + 20


def test_a_deep_network_is_shown_in_twelve_layers():
    from torchvision.models import resnet18

    split = Split(torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8), torch.zeros(1, dtype=torch.long))
    recipe = Recipe().replace({"variant": "torchvision/resnet18", "size": 64})
    seen = cards.Seen(ImageSet(["a", "b"], split, split, split, 64), recipe)
    names = [name.split()[0] for name in cards.maps(resnet18(num_classes=2).eval(), 0, seen)]
    assert len(names) == 13
    assert names[:2] + names[-1:] == ["input", "conv1", "conv20"]


def test_charts_take_the_colour_of_the_page():
    drawing = page.svg(charts.calibration(torch.eye(2), torch.tensor([0, 1]), 0.0, "title"))
    assert drawing.startswith("<svg")
    assert "title" not in re.sub(r"<title>.*?</title>", "", drawing)


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if binary is None:
        pytest.skip("no Chromium")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = shutil.which("chromedriver")
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver) if driver else None)
    yield browser
    browser.quit()


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

    yield open_page
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


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
    focusable = page.execute_script(
        "return [...document.querySelectorAll('nav a')].filter(a => a.tabIndex == 0).length"
    )
    assert focusable == 1


def test_the_table_of_classes_sorts_by_number_and_by_name(opened):
    page = opened(anchor="#mistakes")
    heading = page.find_elements("css selector", "#per-class th button")
    cells = "return [...document.querySelectorAll('#per-class tbody tr')].map(r => r.cells[{}].{})"
    for column in (2, 3):
        heading[column].click()
        values = [float(v) for v in page.execute_script(cells.format(column, "dataset.value"))]
        numbers = [v for v in values if v == v]
        assert numbers == sorted(numbers, reverse=True)
        assert all(v != v for v in values[len(numbers) :])
    heading[3].click()
    numbers = [float(v) for v in page.execute_script(cells.format(3, "dataset.value"))]
    assert [v for v in numbers if v == v] == sorted(v for v in numbers if v == v)
    assert page.execute_script("return [...document.querySelectorAll('#per-class [aria-sort]')].length") == 1
    heading[0].click()
    assert page.execute_script(cells.format(0, "textContent")) == [str(n) for n in range(10)]


def test_without_scripts_everything_shows(opened):
    page = opened(script=False)
    assert all(page.find_element("id", tab).is_displayed() for tab in TABS)
