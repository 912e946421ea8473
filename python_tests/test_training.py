"""Runs: the same weights after any interruption, whole checkpoints on a full disk, and a clear sentence on failure."""
# ruff: noqa: F811

import errno
import json
import os
import resource
import signal

import pytest

pytest.importorskip("lightning")

import torch
from training_helpers import SMALL, assert_same_end, checkpoint, cli, light_network, no_report, run_python, whole  # noqa: F401

from alexnet_cuda.recipe import Recipe, RecipeError, list_recipes, load_recipe
from alexnet_cuda.training import classifier
from alexnet_cuda.training.callbacks import AtomicCheckpointIO

FILES = ["best.ckpt", "last.ckpt"]


def checkpoints(folder):
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("steps", [7, 10])
def test_a_run_stopped_by_max_steps_resumes_to_the_same_weights(whole, tmp_path, steps):
    folder = tmp_path / "run"
    cli("train", *SMALL, "--output", folder, "--max-steps", steps)
    assert checkpoint(folder)["global_step"] == steps
    assert json.loads((folder / "metrics.json").read_text())["seconds"] > 0
    cli("train", "--resume", folder, "--max-steps", 0)
    assert_same_end(folder, whole)


def test_ctrl_c_saves_says_how_to_resume_and_loses_nothing(whole, tmp_path, monkeypatch):
    folder, train_step = tmp_path / "run", classifier.Classifier.training_step

    def interrupted(self, batch, index):
        if self.global_step == 8:
            signal.raise_signal(signal.SIGINT)
        return train_step(self, batch, index)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(classifier.Classifier, "training_step", interrupted)
    output = cli("train", *SMALL, "--output", folder, code=130)
    assert f"alexnet-cuda train --resume {folder}" in output
    assert checkpoint(folder)["global_step"] == 9
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.setattr(classifier.Classifier, "training_step", train_step)
    cli("train", "digits", "--resume", folder / "checkpoints" / "last.ckpt")
    assert_same_end(folder, whole)


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
    assert "no space left" in cli("train", *SMALL, "--output", folder, code=1)
    assert checkpoint(folder)["global_step"] == 5
    assert checkpoints(folder) == FILES


def test_a_full_disk_at_the_end_leaves_no_half_file(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("alexnet_cuda.files.os.fsync", full)
    folder = tmp_path / "run"
    assert "no space left" in cli("train", *SMALL, "--epochs", "1", "--output", folder, code=1)
    assert [p.name for p in folder.rglob("*") if p.is_file()] == []


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_step(tmp_path, monkeypatch):
    train_step, folder = classifier.Classifier.training_step, tmp_path / "run"

    def infinite(self, batch, index):
        return train_step(self, (batch[0] * float("nan") if self.global_step == 7 else batch[0], batch[1]), index)

    monkeypatch.setattr(classifier.Classifier, "training_step", infinite)
    output = cli("train", *SMALL, "--output", folder, code=1)
    assert "the loss is nan at step 7 (epoch 2, batch 3)" in output
    assert f"the last good checkpoint is {folder}/checkpoints/last.ckpt" in output
    assert checkpoint(folder)["global_step"] == 5


LIGHT = """
import alexnet_cuda.cli.run_recipe
from alexnet_cuda.cli import main
from training_helpers import light_network
alexnet_cuda.training.classifier.build = light_network
alexnet_cuda.cli.run_recipe.write_report = lambda folder, *rest: [folder]
main()
"""


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path, monkeypatch):
    values = ["train", "digits", "--opt", "sgd", "--lr", "1e-2", "--accelerator", "cpu", "--max-steps", "4"]
    values += ["--limit", "40", "--rotate", "0", "--shift", "0", "--zoom", "0"]
    (tmp_path / "light.py").write_text(LIGHT)
    command = [tmp_path / "light.py", *values, "--devices", "2", "--batch-size", "4", "--output", tmp_path / "two"]
    result = run_python(*command, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    monkeypatch.setattr(classifier, "build", light_network)
    cli(*values, "--batch-size", 8, "--output", tmp_path / "one")
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
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
    assert message in cli("train", *arguments, "--resume", whole, code=2)


def test_a_checkpoint_that_is_none_is_named(whole, tmp_path):
    assert "last.ckpt does not exist" in cli("train", "--resume", tmp_path, code=1)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text((whole / "config.yaml").read_text())
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes((whole / "checkpoints" / "last.ckpt").read_bytes()[:5000])
    assert "is not a checkpoint" in cli("train", "--resume", tmp_path, code=1)


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
        ({"val_fraction": 0}, "val_fraction 0 needs monitor none"),
        ({"schedule": "plateau"}, "schedule plateau needs warmup 0"),
        ({"size": 64}, "size 64 is for torchvision/NAME"),
        ({"freeze": "features"}, "freeze features needs weights"),
        ({"variant": "torchvision/no_such_net"}, "unknown variant 'torchvision/no_such_net'"),
        ({"views": 3}, "unknown views 3; choose from 1, 2, 10"),
        ({"erase": 1.5}, "erase must be between 0 and 1"),
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
