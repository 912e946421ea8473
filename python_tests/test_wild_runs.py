"""Commands on data and run folders as people have them: nothing is lost, and every failure is one sentence."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from training_helpers import ROOT, cli, no_report  # noqa: F401
from typer.testing import CliRunner

from alexnet_cuda.cli import app
from alexnet_cuda.cli._app import Commands
from alexnet_cuda.data import cifar10
from alexnet_cuda.errors import DataError, sentence
from alexnet_cuda.recipe import load_recipe


def write(folder, count, colour):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (18, 16), (colour, 10 * i, 7)).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for colour, name in ((20, b"caf\xe9"), (90, b"dog"), (200, b"eel")):
        write(root / os.fsdecode(name), 12, colour)
    return root


SMALL = ["--variant", "cifar", "--max-steps", 1, "--batch-size", 4, "--workers", 0, "--accelerator", "cpu"]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory, no_report):  # noqa: F811
    folder = tmp_path_factory.mktemp("runs") / "run"
    output = cli("train", "folder", "--data-path", data, "--output", folder, *SMALL)
    assert "caf\\xe9" in output
    return folder


def test_predict_answers_for_the_pictures_that_can_be_read(run, data, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"x")
    pictures = [tmp_path / "bad.png", data / "dog" / "1.png", tmp_path / "absent.png"]
    answers = json.loads(cli("predict", *pictures, "--run", run, "--json", code=1))
    assert ["top" in answer for answer in answers] == [False, True, False]
    assert "bad.png cannot be read as an image: not an image" in answers[0]["error"]
    output = cli("predict", *pictures, "--run", run, code=1)
    assert "1.png" in output
    assert "1 picture: one colour all over" in output
    assert "absent.png does not exist" in output
    assert output.count("error:") == 1


def test_evaluate_tests_all_new_pictures_and_the_same_split_of_its_own(run, data, tmp_path):
    write(tmp_path / "test" / "dog", 7, 91)
    for path in (tmp_path, tmp_path / "test"):
        assert "on 7 test images" in cli("evaluate", "--run", run, "--data-path", path)
    own = json.loads((run / "metrics.json").read_text())
    assert f"on {own['images']['test']} test images" in cli("evaluate", "--run", run, "--data-path", data)
    shutil.copytree(data, tmp_path / "moved")
    output = cli("evaluate", "--run", run, "--data-path", tmp_path / "moved")
    assert "on 36 test images" in output
    assert "also any that the network learned from" in output


def test_overwrite_keeps_the_old_run_until_the_new_one_stands(run, data, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    values = ["train", "folder", "--data-path", data, "--output", copy, "--overwrite", *SMALL]
    for wrong, code in ((["--devices", 9999], 2), (["--weights", tmp_path / "absent"], 1)):
        cli(*values, *wrong, code=code)
        assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    (copy / "config.yaml").rename(copy / ".replaced-config.yaml")  # as a kill leaves it, before a first checkpoint
    (copy / "checkpoints").rename(copy / ".replaced-checkpoints")
    torch.save({"other": torch.zeros(3)}, tmp_path / "other.pt")
    cli(*values, "--weights", tmp_path / "other.pt", code=2)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    cli(*values, "--seed", 5)
    assert (copy / "checkpoints" / "last.ckpt").read_bytes() != before[copy / "checkpoints" / "last.ckpt"]
    assert not list(copy.glob(".*"))


def test_nothing_of_a_replaced_run_is_left_beside_a_new_one_that_was_stopped(run, data, tmp_path, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "copy")
    assert {"weights.safetensors", "metrics.json"} <= {path.name for path in copy.iterdir()}
    (copy / "per_class.csv").write_text("class,f1\n")
    callback = "alexnet_cuda.training.callbacks.StopAndCheckpoint.on_validation_epoch_start"
    monkeypatch.setattr(callback, lambda *_: os.kill(os.getpid(), signal.SIGINT), raising=False)
    values = ["--data-path", data, "--limit", 3, "--epochs", 1, *SMALL, "--max-steps", 0]
    cli("train", "folder", "--output", copy, "--overwrite", *values, code=130)
    assert not [path for path in copy.iterdir() if path.suffix in (".safetensors", ".json") or "class" in path.name]


@pytest.mark.usefixtures("no_report")
def test_a_run_goes_on_without_the_weights_that_it_started_from(run, data, tmp_path):
    start = shutil.copytree(run, tmp_path / "start")
    values = ["--data-path", data, "--weights", start, *SMALL]
    cli("train", "folder", "--output", tmp_path / "run", *values)
    shutil.rmtree(start)
    cli("train", "--resume", tmp_path / "run", "--max-steps", 2)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 2


@pytest.mark.usefixtures("no_report")
def test_ctrl_c_in_the_last_epoch_stops_before_the_end(data, tmp_path, monkeypatch):
    callback = "alexnet_cuda.training.callbacks.StopAndCheckpoint.on_validation_epoch_start"
    monkeypatch.setattr(callback, lambda *_: os.kill(os.getpid(), signal.SIGINT), raising=False)
    values = ["--data-path", data, "--limit", 3, "--epochs", 1, *SMALL, "--max-steps", 0]
    cli("train", "folder", "--output", tmp_path / "run", *values, code=130)
    assert not (tmp_path / "run" / "weights.safetensors").exists()
    monkeypatch.undo()
    cli("train", "--resume", tmp_path / "run")
    assert (tmp_path / "run" / "weights.safetensors").exists()


def test_weights_that_do_not_fit_leave_no_run_folder(data, tmp_path):
    torch.save({"other": torch.zeros(3)}, tmp_path / "w.pt")
    values = ["train", "folder", "--data-path", data, "--weights", tmp_path / "w.pt", "--output", tmp_path / "new"]
    cli(*values, *SMALL, code=2)
    assert not (tmp_path / "new").exists()


def test_foreign_checkpoints_are_not_replaced(data, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine.ckpt").write_text("x")
    values = ["train", "folder", "--data-path", data, "--output", tmp_path, "--overwrite", *SMALL]
    assert "holds checkpoints/ but no run" in cli(*values, code=2)
    assert (tmp_path / "checkpoints" / "mine.ckpt").read_text() == "x"


@pytest.mark.parametrize("keep", [4, 30, -1])
def test_a_cut_configuration_is_not_filled_with_defaults(run, tmp_path, keep):
    copy = shutil.copytree(run, tmp_path / "copy")
    lines = (copy / "config.yaml").read_text().splitlines(keepends=True)
    text = "".join(lines[:keep]) if keep > 0 else "".join(lines)[:-2]
    (copy / "config.yaml").write_text(text)
    assert "config.yaml" in cli("train", "--resume", copy, code=2)
    assert (copy / "config.yaml").read_text() == text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("opt: adamw", "opt: sgd", "opt cannot change in a resumed run"),
        ("batch_size: 4", "batch_size: 3", "batch_size would change in the resumed run"),
        ("lr: ", "rate: ", "config.yaml: unknown key 'rate'"),
        ("lr: ", "lr: fast #", "config.yaml: lr must be float, got 'fast'"),
        ("lr: ", "lr: 1\nlr: ", "config.yaml cannot be read as YAML: it has the key 'lr' twice"),
    ],
)
def test_a_configuration_changed_by_hand_is_no_way_around_the_rules(old, new, message, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace(f"\n{old}", f"\n{new}"))
    output = cli("train", "--resume", copy, "--epochs", 2, code=2)
    assert message in output
    (copy / "config.yaml").unlink()
    assert "config.yaml cannot be read: No such file" in cli("train", "--resume", copy, code=2)


def test_a_run_goes_on_with_its_own_classes_only(run, data, tmp_path):
    other = shutil.copytree(data, tmp_path / "data")
    (other / "dog").rename(other / "fox")
    output = cli("train", "--resume", run, "--data-path", other, code=1)
    assert "only the data has fox, only the run dog" in output


def test_a_best_epoch_that_is_lost_is_one_sentence(run, data, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    cli("train", "--resume", copy, "--max-steps", 0, "--epochs", 1)
    (copy / "weights.safetensors").write_bytes(b"123")
    assert "weights.safetensors, with the best epoch, cannot be read" in cli("train", "--resume", copy, code=1)
    assert "test/accuracy" in cli("train", "--resume", copy, "--monitor", "none", "--allow-changes")


def test_what_cannot_be_written_or_read_is_said_before_the_data_are_read(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "data").mkdir()
    values = ["train", "folder", "--data-path", tmp_path / "data"]
    assert "file is a file" in cli(*values, "--output", tmp_path / "file" / "run", code=1)
    assert "w.pt does not exist" in cli(*values, "--output", tmp_path / "run", "--weights", tmp_path / "w.pt", code=1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.json", "", "metrics.json is damaged (0 bytes, not JSON)"),
        ("metrics.json", "{}", "metrics.json has no 'test/accuracy'"),
        ("per_class.csv", "class,f1\ncat,0.5\ndo", "per_class.csv lists 1 classes, not those of the network"),
    ],
)
def test_damaged_files_of_a_finished_run_are_named(name, content, message, tmp_path):
    for file in ("config.yaml", "metrics.json", "per_class.csv"):
        shutil.copy(ROOT / "docs" / "results" / "cifar10" / file, tmp_path)
    (tmp_path / name).write_text(content)
    assert message in cli("compare", tmp_path, "--output", tmp_path / "page", code=2 if content else 1)


def test_a_picture_that_a_worker_cannot_read_is_one_sentence(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")
    for path in (copy / "dog").iterdir():
        path.write_bytes(b"x")
    values = ["--no-verify", "--val-fraction", 0.1, *SMALL, "--workers", 1, "--epochs", 3, "--max-steps", 50]
    output = cli("train", "folder", "--data-path", copy, "--output", tmp_path / "run", *values, code=1)
    assert output.count("cannot be read as an image: not an image") == 1
    assert "worker process" not in output


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), 1, "--workers 0"),
        (
            RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left (28)"),
            1,
            "--workers 0",
        ),
        (KeyboardInterrupt(), 130, "stopped before the end, by Ctrl-C"),
    ],
)
def test_what_ends_a_command_from_outside_is_a_sentence(monkeypatch, capsys, error, code, message):
    def fails(self, ctx):
        raise error

    monkeypatch.setattr("typer.core.TyperGroup.invoke", fails)
    with pytest.raises(typer.Exit) as ended:
        Commands().invoke(None)
    assert ended.value.exit_code == code
    assert message in capsys.readouterr().err


SWALLOWS = """
import signal
try:
    signal.raise_signal(signal.SIGINT)
