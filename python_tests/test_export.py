"""Exported networks give the same scores: every operator in ONNX Runtime, whole networks there and in torch; and the
command `export`: the files of a run, their metadata, and its errors."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from helpers import assert_close
from network_helpers import narrow_network
from training_helpers import cli, light_network, no_report  # noqa: F401

import alexnet_cuda
from alexnet_cuda import ops, weights
from alexnet_cuda._library import UNAVAILABLE_REASON
from alexnet_cuda.errors import DataError
from alexnet_cuda.formats import export, onnx_translations
from alexnet_cuda.networks import build
from alexnet_cuda.recipe import Recipe
from alexnet_cuda.variants import VARIANTS

PACKAGE = Path(alexnet_cuda.__file__).parent


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


class Call(torch.nn.Module):
    """A function of x and weights that returns a list of results."""

    def __init__(self, function, *weights):
        super().__init__()
        self.function = function
        self.weights = torch.nn.ParameterList(weights)

    def forward(self, x):
        return self.function(x, *self.weights)


def in_onnx(module, x, path):
    """The node types after an export as users do it, and that ONNX Runtime computes the module for two sizes of x."""
    dynamic = ({0: "batch", 2: "height", 3: "width"},)
    torch.onnx.export(
        module.eval(), (x,), path, dynamo=True, verbose=False, opset_version=18, dynamic_shapes=dynamic,
        external_data=False, custom_translation_table=onnx_translations.table(),
    )  # fmt: skip
    onnx.checker.check_model(path, full_check=True)
    runtime = session(path)
    larger = torch.randn(3, x.shape[1], x.shape[2] + 3, x.shape[3] + 2).to(x.dtype)
    for inputs in (x, larger):
        results = runtime.run(None, {runtime.get_inputs()[0].name: inputs.numpy()})
        with torch.no_grad():
            expected = module.double()(inputs.double())
        for y, exact in zip(results, expected, strict=True):
            assert_close(torch.from_numpy(y), exact)
        module.to(x.dtype)
    return export.onnx_nodes(path)


ODD_LRN = [dict(size=5), dict(size=5, divide_alpha=False), dict(size=1), dict(size=17), dict(size=5, groups=2)]
COMPOSED_LRN = [
    dict(size=4), dict(size=4, window="onnx"), dict(size=2, groups=4, divide_alpha=False),
    dict(size=5, across="spatial"), dict(size=4, across="spatial", divide_alpha=False),
    dict(size=2, across="spatial", window="onnx"),
]  # fmt: skip


def test_local_response_norm(kernels, tmp_path):
    def function(x):
        return [ops.local_response_norm(x, alpha=0.5, beta=0.6, k=1.5, **a) for a in (*ODD_LRN, *COMPOSED_LRN)]

    nodes = in_onnx(Call(function), 3 * torch.randn(2, 8, 7, 6), tmp_path / "lrn.onnx")
    assert nodes["LRN"] == len(ODD_LRN)
    assert nodes["AveragePool"] == len(COMPOSED_LRN)


def test_half_precision_keeps_its_sums_in_float32(kernels, tmp_path):
    x = (200 * torch.randn(2, 8, 5, 5)).half()  # the squares exceed the range of half
    nodes = in_onnx(Call(lambda x: [ops.local_response_norm(x, 5, alpha=0.5)]), x, tmp_path / "half.onnx")
    assert set(nodes) == {"Cast", "LRN"}


def test_max_pool2d(kernels, tmp_path):
    windows = [(*window, ceil_mode) for window in ((3, 2, 0), (3, 2, 1), (2, 3, 0)) for ceil_mode in (False, True)]
    module = Call(lambda x: [ops.max_pool2d(x, *window) for window in windows])
    assert in_onnx(module, -1 - torch.rand(2, 3, 8, 7), tmp_path / "pool.onnx")["MaxPool"] == len(windows)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolutions_and_linear_layers(kernels, memory_format, tmp_path):
    def function(x, first, bias, later, square):
        y = ops.conv2d(x, first, bias, 4)
        z = [ops.conv2d(x, first, bias, 4, ceil_mode=True, relu=True), ops.conv2d(x, first, None, 4, 2, True)]
        z += [ops.conv2d(y, later, bias, 1, 1, groups=2), ops.conv2d(y, later, bias, 1, 1, groups=2, relu=True)]
        if y.dtype == torch.float32:  # the operator is used for no other dtype
            linear = torch.ops.alexnet_cuda.linear
            return [*z, linear(y.mean((2, 3)), square, bias, True), linear(y.mean((2, 3)), square, None, False)]
        means = y.mean((2, 3))
        return [*z, F.linear(means, square, bias).relu(), F.linear(means, square)]

    sizes = (32, 3, 11, 11), (32,), (32, 16, 3, 3), (32, 32)
    module = Call(function, *(torch.randn(size) / 9 for size in sizes))
    x = torch.randn(2, 3, 33, 36).contiguous(memory_format=memory_format)
    nodes = in_onnx(module, x, tmp_path / "conv.onnx")
    assert (nodes["Conv"], nodes["Gemm"], nodes["Relu"]) == (4, 2, 3)  # equal nodes are merged


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_blocks_in_every_order(kernels, memory_format, tmp_path):
    def function(x, w, b):
        results = []
        for order in ("relu-lrn-pool", "relu-pool-lrn", "lrn-pool-relu"):
            constants = dict(size=5, alpha=0.5, beta=0.75, k=2.0, order=order, groups=2)
            results.append(ops.conv2d_relu_lrn_max_pool2d(x, w, b, **constants, ceil_mode=True))
            results.append(ops.relu_lrn_max_pool2d(results[-1] - 0.3, **constants, ceil_mode=True))
        return results

    x = torch.randn(2, 3, 60, 61).contiguous(memory_format=memory_format)
    module = Call(function, torch.randn(8, 3, 11, 11) / 9, torch.randn(8))
    nodes = in_onnx(module, x, tmp_path / "block.onnx")
    assert (nodes["Conv"], nodes["LRN"], nodes["MaxPool"], nodes["Relu"]) == (1, 6, 6, 5)  # equal nodes are merged


# Together: all orders, groups, LRN across channels and in the plane, rounding up, unequal padding, average pooling,
# batch normalisation, and the factor of the input.
@pytest.mark.parametrize("name", ["original2012", "caffenet", "torchvision", "keras_mnist", "flowers_bn"])
def test_variants_in_onnx_runtime(name, tmp_path):
    model, recipe = narrow_network(name, 7), Recipe().replace({"variant": name})
    path = tmp_path / "model.onnx"
    export.save_onnx(path, model, recipe, list("abcdefg"))
    x = torch.randn(2, 3, recipe.input_size, recipe.input_size)
    with torch.no_grad():
        expected = model(x)
    (scores,) = session(path).run(["scores"], {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(scores), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    lrns = [spec for spec in model.variant.features if type(spec).__name__ == "LRN"]
    nodes = export.onnx_nodes(path)
    assert nodes["LRN"] == (0 if UNAVAILABLE_REASON["cpu"] else sum(spec.across == "channels" for spec in lrns))
    assert nodes["Conv"] == 5
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_operator_of_every_variant_has_a_translation(name):
    program = export._program(narrow_network(name, 3), Recipe().replace({"variant": name}))
    ours = {node.target for node in program.graph.nodes if "alexnet_cuda" in str(node.target)}
    assert ours <= onnx_translations.table().keys()
    assert ours or name in ("torchvision", "tf_slim") or UNAVAILABLE_REASON["cpu"]


@pytest.mark.parametrize("name", ["cifar", "original2012"])
def test_a_torch_program_needs_torch_alone(name, tmp_path):
    model, recipe, path = narrow_network(name, 3), Recipe().replace({"variant": name}), tmp_path / "model.pt2"
    export.save_torch(path, model, recipe, ["a", "b", "c"])
    x = torch.randn(3, 3, recipe.input_size, recipe.input_size)
    with torch.no_grad():
        safetensors.torch.save_file({"x": x, "y": model(x)}, tmp_path / "pair.safetensors")
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


# ---- the command `export` ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, no_report):  # noqa: F811
    """Digits, a few steps."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    values = ["--max-steps", 3, "--mean", 0.31, "--std", 0.36, "--accelerator", "cpu"]
    cli("train", "digits", *values, "--output", folder)
    return folder


