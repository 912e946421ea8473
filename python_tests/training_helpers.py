"""What the tests of data, training and the command line share. A file that imports an autouse fixture uses it."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from alexnet_cuda.cli import app

ROOT = Path(__file__).parents[1]
# 5 batches an epoch; dropout and augmentation stay on.
SMALL = ["digits", "--limit", "80", "--batch-size", "16", "--epochs", "3", "--accelerator", "cpu"]
_runs: dict[str, Path] = {}


def cli(*arguments, code=0):
    """What a command prints, with --json to stdout alone; it ends with exit code `code` and without a traceback."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False, env={"COLUMNS": "120"})
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stdout if "--json" in arguments else result.output


def run_python(*arguments, timeout):
    """A Python process with one thread, which can import these helpers."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=timeout,
                          cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path})  # fmt: skip


def _one_thread():
    """Threads that wait for each other on a busy machine take longer than one alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


one_thread = pytest.fixture(_one_thread, scope="module", autouse=True)


@pytest.fixture(scope="module", autouse=True)
def no_report():
    """One thread, and no pictures, which take longer than the training of a small run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alexnet_cuda.cli.run_recipe.write_report", lambda folder, *rest: [folder / "report.html"])
        yield from _one_thread()


def light_network(recipe, classes):
    """Takes the place of networks.build where the network does not matter; no BatchNorm, no dropout."""
    size = 64 * recipe.channels
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(size, classes))


def shared_run(tmp_path_factory, name, *arguments):
    """A run folder that all test files of a process share; tests must not write to it."""
    if name not in _runs:
        folder = tmp_path_factory.mktemp("shared") / name
        cli("train", *arguments, "--output", folder)
        _runs[name] = folder
    return _runs[name]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, no_report):
    """A run of SMALL that nothing interrupted."""
    return shared_run(tmp_path_factory, "whole", *SMALL)


def checkpoint(folder, name="last"):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def assert_same_end(folder, whole):
    """Both runs have the same weights, optimiser state, test loss and validation losses, bit for bit."""
    ends = [checkpoint(f) for f in (folder, whole)]
    assert ends[0]["global_step"] == ends[1]["global_step"]
    moments = [[v for s in end["optimizer_states"][0]["state"].values() for v in s.values()] for end in ends]
    tensors = [[*end["state_dict"].values(), *own] for end, own in zip(ends, moments, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))
    losses = [json.loads((f / "metrics.json").read_text())["test/loss"] for f in (folder, whole)]
    assert losses[0] == losses[1]
    assert validations(folder) == validations(whole)


def validations(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [(row["step"], row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
