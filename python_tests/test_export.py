"""Files for other programs say what the network says: every operator and variant in ONNX Runtime, and without us."""

import ast
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("torchvision")
pytest.importorskip("lightning")

import onnx
import onnxruntime
import safetensors.torch
from helpers import assert_close

from alexnet_cuda import cli as commands
from alexnet_cuda import export, ops
from alexnet_cuda._library import WHY_NOT
from alexnet_cuda.data import DataError
from alexnet_cuda.training import Recipe, evaluation
from alexnet_cuda.training.classifier import build
from alexnet_cuda.training.run import read_checkpoint
from alexnet_cuda.variants import VARIANTS

PACKAGE = Path(export.__file__).parent


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def cli(*arguments, code=0):
    result = CliRunner().invoke(
        commands.app, [str(a) for a in arguments], catch_exceptions=False, env={"COLUMNS": "120"}
    )
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as training leaves it, of a network that has seen a few digits."""
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
    evaluation.save_weights(folder / "weights.safetensors", model, recipe, [f"digit {i}" for i in range(10)])
    return folder


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Call(torch.nn.Module):
    def __init__(self, function, *weights):
        super().__init__()
        self.function = function
        self.weights = torch.nn.ParameterList(weights)

    def forward(self, x):
        return self.function(x, *self.weights)


def in_onnx(module, x, path):
    """(result of ONNX Runtime, node types): exported as a user exports a network with our operators."""
    from alexnet_cuda import onnx_translations

    dynamic = ({0: "batch", 2: "height", 3: "width"},)
    torch.onnx.export(
        module.eval(), (x,), path, dynamo=True, verbose=False, opset_version=18, dynamic_shapes=dynamic,
        external_data=False, custom_translation_table=onnx_translations.table(),
    )  # fmt: skip
    onnx.checker.check_model(path, full_check=True)
    runtime = session(path)
    larger = torch.randn(3, x.shape[1], x.shape[2] + 3, x.shape[3] + 2).to(x.dtype)
    for inputs in (x, larger):
        (y,) = runtime.run(None, {runtime.get_inputs()[0].name: inputs.numpy()})
        with torch.no_grad():
            expected = module.double()(inputs.double())
        assert_close(torch.from_numpy(y), expected)
        module.to(x.dtype)
    return {node.op_type for node in onnx.load(path).graph.node}


LRN = {
    "torch's": (dict(size=5), {"LRN"}),
    "the paper's": (dict(size=5, divide_alpha=False), {"LRN"}),
    "one channel": (dict(size=1), {"LRN"}),
    "wider than the channels": (dict(size=17), {"LRN"}),
    "columns": (dict(size=5, groups=2), {"LRN", "Reshape"}),
    "even": (dict(size=4), {"AveragePool"}),
    "even, ONNX's": (dict(size=4, window="onnx"), {"AveragePool"}),
    "even, columns": (dict(size=2, groups=4, divide_alpha=False), {"AveragePool"}),
    "spatial": (dict(size=5, across="spatial"), {"AveragePool"}),
    "spatial, even": (dict(size=4, across="spatial", divide_alpha=False), {"AveragePool"}),
    "spatial, even, ONNX's": (dict(size=2, across="spatial", window="onnx"), {"AveragePool"}),
}


@pytest.mark.parametrize("name", LRN)
def test_local_response_norm(kernels, name, tmp_path):
    arguments, types = LRN[name]
    x = 3 * torch.randn(2, 8, 7, 6)
    found = in_onnx(Call(lambda x: ops.local_response_norm(x, alpha=0.5, beta=0.6, k=1.5, **arguments)), x,
                    tmp_path / "lrn.onnx")  # fmt: skip
    assert types <= found
    assert ("LRN" in found) == ("LRN" in types)


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("window", [(3, 2, 0), (3, 2, 1), (2, 3, 0)])
def test_max_pool2d(kernels, window, ceil_mode, tmp_path):
    module = Call(lambda x: ops.max_pool2d(x, *window, ceil_mode=ceil_mode))
    assert "MaxPool" in in_onnx(module, -1 - torch.rand(2, 3, 8, 7), tmp_path / "pool.onnx")


@pytest.mark.parametrize(("padding", "ceil_mode", "bias"), [(0, False, True), (0, True, True), (2, True, False)])
def test_conv2d(kernels, padding, ceil_mode, bias, tmp_path):
    weights = [torch.randn(5, 3, 11, 11)] + [torch.randn(5)] * bias
    module = Call(lambda x, w, b=None: ops.conv2d(x, w, b, 4, padding, ceil_mode), *weights)
    assert in_onnx(module, torch.randn(2, 3, 33, 36), tmp_path / "conv.onnx") == {"Conv"}


@pytest.mark.parametrize("order", ["relu-lrn-pool", "relu-pool-lrn", "lrn-pool-relu"])
def test_blocks(kernels, order, tmp_path):
    constants = dict(size=5, alpha=0.5, beta=0.75, k=2.0, order=order, groups=2)
    tail = Call(lambda x: ops.relu_lrn_max_pool2d(x, **constants, ceil_mode=True))
    in_onnx(tail, torch.randn(2, 8, 9, 8), tmp_path / "tail.onnx")
    weights = torch.randn(8, 3, 11, 11) / 9, torch.randn(8)
    block = Call(lambda x, w, b: ops.conv2d_relu_lrn_max_pool2d(x, w, b, **constants, ceil_mode=True), *weights)
    assert in_onnx(block, torch.randn(2, 3, 40, 41), tmp_path / "block.onnx") >= {"Conv", "Relu", "LRN", "MaxPool"}


def test_half_precision_keeps_its_sums_in_float32(kernels, tmp_path):
    x = (200 * torch.randn(2, 8, 5, 5)).half()  # its squares are beyond half
    found = in_onnx(Call(lambda x: ops.local_response_norm(x, 5, alpha=0.5)), x, tmp_path / "half.onnx")
    assert found == {"Cast", "LRN"}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_in_onnx_runtime(name, tmp_path):
    recipe = Recipe().replace({"variant": name})
    model = build(recipe, 7)
    with torch.no_grad():  # running statistics and scales as after training, and scores that are not all alike
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.bias.normal_(0, 0.1)
    path = tmp_path / "model.onnx"
    export.save_onnx(path, model, recipe, list("abcdefg"))
    x = torch.randn(2, 3, recipe.input_size, recipe.input_size)
    with torch.no_grad():
        expected = model.eval()(x)
    (scores,) = session(path).run(["scores"], {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(scores), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    lrns = [step for step in VARIANTS[name].features if type(step).__name__ == "LRN"]
    types = export.onnx_nodes(path)
    assert types["LRN"] == (sum(step.across == "channels" for step in lrns) if not WHY_NOT["cpu"] else 0)
    assert types["Conv"] == 5
    assert path.stat().st_size < 2**31
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


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
    assert facts["nodes"]["LRN"] == 2 or WHY_NOT["cpu"]
    assert facts["difference"] < 1e-4 < facts["largest_score"]
    assert facts["opset"] == 18
    model = onnx.load(run / "model.onnx")
    check_metadata({p.key: p.value for p in model.metadata_props}, run)
    assert str(PACKAGE) not in str(model.graph.node)  # no lines of our source
    network, recipe, _ = evaluation.load_weights(run)
    picture = torch.from_numpy(np.linspace(0, 255, 1024).astype(np.uint8).reshape(1, 1, 32, 32))
    x = (picture / 255 - recipe.mean[0]) / recipe.std[0]
    runtime = session(run / "model.onnx")
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
    network, recipe, classes = evaluation.load_weights(output)
    assert recipe.data == "digits"
    assert classes[9] == "digit 9"
    original = evaluation.load_weights(run)[0].state_dict()
    for name, tensor in network.state_dict().items():
        expected = original[name]
        rounded = expected.to(export.DTYPES[dtype]).to(expected.dtype) if expected.is_floating_point() else expected
        assert torch.equal(tensor, rounded), name


@pytest.mark.parametrize("name", ["cifar", "original2012"])
def test_a_torch_program_needs_torch_alone(name, tmp_path):
    recipe = Recipe().replace({"variant": name})
    model, path = build(recipe, 3), tmp_path / "model.pt2"
    export.save_torch(path, model, recipe, ["a", "b", "c"])
    x = torch.randn(3, 3, recipe.input_size, recipe.input_size)
    with torch.no_grad():
        safetensors.torch.save_file({"x": x, "y": model.eval()(x)}, tmp_path / "pair.safetensors")
    code = """