def check_metadata(metadata, run):
    assert json.loads(metadata["classes"])[3] == "3"
    preprocessing = json.loads(metadata["preprocessing"])
    assert [preprocessing[key] for key in ("mean", "size", "channels")] == [[0.31], 32, 1]
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
    network = weights.load_weights(run)[0].eval()
    for batch in (1, 5):
        x = torch.randn(batch, 1, 32, 32)
        (scores,) = session(run / "model.onnx").run(None, {"images": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(scores), network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_a_run_as_safetensors(run, tmp_path, dtype, size):
    output = tmp_path / "small.safetensors"
    values = ("--format", "safetensors", "--dtype", dtype, "--output", output, "--json")
    facts = json.loads(cli("export", "--run", run, *values))
    assert facts["bytes"] == output.stat().st_size == pytest.approx(size * 1_124_250, rel=0.02)
    assert facts["difference"] < {"float32": 1e-9, "float16": 0.01, "bfloat16": 0.1}[dtype]
    with safetensors.safe_open(output, "pt") as file:
        check_metadata(file.metadata(), run)
    network, recipe, classes = weights.load_weights(output)
    assert recipe.data == "digits"
    assert classes[9] == "9"
    original = weights.load_weights(run)[0].state_dict()
    for name, tensor in network.state_dict().items():
        expected = original[name]
        rounded = expected.to(export.DTYPES[dtype]).to(expected.dtype) if expected.is_floating_point() else expected
        assert torch.equal(tensor, rounded), name


@pytest.fixture
def light_run(tmp_path, monkeypatch):
    """The weights file of a network that is exported in no time."""
    monkeypatch.setattr(weights, "build", light_network)
    recipe = Recipe().replace({"variant": "cifar"})
    weights.save_weights(tmp_path / "weights.safetensors", light_network(recipe, 2), recipe, ["a", "b"])
    return tmp_path


def test_a_failed_check_leaves_the_earlier_file(light_run, monkeypatch):
    def refuse(*arguments, **options):
        raise onnx.checker.ValidationError("no good")

    (light_run / "model.onnx").write_text("earlier")
    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(onnx.checker.ValidationError):
        export.save_onnx(light_run / "model.onnx", *weights.load_weights(light_run))
    assert (light_run / "model.onnx").read_text() == "earlier"
    assert sorted(path.name for path in light_run.iterdir()) == ["model.onnx", "weights.safetensors"]


def test_without_onnxruntime_nothing_is_claimed(light_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "onnxruntime is not installed" in cli("export", "--run", light_run)
    assert (light_run / "model.onnx").exists()


def test_a_file_that_differs_is_an_error(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "difference", lambda *arguments: (0.5, 2.0))
    output = tmp_path / "model.safetensors"
    assert "differ by 0.5" in cli("export", "--run", run, "--format", "safetensors", "--output", output, code=1)


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
