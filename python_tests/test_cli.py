"""The commands as a person types them: what they print, what they leave behind, how they refuse."""

import json
import shutil
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits
from training_helpers import cli, run_python

import alexnet_cuda
from alexnet_cuda.recipe import FIELDS, Recipe, load_recipe
from alexnet_cuda.variants import VARIANTS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Digits, two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    output = cli("train", "digits", "--epochs", 2, "--lr=3e-3", "--set", "batch_size=32", "--output", folder)
    assert "test/accuracy" in output
    assert "1,259" in output
    assert f"{folder}/report.html" in output.replace("\n", "")
    return folder


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """Digits as people save them: bright on black, dark on white, large, JPEG."""
    folder, digits = tmp_path_factory.mktemp("drawings"), load_digits()
    pixels = np.round(digits.images / 16 * 255).astype(np.uint8)
    Image.fromarray(pixels[0]).save(folder / "zero.png")
    dark = Image.fromarray(255 - pixels[4]).convert("RGB")
    dark.resize((200, 200), Image.Resampling.BICUBIC).save(folder / "four.jpg")
    (folder / "text.png").write_text("no picture")
    return folder


def test_a_run_learns_and_leaves_everything(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test/accuracy"] > 0.85
    assert (metrics["images"]["test"], metrics["epochs"], metrics["steps"]) == (359, 2, 78)
    assert metrics["versions"]["torch"]
    for name in ("config.yaml", "metrics.csv", "weights.safetensors", "checkpoints/last.ckpt"):
        assert (run / name).stat().st_size > 100, name
    assert list((run / "tensorboard").glob("events*"))
    assert "lr: 0.003\n" in (run / "config.yaml").read_text()
    assert "batch_size: 32\n" in (run / "config.yaml").read_text()


def test_evaluate_finds_the_figures_of_training(run):
    figures = json.loads(cli("evaluate", "--run", run, "--json"))
    metrics = json.loads((run / "metrics.json").read_text())
    assert figures == {key: value for key, value in metrics.items() if key.startswith("test/")}
    assert "test/accuracy" in cli("evaluate", "--run", run)


def test_predict_names_digits_however_they_were_saved(run, drawings):
    answers = json.loads(cli("predict", drawings / "zero.png", drawings / "four.jpg", "--run", run, "--json"))
    assert [a["top"][0]["class"] for a in answers] == ["0", "4"]
    assert all(len(a["top"]) == 5 and 0 <= a["top"][0]["probability"] <= 1 for a in answers)
    table = cli("predict", drawings / "zero.png", "--run", run)
    assert "zero.png" in table
    assert "5." in table


@pytest.mark.parametrize(
    ("name", "message"), [("text.png", "not an image"), ("absent.png", "does not exist"), (".", "is a folder")]
)
def test_predict_refuses_what_is_no_picture(run, drawings, name, message):
    output = cli("predict", drawings / name, "--run", run, code=1)
    assert message in output
    assert "error:" in output


def test_a_folder_that_is_no_run_is_named(run, tmp_path, drawings):
    assert "weights.safetensors does not exist" in cli("evaluate", "--run", tmp_path, code=1)
    (tmp_path / "weights.safetensors").write_bytes((run / "weights.safetensors").read_bytes()[:3000])
    assert "is not a weights file" in cli("predict", drawings / "zero.png", "--run", tmp_path, code=1)
    for recipe in ("a: [", "- a list", "3"):
        metadata = {"recipe": recipe, "classes": "[]"}
        safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors", metadata)
        assert "is not a weights file" in cli("evaluate", "--run", tmp_path, code=1)


def test_a_run_is_replaced_only_when_told(run, tmp_path):
    assert f"--resume {run}" in cli("train", "digits", "--output", run, code=2)
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    cli("train", "digits", "--output", tmp_path, "--overwrite", "--max-steps", 2, "--limit", 60, "--batch-size", 20)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert metrics["weights"] == "last step"
    assert (tmp_path / "report.html").stat().st_mtime > (run / "report.html").stat().st_mtime
    assert metrics["test/accuracy"] < 0.85


def test_pictures_of_a_folder_train_and_predict(tmp_path):
    digits = load_digits()
    for label in (0, 1):
        folder = tmp_path / "data" / f"digit [{label}]"
        folder.mkdir(parents=True)
        for i, image in enumerate(digits.images[digits.target == label][:16]):
            Image.fromarray((image * 15).astype(np.uint8)).save(folder / f"{i}.png")
    values = ["--data-path", tmp_path / "data", "--variant", "cifar", "--epochs", 2, "--workers", 0, "--batch-size", 8]
    output = cli("train", "folder", *values, "--no-flip", "--output", tmp_path / "run")
    assert "digit [0]" in output
    assert "1 : 1" in output
    assert "flip: false" in (tmp_path / "run" / "config.yaml").read_text()
    answer = json.loads(cli("predict", folder / "3.png", "--run", tmp_path / "run", "--json"))
    assert {t["class"] for t in answer[0]["top"]} == {"digit [0]", "digit [1]"}
    assert "expected one folder for each" in cli("train", "folder", "--data-path", folder, code=1)


WRONG_COMMANDS = [
    ("train digit", 2, "unknown recipe 'digit'; did you mean digits?"),
    ("train", 2, "expected a recipe"),
    ("train digits --variant resnet", 2, "unknown variant 'resnet'; choose from paper,"),
    ("train digits --learning-rate 1", 2, "unknown key 'learning_rate'; did you mean lr?"),
    ("train digits --set momentun=1", 2, "unknown key 'momentun'; did you mean momentum?"),
    ("train digits --set momentum", 2, "--set takes key=value"),
    ("train digits --lr fast", 2, "lr must be float, got 'fast'"),
    ("train digits 5", 2, "unexpected argument '5'"),
    ("train digits --config absent.yaml", 2, "absent.yaml cannot be read: No such file"),
    ("train digits --devices two", 2, "devices must be auto, a number or a list"),
    ("train digits --devices 99999", 2, "devices must be at most the number of CPU cores"),
    ("train digits --devices -3", 2, "devices must be at least 1, got -3"),
    ("train mnist", 1, "mnist needs --data-path DIR"),
    ("train mnist", 1, "`alexnet-cuda download mnist` fetches it from ossci-datasets.s3.amazonaws.com/mnist"),
    ("train mnist --data-path absent", 1, "absent does not exist; --data-path must name the data"),
    ("lr-find mnist", 1, "mnist needs --data-path DIR"),
    ("search mnist", 1, "mnist needs --data-path DIR"),
    ("inspect", 1, "folder needs --data-path: a folder of class folders"),
    ("lr-find digits --min-lr 0", 2, "--min-lr must be positive and below --max-lr, got 0 and 1"),
    ("lr-find digits --min-lr 1 --max-lr 0.1", 2, "--min-lr must be positive and below --max-lr, got 1 and 0.1"),
    ("lr-find digits --steps 5", 2, "--steps must be at least 20, got 5"),
    ("lr-find digits --learning 5", 2, "unknown key 'learning'"),
    ("search digits --set val_fraction=0 --set monitor=none", 2, "give --val-fraction 0.1"),
    ("search digits --devices 2 --accelerator cpu", 2, "a search runs on 1 device, got devices 2"),
    ("search digits --lr 1 --weight-decay 0 --label-smoothing 0 --batch-size 8", 2, "nothing is left to search"),
    ("compare cifar --recipe digits --output /dev/null", 1, "nothing can be written to /dev/null"),
    ("compare cifar resnet18 --recipe digits", 2, "unknown variant 'resnet18'; choose from paper,"),
    (
        "compare cifar torchvision/vgg99 --recipe digits",
        2,
        "unknown variant 'torchvision/vgg99'; did you mean torchvision/vgg19?",
    ),
    ("train digits --variant torchvision/alexnet", 2, "torchvision/alexnet takes 3 channels, got channels 1"),
    (
        "train digits --variant torchvision/alexnet --channels 3 --size 32",
        2,
        "torchvision/alexnet does not take images of 32x32 pixels, a larger --size may do: ",
    ),
    ("compare cifar --recipe digit", 2, "unknown recipe 'digit'; did you mean digits?"),
    ("compare cifar --recipe digits --momentun 1", 2, "unknown key 'momentun'"),
    ("compare cifar --recipe digits --variant paper", 2, "name the models instead"),
    ("compare cifar --recipe digits --devices 2", 2, "a comparison runs on 1 device, got devices 2"),
    (
        "compare cifar --recipe digits --size 64",
        2,
        "size 64 is for torchvision/NAME, torchvision and cifar_deep, not cifar",
    ),
    ("evalute", 2, "No such command 'evalute'. Did you mean 'evaluate'?"),
    ("compare cifar", 2, "cifar is no run folder"),
    ("compare --recipe digits", 2, "Missing argument 'MODEL"),
    ("compare cifar --recipe mnist", 1, "mnist needs --data-path"),
    ("export --variant vgg", 2, "unknown variant 'vgg'"),
    ("export --variant cifar --run digits", 2, "either --run or --variant"),
    ("export --run digits --classes 3", 2, "--classes 3 needs --variant"),
    ("export --run absent", 1, "absent does not exist"),
    ("export", 1, "no finished run in runs/"),
    ("export --variant cifar --output net.pb", 2, "--output must end in .onnx"),
    ("export --variant cifar --dtype float16", 2, "--dtype float16 needs --format safetensors"),
    ("export --variant cifar --output /dev/null/a.onnx", 1, "written to /dev/null: /dev/null is a file"),
    ("draw vgg", 2, "unknown variant 'vgg'; choose from paper,"),
    ("draw cifar --output net.jpg", 2, "must end in .svg, .pdf or .png, got 'net.jpg'"),
    ("draw cifar --output svg", 2, "must end in .svg, .pdf or .png, got 'svg'"),
    ("draw cifar --classes 0", 2, "'--classes'"),
    ("draw cifar --theme sepia", 2, "unknown theme 'sepia'; choose from light, dark"),
    ("--versio", 2, "unknown option '--versio'; did you mean --version?"),
    ("download mnits", 2, "unknown dataset 'mnits'; did you mean mnist?"),
    ("download mnist --data-pth data", 2, "unknown option '--data-pth'; did you mean --data-path?"),
]


@pytest.mark.parametrize(("command", "code", "message"), WRONG_COMMANDS)
def test_what_cannot_be_is_one_sentence_and_leaves_nothing(command, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = " ".join(cli(*command.split(), code=code).split())
    assert message in output
    assert output.count("error:") == 1
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there_is_told_before_data_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = cli("train", "digits", "--accelerator", "gpu", "--output", tmp_path / "run", code=2)
    assert output.strip() == "error: accelerator gpu needs a GPU, and torch finds none"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("library", "command", "extra"),
    [
        ("lightning", "train digits", "train"),
        ("onnxscript", "export --variant cifar", "export"),
        ("gradio", "demo --run digits", "demo"),
    ],
)
def test_a_missing_library_names_the_extra(library, command, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    assert f"pip install 'alexnet_cuda[{extra}]'" in cli(*command.split(), code=1)


def test_a_torchvision_of_another_torch_names_the_pair(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "torchvision")
    output = cli("predict", "x.png", code=1)
    assert "torchvision::nms does not exist" in output
    assert "pip install --force-reinstall torch torchvision" in output


@pytest.mark.parametrize("name", VARIANTS)
def test_summary_shows_the_layers_and_their_parameters(name):
    output = cli("summary", name)
    assert f"{VARIANTS[name].parameters:,}" in output
    assert "Linear" in output


def test_lists():
    assert "keras_mnist" in cli("summary")
    assert "21,622,154" in cli("summary")
    assert "choose from paper," in " ".join(cli("summary", "vgg", code=2).split())
    assert "fashion-mnist" in cli("recipes")
    assert "lr: 0.0" in cli("recipes", "mnist")
    assert "CPU kernels" in cli("info")
    assert {"torch", "kernels on cpu"} <= json.loads(cli("info", "--json")).keys()


@pytest.mark.parametrize("command", ["train", "lr-find", "search", "compare"])
def test_help_explains_every_value_of_a_recipe(command):
    words = cli(command, "--help").replace("│", " ").split()
    assert {f"--{key.replace('_', '-')}" for key in FIELDS} <= set(words)
    assert {"cosine|linear|step|plateau|constant", "true|false", "(0.01", "KEY=VALUE"} <= set(words)


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("train --help", "--max-steps"),
        ("--version", alexnet_cuda.__version__),
        ("train digits --lrr 1", "did you mean lr"),
        ("train mnist", "mnist needs --data-path DIR"),
        ("demo --run absent", "absent does not exist; expected the folder of a finished run"),
    ],
)
def test_help_and_wrong_options_wait_for_no_torch(command, answer):
    start = "from alexnet_cuda_cli import main; main()"  # as the console script does
    result = run_python("-X", "importtime", "-c", start, *command.split(), timeout=200)
    assert answer in result.stdout + result.stderr
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "alexnet_cuda.recipe" in loaded
    assert not {"torch", "numpy", "lightning", "torchvision", "matplotlib", "sklearn"} & loaded


def test_recipes_explains_each_value_and_is_yaml():
    output = cli("recipes", "mnist")
    assert "# Learning rate at its peak." in output
    assert Recipe().replace(yaml.safe_load(output)) == load_recipe("mnist")
