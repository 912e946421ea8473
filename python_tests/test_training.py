"""Runs: the same weights after any interruption, whole checkpoints on a full disk, and a clear word on failure."""

import csv
import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("lightning")
pytest.importorskip("sklearn")

import torch
from typer.testing import CliRunner

from alexnet_cuda.cli import app
from alexnet_cuda.training import Recipe, RecipeError, classifier, list_recipes, load_recipe
from alexnet_cuda.training.callbacks import AtomicCheckpointIO
from alexnet_cuda.training.run import read_checkpoint

ROOT = Path(__file__).parents[1]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
# 5 batches an epoch; dropout and augmentation stay on.
SMALL = ["--limit", "80", "--batch-size", "16", "--epochs", "3", "--accelerator", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine take longer than one alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def state(folder):
    checkpoint = read_checkpoint(folder / "checkpoints" / "last.ckpt")
    moments = [v for group in checkpoint["optimizer_states"][0]["state"].values() for v in group.values()]
    return checkpoint["global_step"], [*checkpoint["state_dict"].values(), *moments]


def assert_same_end(folder, whole):
    step, tensors = state(folder)
    expected_step, expected = state(whole)
    assert step == expected_step
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
    assert (
        json.loads((folder / "metrics.json").read_text())["test/loss"]
        == json.loads((whole / "metrics.json").read_text())["test/loss"]
    )
    assert validations(folder) == validations(whole)


def validations(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [(row["step"], row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    result = cli("train", "digits", *SMALL, "--output", folder)
    assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize("steps", [7, 10])
def test_a_run_stopped_by_max_steps_resumes_to_the_same_weights(whole, tmp_path, steps):
    folder = tmp_path / "run"
    assert cli("train", "digits", *SMALL, "--output", folder, "--max-steps", steps).exit_code == 0
    assert state(folder)[0] == steps
    assert json.loads((folder / "metrics.json").read_text())["seconds"] > 0
    result = cli("train", "--resume", folder, "--max-steps", 0)
    assert result.exit_code == 0, result.output
    assert_same_end(folder, whole)


def test_ctrl_c_saves_says_how_to_resume_and_loses_nothing(whole, tmp_path, monkeypatch):
    folder, step = tmp_path / "run", classifier.Classifier.training_step

    def interrupted(self, batch, index):
        if self.global_step == 8:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, index)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(classifier.Classifier, "training_step", interrupted)
    result = cli("train", "digits", *SMALL, "--output", folder)
    assert result.exit_code == 130
    assert f"alexnet-cuda train --resume {folder}" in result.output
    assert state(folder)[0] == 9
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    assert cli("train", "digits", "--resume", folder / "checkpoints" / "last.ckpt").exit_code == 0
    assert_same_end(folder, whole)


KILLED_WHILE_WRITING = """
import os, signal, sys
from alexnet_cuda.data import files
from alexnet_cuda.cli import main
replace, count = os.replace, 0
def kill(source, target):
    global count
    count += str(target).endswith(".ckpt")
    if count == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
files.os.replace = kill
main()
"""


def test_a_run_killed_while_it_writes_a_checkpoint_resumes_to_the_same_weights(whole, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, "train", "digits", *SMALL, "--output", str(folder)]
    result = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert state(folder)[0] == 5
    assert list((folder / "checkpoints").glob(".last*"))
    assert cli("train", "--resume", folder).exit_code == 0
    assert_same_end(folder, whole)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_full_disk_ends_the_run_with_a_sentence_and_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    folder, save, saved = tmp_path / "run", AtomicCheckpointIO.save_checkpoint, []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_disk_that_fills_up(self, checkpoint, path, storage_options=None):
        if len(saved) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            save(self, checkpoint, path, storage_options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        saved.append(path)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save_on_a_disk_that_fills_up)
    result = cli("train", "digits", *SMALL, "--output", folder)
    assert result.exit_code == 1
    assert "no space left" in result.output
    assert "Traceback" not in result.output
    assert state(folder)[0] == 5
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_full_disk_at_the_end_leaves_no_half_file(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("alexnet_cuda.data.files.os.fsync", full)
    folder = tmp_path / "run"
    result = cli("train", "digits", *SMALL, "--epochs", "1", "--output", folder)
    assert result.exit_code == 1
    assert "no space left" in result.output
    assert [p.name for p in folder.rglob("*") if p.is_file()] == []


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_step(tmp_path, monkeypatch):
    step, folder = classifier.Classifier.training_step, tmp_path / "run"

    def infinite(self, batch, index):
        return step(self, (batch[0] * float("nan") if self.global_step == 7 else batch[0], batch[1]), index)

    monkeypatch.setattr(classifier.Classifier, "training_step", infinite)
    result = cli("train", "digits", *SMALL, "--output", folder)
    assert result.exit_code == 1
    assert "the loss is nan at step 7 (epoch 2, batch 3)" in result.output
    assert f"the last good checkpoint is {folder}/checkpoints/last.ckpt" in result.output
    assert state(folder)[0] == 5


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path):
    # keras_mnist has no BatchNorm, whose statistics of 4 images are not those of 8.
    values = [
        "train",
        "digits",
        "--variant",
        "keras_mnist",
        "--channels",
        "3",
        "--opt",
        "sgd",
        "--lr",
        "1e-2",
        "--accelerator",
        "cpu",
        "--max-steps",
        "4",
    ]
    values += ["--limit", "40", "--rotate", "0", "--shift", "0", "--zoom", "0", "--dropout", "0"]
    command = [sys.executable, "-m", "alexnet_cuda.cli", *values, "--devices", "2"]
    command += ["--batch-size", "4", "--output", str(tmp_path / "two")]
    result = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    assert cli(*values, "--batch-size", 8, "--output", tmp_path / "one").exit_code == 0
    one, two = (read_checkpoint(tmp_path / n / "checkpoints" / "last.ckpt") for n in ("one", "two"))
    assert one["global_step"] == two["global_step"] == 4
    for name, weight in one["state_dict"].items():
        if name.startswith("model."):
            torch.testing.assert_close(two["state_dict"][name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--lr", "0.1"], "lr would change in the resumed run"),
        (["digits", "--opt", "sgd"], "opt cannot change in a resumed run"),
        (["mnist"], "is a run of 'digits', not of 'mnist'"),
    ],
)
def test_what_a_resumed_run_cannot_change(whole, arguments, message):
    result = cli("train", *arguments, "--resume", whole)
    assert result.exit_code == 2
    assert message in result.output


def test_a_checkpoint_that_is_none_is_named(whole, tmp_path):
    result = cli("train", "--resume", tmp_path)
    assert result.exit_code == 1
    assert "last.ckpt does not exist" in " ".join(result.output.split())
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text((whole / "config.yaml").read_text())
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes((whole / "checkpoints" / "last.ckpt").read_bytes()[:5000])
    result = cli("train", "--resume", tmp_path)
    assert result.exit_code == 1
    assert "is not a checkpoint" in result.output


@pytest.mark.parametrize("name", list_recipes())
def test_recipes_are_whole_and_survive_yaml(name, tmp_path):
    recipe = load_recipe(name)
    (tmp_path / "config.yaml").write_text(recipe.to_yaml())
    assert load_recipe(name, tmp_path / "config.yaml") == recipe


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": "fast"}, "lr must be float, got 'fast'"),
        ({"epochs": "1.5"}, "epochs must be int"),
        ({"epochs": 0}, "epochs must be between 1 and"),
        ({"opt": "adagrad"}, "unknown opt 'adagrad'; choose from sgd, adam, adamw"),
        ({"variant": "vgg"}, "unknown variant 'vgg'; choose from"),
        ({"learning": 1}, "unknown key 'learning'; the keys are .*lr"),
        ({"mean": "0.1,0.2"}, "mean must have 1 or 3 values, got 2"),
        ({"flip": "maybe"}, "flip must be bool"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "leave no image"),
        ({"std": 0}, "std must be positive"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(RecipeError, match=message):
        Recipe().replace(values)


def test_flags_come_before_the_config_file_and_that_before_the_recipe(tmp_path):
    (tmp_path / "my.yaml").write_text("lr: 1e-2\nepochs: 3\n")
    recipe = load_recipe("digits", tmp_path / "my.yaml", {"epochs": "4"})
    assert (recipe.lr, recipe.epochs, recipe.batch_size) == (0.01, 4, load_recipe("digits").batch_size)


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_schedules_rise_first_and_never_pass_the_peak(schedule):
    recipe = Recipe().replace({"schedule": schedule, "warmup": 0.1})
    rates = [classifier.rate(recipe, step, 100) for step in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert 0 < rates[0] < 0.2
    assert max(rates) == 1.0
    assert rates[100] == pytest.approx({"cosine": 0.0, "step": 0.01, "constant": 1.0}[schedule])
