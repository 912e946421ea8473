"""The command `export`: the files of a run, their metadata, and its errors."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import onnx
import onnxruntime
import safetensors.torch
from training_helpers import cli

import alexnet_cuda
from alexnet_cuda import weights
from alexnet_cuda._library import UNAVAILABLE_REASON
from alexnet_cuda.formats import export
from alexnet_cuda.networks import build
from alexnet_cuda.recipe import Recipe

PACKAGE = Path(alexnet_cuda.__file__).parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as training leaves it, of a network after a few steps."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    recipe = Recipe().replace({"name": "digits", "data": "digits", "variant": "cifar", "channels": 1, "mean": [0.31],
                               "std": [0.36], "output": str(folder)})  # fmt: skip
    model = build(recipe, 10)
    optimiser = torch.optim.SGD(model.parameters(), 0.01)
    images = torch.randn(64, 1, 32, 32)
    for _ in range(3):
        F.cross_entropy(model(images), torch.arange(64) % 10).backward()
        optimiser.step()
    folder.mkdir()
    weights.save_weights(folder / "weights.safetensors", model, recipe, [f"digit {i}" for i in range(10)])
    return folder


def check_metadata(metadata, run):
    assert json.loads(metadata["classes"])[3] == "digit 3"
    preprocessing = json.loads(metadata["preprocessing"])
    assert preprocessing["mean"] == [0.31]
    assert preprocessing["size"] == 32
    assert preprocessing["channels"] == 1
    assert "data: digits" in metadata["recipe"]
    assert not [value for value in metadata.values() if str(run) in value]


def test_a_run_as_onnx(run):
    facts = json.loads(cli("export", "--run", run, "--json"))
    assert facts["file"] == str(run / "model.onnx")
    assert facts["nodes"].get("LRN") == 2 or UNAVAILABLE_REASON["cpu"]
    assert facts["difference"] < 1e-4 < facts["largest_score"]
    assert facts["opset"] == 18
    model = onnx.load(run / "model.onnx")
    check_metadata({p.key: p.value for p in model.metadata_props}, run)
    assert str(PACKAGE) not in str(model.graph.node)  # no lines of our source
    network, recipe, _ = weights.load_weights(run)
    picture = torch.from_numpy(np.linspace(0, 255, 1024).astype(np.uint8).reshape(1, 1, 32, 32))
    x = (picture / 255 - recipe.mean[0]) / recipe.std[0]
    runtime = onnxruntime.InferenceSession(run / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        (scores,) = runtime.run(None, {"images": x.expand(batch, -1, -1, -1).numpy()})
        with torch.no_grad():
            expected = network.eval()(x.expand(batch, -1, -1, -1))
        torch.testing.assert_close(torch.from_numpy(scores), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_a_run_as_safetensors(run, tmp_path, dtype, size):
    output = tmp_path / "small.safetensors"
    facts = json.loads(
        cli("export", "--run", run, "--format", "safetensors", "--dtype", dtype, "--output", output, "--json")
    )
    assert facts["bytes"] == output.stat().st_size == pytest.approx(size * 1_124_250, rel=0.02)
    assert facts["difference"] < {"float32": 1e-9, "float16": 0.01, "bfloat16": 0.1}[dtype]
    with safetensors.safe_open(output, "pt") as file:
        check_metadata(file.metadata(), run)
    network, recipe, classes = weights.load_weights(output)
    assert recipe.data == "digits"
    assert classes[9] == "digit 9"
    original = weights.load_weights(run)[0].state_dict()
    for name, tensor in network.state_dict().items():
        expected = original[name]
        rounded = expected.to(export.DTYPES[dtype]).to(expected.dtype) if expected.is_floating_point() else expected
        assert torch.equal(tensor, rounded), name


def test_a_failed_check_leaves_the_earlier_file(run, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise onnx.checker.ValidationError("no good")

    (tmp_path / "model.onnx").write_text("earlier")
    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(onnx.checker.ValidationError):
        export.save_onnx(tmp_path / "model.onnx", *weights.load_weights(run))
    assert (tmp_path / "model.onnx").read_text() == "earlier"
    assert len(list(tmp_path.iterdir())) == 1


def test_without_onnxruntime_nothing_is_claimed(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "onnxruntime is not installed" in cli("export", "--run", run, "--output", tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").exists()


def test_a_file_that_differs_is_an_error(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "difference", lambda *arguments: (0.5, 2.0))
    output = tmp_path / "model.safetensors"
    assert "differ by 0.5" in cli("export", "--run", run, "--format", "safetensors", "--output", output, code=1)


def test_a_missing_library_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "pip install 'alexnet_cuda[export]'" in cli("export", "--run", run, code=1)


def test_a_variant_is_named_by_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = cli("export", "--variant", "cifar", "--classes", 4, "--format", "safetensors")
    assert "cifar.safetensors" in output
    assert "batch x 3 x 32 x 32 to batch x 4" in output
    assert "random" in output


def test_the_weights_of_a_run_are_not_written_over(run):
    before = (run / "weights.safetensors").read_bytes()
    message = cli("export", "--run", run, "--format", "safetensors", "--dtype", "float16", "--output",
                  run / "weights.safetensors", code=1)  # fmt: skip
    assert "holds the run's own weights" in message
    assert (run / "weights.safetensors").read_bytes() == before
