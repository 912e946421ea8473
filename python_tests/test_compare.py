"""Comparisons: equal settings for all, runs taken over, a failure that stays in its row."""

import json
import re
import signal
import time

import pytest
import torch
import yaml
from PIL import Image
from torchvision.models import get_model_weights
from training_helpers import ROOT, legible_texts, no_report, read_csv  # noqa: F401
from training_helpers import cli as command

from alexnet_cuda.data import load_images
from alexnet_cuda.recipe import Recipe, RecipeError, load_recipe
from alexnet_cuda.reports.comparison import means
from alexnet_cuda.reports.experiments import comparison_chart
from alexnet_cuda.summary import model_summary
from alexnet_cuda.training import classifier, comparison
from alexnet_cuda.words import percent

PEER = "torchvision/shufflenet_v2_x0_5"
SMALL = ["--recipe", "digits", "--max-steps", "2", "--limit", "60", "--accelerator", "cpu", "--workers", "0"]


def cli(*arguments, code=0):
    return " ".join(command("compare", *arguments, code=code).split())


def rows(folder):
    return {row["model"]: row for row in json.loads((folder / "compare.json").read_text())["models"]}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "both"
    output = cli("cifar", PEER, *SMALL, "--size", 32, "--output", folder)
    assert "2 networks on 60 held-out images" in output
    assert "accuracy top-5 params MACs train s img/s" in output
    return folder


def test_the_table_holds_what_the_runs_reached(both):
    found = rows(both)
    assert set(found) == {"cifar", PEER}
    for model, row in found.items():
        metrics = json.loads((both / model.replace("/", "-") / "metrics.json").read_text())
        assert (row["accuracy"], row["top5"]) == (metrics["test/accuracy"], metrics["test/top5"])
        assert (row["parameters"], row["seconds"]) == (metrics["parameters"], metrics["seconds"])
        assert row["images_per_second"] > 1
        assert row["error"] is None
    assert found["cifar"]["macs"] == sum(layer.macs for layer in model_summary("cifar"))
    lines = read_csv(both / "compare.csv")
    assert {line["model"]: int(line["macs"]) for line in lines} == {m: row["macs"] for m, row in found.items()}
    accuracies = [float(line["accuracy"]) for line in lines]
    assert accuracies == sorted(accuracies, reverse=True)
    with Image.open(both / "compare.png") as picture:
        assert picture.width > 1000


def test_finished_runs_on_one_page(tmp_path):
    runs = [ROOT / "docs" / "results" / name for name in ("cifar10-short", "cifar10")]
    assert f"Comparison: {tmp_path}/compare.html" in cli(*runs, "--output", tmp_path)
    found = rows(tmp_path)
    assert list(found) == ["cifar10", "cifar10-short"]  # the most accurate first
    metrics = json.loads((runs[0] / "metrics.json").read_text())
    assert found["cifar10-short"]["accuracy"] == metrics["test/accuracy"]
    assert found["cifar10"]["macs"] == sum(layer.macs for layer in model_summary("cifar_deep"))
    page = (tmp_path / "compare.html").read_text()
    assert page.count("<svg") == 2
    assert all((tmp_path / name).exists() for name in re.findall(r'href="(\w+.png)"', page))
    assert page.count("<a download") == 2
    assert "\N{PLUS-MINUS SIGN}" not in page
    assert percent(metrics["test/accuracy"]) in page
    assert "<td>epochs</td><td>28</td><td>8</td>" in page  # a value that differs
    assert "<td>batch_size</td>" not in page
    assert re.search(r"<td>frog</td><td[^>]*>9\d\.\d %</td>", page)


def test_what_is_no_finished_run_is_named(tmp_path):
    assert "cifar is no run folder; --recipe RECIPE trains" in cli("cifar", code=2)
    assert f"{tmp_path} holds no finished run: config.yaml is missing" in cli(tmp_path, code=2)
    assert "values are for training" in cli(tmp_path, "--epochs", 2, code=2)


def test_several_seeds_are_averaged(tmp_path):
    output = cli("cifar", "cifar:no-bn,tanh", *SMALL, "--seeds", 2, "--output", tmp_path)
    assert "digits: 2 networks on 60 held-out images, 2 seeds" in output
    seeds = {"cifar": 0, "cifar-seed1": 1, "cifar-no-bn-tanh": 0, "cifar-no-bn-tanh-seed1": 1}
    configs = {run: yaml.safe_load((tmp_path / run / "config.yaml").read_text()) for run in seeds}
    assert {run: config["seed"] for run, config in configs.items()} == seeds
    runs = json.loads((tmp_path / "compare.json").read_text())["models"]
    assert sorted((row["model"], row["seed"]) for row in runs) == [
        (model, seed) for model in ("cifar", "cifar:no-bn,tanh") for seed in (0, 1)
    ]
    page = (tmp_path / "compare.html").read_text()
    for row in means(runs):
        one, two = (run["accuracy"] for run in runs if run["model"] == row["model"])
        mean, deviation = (one + two) / 2, abs(one - two) / 2**0.5
        text = f"{100 * mean:.2f} \N{PLUS-MINUS SIGN} {percent(deviation)}"
        assert text in page
        assert text.split()[0] in output


