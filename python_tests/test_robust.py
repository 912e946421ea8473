"""Runs killed anywhere, moved, and resumed with other values: the same weights, or a clear sentence."""
# ruff: noqa: F811

import csv
import math
import os
import shutil
import signal

import pytest

pytest.importorskip("lightning")

import torch
from training_helpers import SMALL, assert_same_end, checkpoint, cli, no_report, run_python, whole  # noqa: F401

# Runs the rest of its arguments once for each NAME=FOLDER, in a child of its own (the imports are made only once),
# which kills itself there; prints how each child ended. An epoch has 5 batches.
KILLED = """
import os, signal, sys
from alexnet_cuda import files
from alexnet_cuda.cli import main
from alexnet_cuda.training.classifier import Classifier
import alexnet_cuda.cli.run_recipe

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def at_step(self, batch, index, step=Classifier.training_step):
    return kill() if self.global_step == at else step(self, batch, index)

def in_validation(self, batch, index, step=Classifier.validation_step):
    return kill() if self.global_step == 10 else step(self, batch, index)

def at_second(name, replace=os.replace):
    written = []
    def replace_or_die(source, target):
        written.extend([target] * str(target).endswith(name))
        return kill() if len(written) == 2 else replace(source, target)
    return replace_or_die

count = sys.argv.index("--")
points, arguments = sys.argv[1:count], sys.argv[count + 1:]
for point in points:
    name, folder = point.split("=")
    child = os.fork()
    if child == 0:
        at = {"first epoch": 3, "second epoch": 7}.get(name)
        if at:
            Classifier.training_step = at_step
        elif name == "validation":
            Classifier.validation_step = in_validation
        else:
            files.os.replace = at_second(name.removeprefix("writing "))
        sys.argv = ["alexnet-cuda", *arguments, "--output", folder]
        main()
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# Has state of its own: a moving average, mixed batches, and a rate that falls when the loss no longer does.
STATEFUL = [*SMALL, "--ema", "0.9", "--mixup", "0.2", "--cutmix", "1", "--schedule", "plateau"]
STATEFUL += ["--warmup", "0", "--patience", "1", "--lr", "0.3", "--epochs", "4"]
LATER = ("second epoch", "validation", "writing best.ckpt", "writing last.ckpt")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Runs killed at each point, by its name."""
    folder = tmp_path_factory.mktemp("killed")
    points = [f"{name}={folder / name}" for name in ("first epoch", *LATER)]
    result = run_python("-c", KILLED, *points, "--", "train", *SMALL, timeout=300)
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
    best, expected = (checkpoint(f, "best") for f in (folder, whole))
    assert best["global_step"] == expected["global_step"]
    assert all(torch.equal(a, expected["state_dict"][name]) for name, a in best["state_dict"].items())
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_run_killed_before_its_first_checkpoint_says_that_there_is_nothing_to_resume(killed):
    folder = killed / "first epoch"
    assert "last.ckpt does not exist: nothing to resume" in cli("train", "--resume", folder, code=1)
    assert list((folder / "checkpoints").iterdir()) == []


@pytest.fixture(scope="module")
def stateful(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stateful") / "run"
    cli("train", *STATEFUL, "--output", folder)
    return folder


@pytest.mark.parametrize("steps", [7, 15])
def test_average_mixed_batches_and_plateau_resume_to_the_same_weights(stateful, tmp_path, steps):
    cli("train", *STATEFUL, "--output", tmp_path / "run", "--max-steps", steps)
    cli("train", "--resume", tmp_path / "run", "--max-steps", 0)
    assert_same_end(tmp_path / "run", stateful)
    ends = [checkpoint(f) for f in (tmp_path / "run", stateful)]
    current = [end["current_model_state"] for end in ends]
    assert all(torch.equal(a, current[1][name]) for name, a in current[0].items())
    assert any(not torch.equal(a, ends[1]["state_dict"][name]) for name, a in current[1].items())
    assert ends[0]["lr_schedulers"] == ends[1]["lr_schedulers"]
    assert ends[1]["lr_schedulers"][0]["_last_lr"][0] < 0.3  # a plateau came


def test_a_moved_run_still_knows_its_best_epoch(whole, tmp_path):
    folder = tmp_path / "elsewhere"
    shutil.copytree(whole, folder)
    before = (whole / "checkpoints" / "best.ckpt").read_bytes()
    last = checkpoint(folder)
    key = next(key for key in last["callbacks"] if key.startswith("ModelCheckpoint") and "val/loss" in key)
    best = last["callbacks"][key]
    best["best_model_score"] = torch.tensor(0.0)  # no further epoch can be better
    best["best_k_models"] = dict.fromkeys(best["best_k_models"], torch.tensor(0.0))
    torch.save(last, folder / "checkpoints" / "last.ckpt")
    cli("train", "--resume", folder, "--epochs", 4)
    assert (folder / "checkpoints" / "best.ckpt").read_bytes() == before
    assert (whole / "checkpoints" / "best.ckpt").read_bytes() == before


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


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
    with (copy / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) >= 15]
    key = next(key for key in rows[0] if key.startswith("lr") and not key.endswith(("momentum", "decay")))
    rates = [float(row[key]) for row in rows if row[key]]
    # Of 20 steps, 5 are left of a cosine that has 19 after the warm-up's one.
    assert max(rates) == pytest.approx(0.002 * (1 + math.cos(math.pi * 14 / 19)), rel=0.01)


@pytest.mark.parametrize("change", [["--variant", "owt"], ["--opt", "sgd"], ["--output", "elsewhere"]])
def test_what_no_option_can_change(copy, change):
    output = cli("train", "--resume", copy, *change, "--allow-changes", code=2)
    assert f"{change[0][2:]} cannot change in a resumed run" in output


def test_naming_the_runs_own_folder_and_values_changes_nothing(copy, monkeypatch):
    monkeypatch.chdir(copy.parent)
    cli("train", *SMALL, "--resume", "run", "--output", os.path.join(".", "run"))
