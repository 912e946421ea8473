"""The parts of a report: maps against hand-computed ones, tables against scikit-learn, any number of classes."""

import copy
import math
import re

import pytest
import sklearn.metrics
import torch
import torchmetrics.functional.classification as tm
from helpers import assert_same_bits
from network_helpers import narrow_network
from torch import nn
from torchvision.models import resnet18
from training_helpers import legible_texts, read_csv

from alexnet_cuda import AlexNet
from alexnet_cuda.data import ImageSet, Split
from alexnet_cuda.recipe import Recipe
from alexnet_cuda.reports import cards, charts, hidden, maps, page, tables
from alexnet_cuda.reports.maps import feature_maps, first_filters, grad_cam, strongest_filters
from alexnet_cuda.reports.report import write_report


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


def test_a_blank_grad_cam_is_replaced_by_layer_cam():
    # Class 0: both means are 2, and 2 x + 2 (-x) = 0. Derivatives that are positive, times the output: 4 x at the first
    # two places, 8 (-x) at the last.
    x = torch.tensor([1.0, 2.0, -3.0, -4.0]).reshape(1, 1, 2, 2)
    expected = torch.tensor([[[1 / 8, 1 / 4], [0, 1]]])
    torch.testing.assert_close(grad_cam(Tiny().eval(), x, torch.tensor([0])), expected)


@pytest.mark.parametrize("variant", ["cifar", "caffe", "torchvision/resnet18"])
def test_grad_cam_of_every_kind_of_network_leaves_it_as_it_was(variant):
    resnet = variant == "torchvision/resnet18"
    model = (resnet18(num_classes=5).eval() if resnet else narrow_network(variant, 5)).requires_grad_(False)
    edge = 64 if resnet else model.variant.input_size
    x, before = torch.randn(2, 3, edge, edge), copy.deepcopy(model.state_dict())
    scores = model(x)
    maps = grad_cam(model, x, torch.tensor([3, 0]))
    assert maps.shape == (2, edge, edge)
    assert maps.min() >= 0
    assert all(m == 0 or m == pytest.approx(1) for m in maps.amax((1, 2)))
    assert maps.std() > 0
    assert torch.equal(model(x), scores)
    assert_same_bits(before, model.state_dict())
    assert not any(m._forward_hooks for m in model.modules())


def test_grad_cam_of_weights_and_images_made_in_inference_mode():
    with torch.inference_mode():
        model, x = Tiny().eval(), X.clone()
        inside = grad_cam(model, x, torch.tensor([0]))
    assert next(model.parameters()).is_inference()
    torch.testing.assert_close(inside, grad_cam(Tiny(), X, torch.tensor([0])))


@pytest.mark.parametrize("variant", ["cifar", "caffe"])
def test_feature_maps_are_what_the_modules_give_one_by_one(variant):
    model = narrow_network(variant, 5)
    x = torch.randn(3, *(model.variant.input_size,) * 2)
    found = feature_maps(model, x)
    y = x[None] * model.input_scale
    with torch.no_grad():
        for module, z in zip(model.features, found.values(), strict=True):
            y = module(y)
            torch.testing.assert_close(z, y[0], rtol=1e-4, atol=1e-4)
    assert [name for name in found if name.startswith("conv")] == [f"conv{n}" for n in range(1, 6)]


def test_feature_maps_are_taken_before_a_layer_that_works_in_place():
    found = feature_maps(Tiny(), X)
    assert found["conv1"].flatten().tolist() == [1, 2, 3, -4, -1, -2, -3, 4]
    assert found["relu1"].flatten().tolist() == [1, 2, 3, 0, 0, 0, 0, 4]


def test_the_filters_with_the_largest_responses():
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
        expected = [report[row["class"]][key] for key in ("support", "precision", "recall", "f1-score")]
        assert [row[key] for key in ("support", "precision", "recall", "f1")] == pytest.approx(expected, nan_ok=True)
        five = [int(n in p[i].topk(5).indices) for i in (labels == n).nonzero().flatten()]
        assert row["top5"] == pytest.approx(sum(five) / len(five) if five else math.nan, nan_ok=True)
    (tmp_path / "per_class.csv").write_text(tables.to_csv(rows))
    read = read_csv(tmp_path / "per_class.csv")
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
    bins = charts.reliability(torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([0, 1]))[0]
    assert bins.nonzero().flatten().tolist() == [7, 14]
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


class Photographs(list):
    """Images of several sizes that note which of them were decoded."""

    def __init__(self, count):
        super().__init__(range(count))
        self.decoded = []

    def __getitem__(self, index):
        self.decoded.append(index)
        return torch.randint(256, (3, 40 + index % 7, 60), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("classes", "channels", "count", "kind"),
    [(2, 1, 1, "tensor"), (3, 3, 4, "nan"), (17, 3, 500, "photographs"), (1000, 3, 60, "tensor")],
    ids=["one-image", "no-numbers", "17-of-photographs", "1000"],
)
def test_any_number_of_classes_and_images(classes, channels, count, kind, tmp_path, monkeypatch):
    names = [f"<b>$\\frac$ & {n} a rather long name" for n in range(classes)]
    files, labels = Photographs(count), torch.arange(count) % classes
    pixels = files if kind == "photographs" else torch.randint(256, (count, channels, 32, 32), dtype=torch.uint8)
    split = Split(pixels, labels)
    train = Split(Photographs(30) if kind == "photographs" else pixels[:30], labels[:30])
    images = ImageSet(names, train, train, split, None if kind == "photographs" else 32, ["a <note>"])
    monkeypatch.setattr(hidden, "TEST", 20)
    monkeypatch.setattr(cards, "preferred_images", lambda model, name, k, shape: torch.zeros(len(k), *shape))  # slow
    recipe = Recipe().replace({"variant": "cifar", "channels": channels})
    model, p, accuracy = AlexNet("cifar", classes, channels), torch.randn(count, classes).softmax(1), 0.5
    if kind == "nan":
        p.fill_(math.nan)
        model.features[0].weight.data.fill_(math.nan)
        (tmp_path / "metrics.csv").write_text("epoch,step,train/loss,val/loss\n0,3,nan,inf\n1,6,,\n")
        accuracy = math.nan
    metrics = {"test/accuracy": accuracy, "test/loss": math.nan, "test/calibration_error": math.nan}
    metrics |= {"parameters": 3, "images": {"test": count}}
    paths = write_report(tmp_path, recipe, images, model, p, metrics)
    assert all(path.stat().st_size for path in paths)
    text = paths[0].read_text()
    assert len(text) < 3e6
    assert "<b>" not in text
    assert "a &lt;note&gt;" in text
    assert len((tmp_path / "per_class.csv").read_text().splitlines()) == classes + 1
    assert len(files.decoded) == len(set(files.decoded)) <= 40 + 20 + 20 + 20  # once, and only those that are shown