import json, sys, torch, safetensors.torch
extra = {"metadata.json": ""}
program = torch.export.load("model.pt2", extra_files=extra)
pair = safetensors.torch.load_file("pair.safetensors")
torch.set_num_threads(1)
torch.testing.assert_close(program.module()(pair["x"]), pair["y"], rtol=1e-4, atol=1e-5 * pair["y"].abs().max().item())
assert not [name for name in sys.modules if name.startswith("alexnet_cuda")]
print(json.loads(json.loads(extra["metadata.json"])["classes"]))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "['a', 'b', 'c']" in result.stdout
    with zipfile.ZipFile(path) as archive:
        assert not [n for n in archive.namelist() if str(PACKAGE).encode() in archive.read(n)]


def test_a_network_over_two_gibibytes_is_refused(tmp_path):
    with torch.device("meta"):
        model = build(Recipe().replace({"variant": "paper"}), 130_000)
    with pytest.raises(DataError, match=r"huge.onnx would hold 2\.[0-9] GiB"):
        export.save_onnx(tmp_path / "huge.onnx", model, Recipe().replace({"variant": "paper"}), [])
    assert not list(tmp_path.iterdir())


def test_a_failed_check_leaves_the_earlier_file(run, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise onnx.checker.ValidationError("no good")

    (tmp_path / "model.onnx").write_text("earlier")
    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(onnx.checker.ValidationError):
        export.save_onnx(tmp_path / "model.onnx", *evaluation.load_weights(run))
    assert (tmp_path / "model.onnx").read_text() == "earlier"
    assert len(list(tmp_path.iterdir())) == 1


def test_without_onnxruntime_nothing_is_claimed(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "onnxruntime is not installed" in cli("export", "--run", run, "--output", tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").exists()


def test_a_file_that_differs_is_an_error(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "difference", lambda *arguments: (0.5, 2.0))
    assert "differ by 0.5" in cli("export", "--run", run, "--output", tmp_path / "model.onnx", code=1)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--variant", "vgg"], 2, "unknown variant 'vgg'"),
        (["--variant", "cifar", "--run", "absent"], 2, "either --run or --variant"),
        (["--run", "absent", "--classes", "3"], 2, "--classes 3 needs --variant"),
        (["--run", "absent"], 1, "absent does not exist"),
        ([], 1, "no finished run in runs/"),
        (["--variant", "cifar", "--output", "net.pb"], 2, "--output must end in .onnx"),
        (["--variant", "cifar", "--dtype", "float16"], 2, "--dtype float16 needs --format safetensors"),
        (["--variant", "cifar", "--output", "absent/net.onnx"], 1, "No such file or directory"),
    ],
)
def test_what_cannot_be_is_one_sentence(arguments, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in " ".join(cli("export", *arguments, code=code).replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_a_missing_library_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "pip install 'alexnet_cuda[export]'" in cli("export", "--run", run, code=1)


def test_a_variant_is_named_by_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = cli("export", "--variant", "cifar", "--classes", 4)
    assert "cifar.onnx" in output
    assert "batch x 3 x 32 x 32 to batch x 4" in output
    assert "random" in output


def test_the_weights_of_a_run_are_not_written_over(run):
    before = (run / "weights.safetensors").read_bytes()
    message = cli("export", "--run", run, "--format", "safetensors", "--dtype", "float16", "--output",
                  run / "weights.safetensors", code=1)  # fmt: skip
    assert "holds the run's own weights" in message
    assert (run / "weights.safetensors").read_bytes() == before


class Evil:
    """Unpickling it leaves a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "model.ckpt"])
def test_nothing_in_a_file_is_executed(name, kind, tmp_path):
    marker, path = tmp_path / "executed", tmp_path / name
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Evil(marker)))
    else:
        torch.save({"state_dict": Evil(marker), "global_step": 0}, path)
    torch.load(io.BytesIO(path.read_bytes()), weights_only=False) if kind == "torch" else pickle.loads(
        path.read_bytes()
    )
    marker.rmdir()  # it works
    assert "is not a weights file of a run" in cli("export", "--run", path, code=1)
    assert "is not a weights file of a run" in cli("predict", "x.png", "--run", path, code=1)
    with pytest.raises(DataError, match="is not a checkpoint"):
        read_checkpoint(path)
    output = cli("train", "digits", "--weights", path, "--output", tmp_path / "run", code=1)
    assert "is not a file of tensors" in output
    assert not marker.exists()


def test_the_package_unpickles_nothing():
    """Every torch.load says weights_only=True, numpy arrays come without pickles, and no pickle is loaded as it is."""
    loads = 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name, values = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                where = f"{path}:{node.lineno}"
                assert not name.startswith(("pickle.load", "joblib.", "dill.", "cloudpickle.")), where
                if name in ("torch.load", "torch.hub.load_state_dict_from_url"):
                    loads += 1
                    assert values.get("weights_only") == "True", where
                if name in ("np.load", "numpy.load"):
                    assert values.get("allow_pickle") == "False", where
                if name in ("yaml.load", "torch.hub.load"):
                    raise AssertionError(where)
    assert loads >= 2
