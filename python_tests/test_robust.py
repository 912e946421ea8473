"""Runs interrupted anywhere, moved, and resumed with other values: the same weights, or a clear sentence."""

import errno
import json
import math
import os
import resource
import shutil
import signal

import pytest
import torch
from helpers import assert_same_bits
from safetensors.torch import load_file
from training_helpers import checkpoint, cli, light_network, no_report, read_csv, run_python  # noqa: F401

from alexnet_cuda.training.callbacks import AtomicCheckpointIO
from alexnet_cuda.training.classifier import Classifier

# 5 batches an epoch; dropout and augmentation stay on.
SMALL = ["digits", "--limit", "80", "--batch-size", "16", "--epochs", "3", "--accelerator", "cpu"]
SMALL += ["--opt", "adamw", "--lr", "2e-3", "--bias-lr", "1", "--weight-decay", "0.01"]
SMALL += ["--schedule", "cosine", "--warmup", "0.05"]
# Runs a command once for each point, in a child of its own (the imports are made only once), which kills itself there;
# prints how each child ended. Arguments: the folder of the runs, the command.
KILLED = """
import os, signal, sys
from itertools import count
from alexnet_cuda.cli import main
from alexnet_cuda.training.classifier import Classifier
import alexnet_cuda.cli.run_recipe

def at_step(step):
    return lambda self, *_: self.global_step == step

def at_second(name):
    written = count(1)
    return lambda source, target: str(target).endswith(name) and next(written) == 2

points = {
    "first epoch": (Classifier, "training_step", at_step(3)),
    "second epoch": (Classifier, "training_step", at_step(7)),
    "validation": (Classifier, "validation_step", at_step(10)),
    "writing best.ckpt": (os, "replace", at_second("best.ckpt")),
    "writing last.ckpt": (os, "replace", at_second("last.ckpt")),
}
folder, *command = sys.argv[1:]
for point, (owner, name, here) in points.items():
    child = os.fork()
    if child == 0:
        def killed(*arguments, original=getattr(owner, name)):
            return os.kill(os.getpid(), signal.SIGKILL) if here(*arguments) else original(*arguments)
        setattr(owner, name, killed)
        sys.argv = ["alexnet-cuda", *command, "--output", f"{folder}/{point}"]
        main()
    print(point, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# Has state of its own: a moving average, mixed and augmented batches, a whitening first layer, and a rate that falls
# when the loss no longer does.
STATEFUL = [*SMALL, "--ema", "0.9", "--mixup", "0.2", "--cutmix", "1", "--flip", "--erase", "0.5", "--pad", "2"]
STATEFUL += ["--whiten", "--bias-lr", "4", "--schedule", "plateau"]
STATEFUL += ["--warmup", "0", "--patience", "1", "--lr", "0.3", "--epochs", "4"]
LATER = ("second epoch", "validation", "writing best.ckpt", "writing last.ckpt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, no_report):  # noqa: F811
    """A run of SMALL that nothing interrupted; tests must not write to it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    cli("train", *SMALL, "--output", folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def assert_same_end(folder, whole):
    """Both runs have the same weights, optimiser state, test loss and validation losses, bit for bit."""
    ends = []
    for f in (folder, whole):
        last, test_loss = checkpoint(f), json.loads((f / "metrics.json").read_text())["test/loss"]
        rows = read_csv(f / "metrics.csv")
        losses = [(int(row["step"]), float(row["val/loss"])) for row in rows if row["val/loss"]]
        ends.append([last["global_step"], last["state_dict"], last["optimizer_states"][0]["state"], test_loss, losses])
    assert_same_bits(*ends)


def checkpoints(folder):
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def test_ctrl_c_saves_says_how_to_resume_and_loses_nothing(whole, tmp_path, monkeypatch):
    folder, train_step = tmp_path / "run", Classifier.training_step

    def interrupted(self, batch, index):
        if self.global_step == 8:
            signal.raise_signal(signal.SIGINT)
        return train_step(self, batch, index)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Classifier, "training_step", interrupted)
    output = cli("train", *SMALL, "--output", folder, code=130)
    assert f"alexnet-cuda train --resume {folder}" in output
    assert checkpoint(folder)["global_step"] == 9
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.setattr(Classifier, "training_step", train_step)
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
    assert checkpoints(folder) == ["best.ckpt", "last.ckpt"]