def test_the_settings_are_equal(both):
    one, two = (yaml.safe_load((both / name / "config.yaml").read_text()) for name in ("cifar", PEER.replace("/", "-")))
    assert {key for key in one if one[key] != two[key]} == {"variant", "size", "output"}
    assert one["channels"] == 3
    assert two["size"] == 32


def test_finished_runs_are_taken_over_and_an_open_one_is_gone_on_with(both):
    peer = both / PEER.replace("/", "-")
    before = (both / "cifar" / "metrics.json").stat().st_mtime_ns
    (peer / "metrics.json").unlink()
    output = cli("cifar", PEER, *SMALL, "--size", 32, "--output", both)
    assert f"cifar: the run in {both / 'cifar'} is taken over" in output
    assert f"continued from {peer / 'checkpoints' / 'last.ckpt'}" in output
    assert (both / "cifar" / "metrics.json").stat().st_mtime_ns == before
    assert (peer / "metrics.json").exists()
    assert set(rows(both)) == {"cifar", PEER}


def test_runs_with_other_values_are_not_mixed(both):
    output = cli("cifar", *SMALL, "--channels", 3, "--lr", 1, "--output", both, code=2)
    assert f"{both / 'cifar'} was trained with lr 0.1, not 1.0: give another --output" in output


def test_a_model_that_fails_is_a_row_and_the_others_go_on(tmp_path):
    # Its batch normalisation cannot train on one value per channel.
    output = cli(PEER, "cifar", *SMALL, "--size", 32, "--batch-size", 1, "--output", tmp_path, code=1)
    assert f"{PEER} failed: Expected more than 1 value per channel" in output
    found = rows(tmp_path)
    assert "Expected more than 1 value per channel" in found[PEER]["error"]
    assert found[PEER]["accuracy"] is None
    assert found["cifar"]["accuracy"] is not None
    assert list(found) == ["cifar", PEER]


def test_ctrl_c_ends_a_comparison_that_the_same_command_goes_on_with(tmp_path, monkeypatch):
    step = classifier.Classifier.training_step

    def interrupted(self, batch, index):
        signal.raise_signal(signal.SIGINT)
        return step(self, batch, index)

    monkeypatch.setattr(classifier.Classifier, "training_step", interrupted)
    assert "the same command continues" in cli(
        "cifar", PEER, *SMALL, "--batch-size", 20, "--output", tmp_path, code=130
    )
    assert [path.name for path in tmp_path.iterdir()] == ["cifar"]
    monkeypatch.undo()
    output = cli("cifar", PEER, *SMALL, "--batch-size", 20, "--size", 32, "--output", tmp_path)
    assert "continued from" in output
    assert json.loads((tmp_path / "cifar" / "metrics.json").read_text())["steps"] == 2


def test_models_and_values_may_stand_in_any_order(tmp_path, monkeypatch):
    asked = {}

    def recipes(models, name, config, values, folder, seeds):
        asked.update(models=models, values=values)
        raise RecipeError("enough")

    monkeypatch.setattr(comparison, "comparison_recipes", recipes)
    tokens = ["paper", "--limit", "6", "cifar", "--no-flip", "owt", "--lr=1", "caffe", "--nesterov", "tf_slim"]
    cli(*tokens, "--recipe", "digits", "--val_fraction", "0.2", "--set", "zoom=0", code=2)
    assert asked["models"] == ["paper", "cifar", "owt", "caffe", "tf_slim"]
    values = {"limit": "6", "flip": "false", "lr": "1", "nesterov": "true", "val_fraction": "0.2", "zoom": "0"}
    assert asked["values"] == values


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "vit_b_16"])
def test_multiply_accumulates_are_those_that_torchvision_publishes(name):
    recipe = Recipe().replace({"variant": f"torchvision/{name}"})
    published = get_model_weights(name).IMAGENET1K_V1.meta["_ops"]
    assert comparison.macs(recipe, 1000) / 1e9 == pytest.approx(published, abs=6e-4)


def test_speed_counts_images():
    class Slow(torch.nn.Module):
        def forward(self, x):
            time.sleep(0.02)
            return x.flatten(1)

    recipe = load_recipe("digits", overrides={"limit": 60, "batch_size": 30, "workers": 0})
    speed = comparison.images_per_second(Slow(), recipe, load_images(recipe))
    assert 30 < speed <= 30 / 0.02


def test_the_chart_has_room_for_every_text():
    found = [
        {"model": f"torchvision/a_long_name_{i}", "accuracy": a, "parameters": 10 ** (i + 4), "macs": 10 ** (i + 6),
         "seconds": 12345.6, "images_per_second": 98765.4, "error": None}
        for i, a in enumerate((1.0, 0.5, 0.001))
    ]  # fmt: skip
    figure = comparison_chart([*found, {**dict.fromkeys(found[0]), "model": "cifar"}], "four networks")
    assert len(legible_texts(figure)) == 1 + 4 + 5 + 5 * 4