except BaseException:
    pass
"""


@pytest.mark.parametrize("module", ["typer", "torchvision"])
def test_ctrl_c_during_an_import_is_one_line_even_where_it_gets_lost(tmp_path, module):
    (tmp_path / f"{module}.py").write_text(SWALLOWS)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    ended = subprocess.run(
        [sys.executable, "-m", "alexnet_cuda.cli", "train", "digits"], cwd=tmp_path, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": path}, timeout=100,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr == "error: stopped before the end, by Ctrl-C\n"


def test_ctrl_c_while_data_are_read_is_one_line_and_writes_nothing(data, tmp_path, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("alexnet_cuda.data.verify.examine", interrupted)
    for command in (["train", "folder", *SMALL], ["inspect"]):
        output = cli(*command, "--data-path", data, "--output", tmp_path / "out", code=130)
        assert output.strip() == "error: stopped before the end, by Ctrl-C"
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_among_the_pictures_is_refused(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")
    for command, folder in ((["train", "folder", *SMALL], copy / "runs" / "a"), (["inspect"], copy)):
        output = cli(*command, "--data-path", copy, "--output", folder, code=2)
        assert f"lies in the data folder {copy}: name a folder outside with --output" in output
    assert sorted(path.name for path in copy.iterdir()) == sorted(path.name for path in data.iterdir())


def test_the_home_folder_may_be_written_as_a_tilde(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "new" / "dog", 1, 91)
    (tmp_path / "my.yaml").write_text("data_path: ~/new\n")
    for values in (["--data-path=~/new"], ["--config", "~/my.yaml"]):
        assert f"{tmp_path}/new has only the class folder" in cli("inspect", *values, code=1)


def test_the_message_of_a_worker_loses_its_traceback():
    text = "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File\n"
    assert sentence(DataError(f"{text}alexnet_cuda.errors.DataError: a.png is cut\n")) == "a.png is cut"
    assert sentence(DataError("")) == "DataError"


def test_inspect_shows_a_data_set(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")
    (copy / "dog" / "bad.png").write_bytes(b"x")
    (copy / "dog" / "a.heic").write_bytes(b"x")
    Image.fromarray(np.full((4, 40), 9000, np.uint16)).save(copy / "eel" / "deep.png")
    shutil.copy(copy / "dog" / "0.png", copy / "dog" / "again.png")
    values = ["inspect", "--data-path", copy, "--output", tmp_path / "page"]
    found = json.loads(cli(*values, "--json"))
    assert found["classes"] == ["caf\\xe9", "dog", "eel"]
    assert [sum(n) for n in zip(*found["images"].values())] == [12, 13, 13]
    assert found["modes"] == {"RGB": 37, "I;16": 1}
    assert found["sizes"]["largest"] == [18, 16]
    assert len(found["damaged"]) == 1
    notes = "\n".join(found["notes"])
    assert "left out: 1 file with the suffix .heic" in notes
    assert "same content as another file: 1 file in all" in notes
    page = (tmp_path / "page" / "inspect.html").read_text()
    assert page.count("data:image/webp") > 20
    assert "bad.png cannot be read" in page
    output = cli(*values)
    assert "bad.png cannot be read" in output
    assert "mode I;16" in output


def test_inspect_of_a_data_set_without_files(tmp_path):
    output = cli("inspect", "digits", "--output", tmp_path)
    assert "1,259" in output
    assert "32 x 32" in output
    assert "unknown key 'lr'" in " ".join(cli("inspect", "digits", "--lr", 1, code=2).split())


def test_cifar10_is_read_from_its_archive_and_from_folders_below(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        rows = rng.integers(0, 256, (20, 3073), np.uint8)
        rows[:, 0] = np.arange(20) % 10
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
    path = tmp_path / "packed" / "cifar-10-binary.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, "cifar-10-batches-bin")
    read = [load_recipe("cifar10", None, {"data_path": str(root)}) for root in (tmp_path / "a", path, path.parent)]
    expected, *others = [cifar10.load(recipe).train.images for recipe in read]
    assert len(expected) > 80
    assert all(torch.equal(images, expected) for images in others)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="cannot be unpacked as the archive of CIFAR-10"):
        cifar10.load(read[1])
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"holds no data_batch_1\.bin.*cifar-10-binary\.tar\.gz has the archive"):
        cifar10.load(read[1].replace({"data_path": str(tmp_path / "none")}))


def test_devices_are_checked_before_the_data_are_read(tmp_path):
    (tmp_path / "data").mkdir()
    values = ["--data-path", tmp_path / "data", "--output", tmp_path / "run", "--accelerator", "cpu"]
    assert "devices must be at most" in cli("train", "folder", *values, "--devices", 9999, code=2)


def test_a_sweep_shows_the_notes_on_its_data(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data")
    (copy / "dog" / "a.heic").write_bytes(b"x")
    values = ["--no-verify", "--steps", 20, "--max-lr", 1e-5, "--variant", "cifar", "--batch-size", 4, "--workers", 0]
    result = CliRunner().invoke(app, [*map(str, ["lr-find", "folder", "--data-path", copy, "--output", tmp_path / "o"]),
                                      *map(str, values), "--accelerator", "cpu"])  # fmt: skip
    assert "left out: 1 file with the suffix .heic" in result.output
    assert "damaged pictures and duplicates are not looked for" in result.output