def test_a_full_disk_at_the_end_leaves_no_half_file(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("alexnet_cuda.files.os.fsync", full)
    folder = tmp_path / "run"
    assert "no space left" in cli("train", *SMALL, "--epochs", "1", "--output", folder, code=1)
    assert [p.name for p in folder.rglob("*") if p.is_file()] == []


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_step(tmp_path, monkeypatch):
    train_step, folder = Classifier.training_step, tmp_path / "run"

    def infinite(self, batch, index):
        return train_step(self, (batch[0] * float("nan") if self.global_step == 7 else batch[0], batch[1]), index)

    monkeypatch.setattr(Classifier, "training_step", infinite)
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
    values += ["--limit", "40", "--rotate", "0", "--shift", "0", "--zoom", "0", "--no-whiten", "--precision", "32-true"]
    script = tmp_path / "light.py"
    script.write_text(LIGHT)
    two_processes = ["--devices", "2", "--batch-size", "4", "--output", tmp_path / "two"]
    result = run_python(script, *values, *two_processes, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    monkeypatch.setattr("alexnet_cuda.training.classifier.build", light_network)
    cli(*values, "--batch-size", 8, "--output", tmp_path / "one")
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    assert one["global_step"] == two["global_step"] == 4
    for name, weight in one["state_dict"].items():
        if name.startswith("model."):
            torch.testing.assert_close(two["state_dict"][name], weight, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_that_is_none_is_named(whole, tmp_path):
    assert "last.ckpt does not exist" in cli("train", "--resume", tmp_path, code=1)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text((whole / "config.yaml").read_text())
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes((whole / "checkpoints" / "last.ckpt").read_bytes()[:5000])
    assert "is not a checkpoint" in cli("train", "--resume", tmp_path, code=1)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Runs killed at each point, by its name."""
    folder = tmp_path_factory.mktemp("killed")
    result = run_python("-c", KILLED, folder, "train", *SMALL, timeout=300)
    ends = [line.rsplit(" ", 1) for line in result.stdout.splitlines() if line.endswith(f" {-signal.SIGKILL}")]
    assert [name for name, _ in ends] == ["first epoch", *LATER], result.stdout + result.stderr
    return folder


@pytest.mark.parametrize("point", LATER)
def test_a_run_killed_anywhere_resumes_to_the_same_weights(whole, killed, point):
    folder = killed / point
    assert checkpoint(folder)["global_step"] == 5
    half_written = [p.name for p in (folder / "checkpoints").glob(".*")]
    assert len(half_written) == point.startswith("writing")
    cli("train", "--resume", folder)
    assert_same_end(folder, whole)
    assert_same_bits(*(load_file(f / "weights.safetensors") for f in (folder, whole)))
    assert checkpoints(folder) == ["last.ckpt"]


def test_a_run_killed_before_its_first_checkpoint_says_that_there_is_nothing_to_resume(killed):
    folder = killed / "first epoch"
    assert "last.ckpt does not exist: nothing to resume" in cli("train", "--resume", folder, code=1)
    assert checkpoints(folder) == []


@pytest.fixture(scope="module")
def stateful(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stateful") / "run"
    cli("train", *STATEFUL, "--output", folder)
    return folder


@pytest.mark.parametrize("steps", [7, 15])
def test_a_run_stopped_by_max_steps_resumes_with_all_its_state(stateful, tmp_path, steps):
    cli("train", *STATEFUL, "--output", tmp_path / "run", "--max-steps", steps)
    assert checkpoint(tmp_path / "run")["global_step"] == steps
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["seconds"] > 0
    assert 100 < metrics["peak_memory_mib"] < 20_000
    cli("train", "--resume", tmp_path / "run", "--max-steps", 0)
    assert_same_end(tmp_path / "run", stateful)
    ends = [checkpoint(f) for f in (tmp_path / "run", stateful)]
    assert_same_bits(*(end["current_model_state"] for end in ends))
    assert ends[0]["lr_schedulers"] == ends[1]["lr_schedulers"]
    assert any(not torch.equal(a, ends[1]["state_dict"][name]) for name, a in ends[1]["current_model_state"].items())
    assert ends[1]["lr_schedulers"][0]["_last_lr"][0] < 0.3  # a plateau came


def test_a_moved_run_still_knows_its_best_epoch(whole, tmp_path):
    folder = tmp_path / "elsewhere"
    shutil.copytree(whole, folder)
    last = checkpoint(folder)
    key = next(key for key in last["callbacks"] if key.startswith("ModelCheckpoint") and "val/loss" in key)
    best = last["callbacks"][key]
    best["best_model_score"] = torch.tensor(0.0)  # no further epoch can be better
    best["best_k_models"] = dict.fromkeys(best["best_k_models"], torch.tensor(0.0))
    torch.save(last, folder / "checkpoints" / "last.ckpt")
    cli("train", "--resume", folder, "--epochs", 4)
    assert_same_bits(*(load_file(f / "weights.safetensors") for f in (folder, whole)))
    assert json.loads((folder / "metrics.json").read_text())["weights"] == "best epoch by val/loss"
    assert checkpoints(folder) == checkpoints(whole) == ["last.ckpt"]


def test_changed_values_are_shown_and_refused(copy, tmp_path):
    before = (copy / "config.yaml").read_text()
    (tmp_path / "my.yaml").write_text("weight_decay: 0.5\nepochs: 4\n")
    values = ["--config", tmp_path / "my.yaml", "--lr", "0.25", "--rotate", "10.0"]
    output = cli("train", "--resume", copy, *values, code=2)
    rows = [line.split() for line in output.replace("│", " ").splitlines()]
    assert ["lr", "0.002", "0.25"] in rows
    assert ["weight_decay", "0.01", "0.5"] in rows
    assert not any(row and row[0] in ("rotate", "epochs") for row in rows)
    assert "lr, weight_decay would change in the resumed run: --allow-changes" in output
    assert (copy / "config.yaml").read_text() == before


def test_values_that_were_meant_to_change_count_and_are_written_down(copy):
    values = ["--lr", "0.004", "--set", "weight_decay=0.5", "--epochs", 4]
    cli("train", "--resume", copy, *values, "--allow-changes")
    config = (copy / "config.yaml").read_text()
    assert "lr: 0.004\n" in config
    assert "weight_decay: 0.5\n" in config
    groups = checkpoint(copy)["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [group["initial_lr"] for group in groups] == [0.004, 0.004]
    rows = [row for row in read_csv(copy / "metrics.csv") if int(row["step"]) >= 15]
    key = next(key for key in rows[0] if key.startswith("lr") and not key.endswith(("momentum", "decay")))
    rates = [float(row[key]) for row in rows if row[key]]
    # Of 20 steps, 5 are left of a cosine that has 19 after the warm-up's one.
    assert max(rates) == pytest.approx(0.002 * (1 + math.cos(math.pi * 14 / 19)), rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("mnist", "is a run of 'digits', not of 'mnist'"),
        ("--variant owt", "variant cannot change in a resumed run"),
        ("--opt sgd", "opt cannot change in a resumed run"),
        ("--output elsewhere", "output cannot change in a resumed run"),
    ],
)
def test_what_no_option_can_change(whole, change, message):
    assert message in cli("train", *change.split(), "--resume", whole, "--allow-changes", code=2)


def test_naming_the_runs_own_folder_and_values_changes_nothing(copy, monkeypatch):
    monkeypatch.chdir(copy.parent)
    cli("train", *SMALL, "--resume", "run", "--output", os.path.join(".", "run"))