def test_a_deep_network_is_shown_in_twelve_layers():
    split = Split(torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8), torch.zeros(1, dtype=torch.long))
    recipe = Recipe().replace({"variant": "torchvision/resnet18", "size": 64})
    seen = cards.SplitImages(ImageSet(["a", "b"], split, split, split, 64), recipe)
    names = [name.split()[0] for name in cards.maps(resnet18(num_classes=2).eval(), 0, seen)]
    assert len(names) == 13
    assert names[:2] + names[-1:] == ["input", "conv1", "conv20"]


def test_charts_take_the_colour_of_the_page():
    drawing = page.svg(charts.calibration(torch.eye(2), torch.tensor([0, 1]), 0.0, "title"))
    assert drawing.startswith("<svg")
    assert "title" not in re.sub(r"<title>.*?</title>", "", drawing)


def test_occlusion_is_the_loss_of_the_covered_place():
    class Corner(nn.Module):
        def forward(self, x):
            return torch.stack([4 * x[:, 0, 0, 0], -4 * x[:, 0, 0, 0]], dim=1)

    lost = maps.occlusion(Corner(), torch.ones(1, 1, 8, 8), torch.tensor([0]))[0]
    whole = torch.tensor([4.0, -4]).softmax(0)[0] - 0.5
    assert lost[0, 0] == pytest.approx(whole)  # covered by the first square alone
    assert lost[2:].abs().max() == lost[:, 2:].abs().max() == 0


def test_preferred_images_raise_their_channel():
    model = narrow_network("cifar", 5).requires_grad_(False)
    x = maps.preferred_images(model, "conv3", [2, 0], (3, 32, 32), steps=6)
    before, after = (maps.outputs(model, y, maps.convolutions(model))["conv3"] for y in (torch.zeros_like(x), x))
    assert all(after[n, k].mean() > before[n, k].mean() + 0.1 for n, k in enumerate((2, 0)))
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_neighbours_are_the_training_images_with_the_closest_hidden_outputs():
    train = Split(torch.arange(0, 250, 10).byte().reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8), torch.arange(25) % 2)
    test = Split(torch.tensor([32, 148]).byte().reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8), torch.tensor([1, 0]))
    images = ImageSet(["even", "odd"], train, train, test, 8)
    recipe = Recipe().replace({"channels": 1, "mean": "0", "std": "1"})
    model = nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 2))
    seen = cards.SplitImages(images, recipe), cards.SplitImages(images, recipe, "train")
    rows = hidden.neighbours(hidden.hidden(model, *seen), *seen, images.classes, columns=3)
    found = {int(row[0].pixels[0, 0, 0]): [(int(c.pixels[0, 0, 0]), c.title, c.right) for c in row[1:]] for row in rows}
    assert found[32] == [(30, "odd", True), (40, "even", False), (20, "even", False)]
    assert found[148][0] == (150, "odd", False)
    assert hidden.hidden(nn.Sequential(nn.Conv2d(1, 2, 3)), *seen) is None


def test_the_embedding_and_figure_4_are_legible():
    generator, labels = torch.Generator().manual_seed(0), torch.arange(60) % 17
    features = hidden.Hidden(torch.randn(60, 8, generator=generator), torch.zeros(0, 8), list(range(60)), [])
    figure = hidden.embedding(features, labels, [f"class {n}" for n in range(17)], "title")
    assert len(legible_texts(figure)) == 3 + 17
    assert hidden.embedding(hidden.Hidden(features.test[:9], features.train, [], []), labels, [], "few") is None
    pixels = torch.zeros(3, 8, 8).byte()
    top = [cards.Card(pixels, "class", bars=[(f"name {n}", 0.2, n == 1) for n in range(5)])] * 8
    assert len(legible_texts(hidden.figure4(top, [[cards.Card(pixels, "class")] * 7] * 5, "title"))) == 3 + 8 * 6 + 35


def test_curves_show_every_logged_loss():
    rows = [{"epoch": "0", "step": f"{n}", "train/step_loss": f"{n}"} for n in range(40)]
    rows.append({"epoch": "", "step": "39", "lr": "0.1"})
    rows.append({"epoch": "0", "step": "39", "train/loss": "3", "train/accuracy": "0.5", "val/accuracy": "0.6"})
    loss, accuracy, _ = charts.curves(rows, "one epoch").axes
    assert [len(line.get_xdata()) for line in loss.lines] == [40, 40]
    assert loss.lines[0].get_xdata()[-1] == 1
    assert loss.lines[1].get_ydata()[20] == 20  # the mean of 18 to 22
    assert accuracy.get_xlim() == (0, 1.5)
    assert charts.throughput(rows, "one epoch") is None
