"""The benchmarks' own arithmetic and files; never a speed."""

import gc
import importlib.util
import json
from itertools import count, product
from types import SimpleNamespace
from unittest.mock import Mock

import bench_model
import bench_ops
import common
import kernelbench
import pytest
import runtimes
import tables
import timing
import torch
import torch.nn.functional as F
from torch import nn

from alexnet_cuda import AlexNet, accelerate, ops

CASE = {"case": "pool", "shape": [3, 4, 5], "pass": "training", "dtype": "float32", "batch": 2}


def test_documents_show_the_results():
    assert tables.main(["--check"]) == 0


def results(folder, median=2.0, complete=True, kind="ops"):
    """A run of one case with one record of ours and one of eager."""
    machine = {"device": "toy", "kind": "cpu", "threads": 1, "cpu_kernels": "none", "torch": "2", "commit": "0",
               "date": "2012-12-03"}  # fmt: skip
    measured = {"median_ms": median, "copy_share": 0.5, "saved_bytes": 2**20}
    with common.Results(folder / f"{kind}.json", kind, machine, {"copy": 1e9, "gemm": {"float32": 1e12}}) as file:
        file.add({**CASE, "form": "ours", "layout": "contiguous", **measured})
        file.add({**CASE, "form": "eager", "layout": "channels_last", "median_ms": 5000.0})
        file.add({**CASE, "form": "eager", "layout": "contiguous", "error": "no"})
        if not complete:
            raise KeyboardInterrupt
    return folder / f"{kind}.json"


def test_tables(tmp_path):
    (tmp_path / "docs").mkdir()
    readme, document = tmp_path / "README.md", tmp_path / "docs" / "benchmarks.md"
    for path in (readme, document):
        path.write_text(f"head\n{tables.BEGIN}{tables.END}\ntail\n")
    arguments = ["--results", str(tmp_path), "--root", str(tmp_path)]
    results(tmp_path)
    results(tmp_path, kind="model")
    assert tables.main([*arguments, "--check"]) == 1
    assert tables.main(arguments) == 0
    assert tables.main([*arguments, "--check"]) == 0
    row = "| pool | 2x3x4x5 float32 | training | 2 | 5,000 | **2.5e+03** | **2.5e+03** | 50% | 1 / - | - / - |"
    assert document.read_text().count(row) == 2
    assert "**CUDA**: not measured" in document.read_text()
    assert "| `pool`, float32 | 2 | toy | training | 2 ms | eager, 5,000 ms | **2500.00** |" in readme.read_text()
    assert readme.read_text().startswith("head\n")
    assert readme.read_text().endswith("\ntail\n")
    assert {path.name for path in (tmp_path / "docs").glob("*.svg")} == {"measured-ops.svg", "measured-model.svg"}
    results(tmp_path, median=1.0)
    assert tables.main([*arguments, "--check"]) == 1


def test_roofline(tmp_path):
    machine = {"device": "toy", "kind": "cuda"}
    case = {"case": "relu_lrn_max_pool2d", "shape": [96, 55, 55], "pass": "training", "flops": 0, "bytes": 10**9}
    records = [
        {**case, "dtype": dtype, "batch": batch, "form": form, "layout": "contiguous", "median_ms": len(form)}
        for batch, dtype, form in product((1, 256), ("float32", "tf32"), ("ours", "eager"))
    ]
    ceilings = {"copy": 4e12, "gemm": {"float32": 5e13, "tf32": 4e14}}
    result = {"kind": "ops", "machine": machine, "ceilings": ceilings, "records": records}
    assert [(r["batch"], r["dtype"]) for r, _, _ in tables.points(result)] == [(256, "float32"), (256, "tf32")]
    assert tables.operations(records[-1]) == 256 * 96 * (3025 * (28 + 2) + 729 * 9)
    assert tables.operations({**case, "case": "conv2d", "shape": [3, 227, 227], "batch": 2, "flops": 7}) == 7
    tables.draw_roofline(result).savefig(tmp_path / "toy.svg")
    assert [path.name for path in tables.pictures("toy", result)] == ["measured-toy.svg", "roofline-toy.svg"]


def test_interrupted_results(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        results(tmp_path, complete=False)
    file = tmp_path / "ops.json"
    assert not file.exists()
    with open(common.part(file), "a") as half:
        half.write('{"case": ')
    common.finish(file, complete=False)
    result = json.loads(file.read_text())
    assert not result["complete"]
    assert len(result["records"]) == 3
    assert not common.part(file).exists()


def test_least_work():
    x, y, shape = 2 * 96 * 55 * 55 * 4, 2 * 96 * 27 * 27 * 4, (2, 96, 55, 55)
    assert bench_ops.least_work("local_response_norm", shape, 4, False) == (2 * x, 0)
    assert bench_ops.least_work("local_response_norm", shape, 4, True) == (5 * x, 0)
    assert bench_ops.least_work("max_pool2d", shape, 4, True) == (2 * x + 2 * y + y // 2, 0)
    assert bench_ops.least_work("relu_lrn_max_pool2d", shape, 4, True) == (3 * x + 2 * y + y // 2, 0)
    image, weight, flops, shape = 2 * 3 * 227**2 * 4, 96 * 363 * 4, 2 * 2 * 96 * 3025 * 363, (2, 3, 227, 227)
    assert bench_ops.least_work("conv2d", shape, 4, False) == (image + weight + x, flops)
    assert bench_ops.least_work("conv2d", shape, 4, True) == (2 * (image + weight + x), 2 * flops)
    block = bench_ops.least_work("conv2d_relu_lrn_max_pool2d", shape, 4, True)
    assert block == (2 * (image + weight + x + y) + y // 2, 2 * flops)


@pytest.mark.parametrize("script", [bench_ops, bench_model])
@pytest.mark.parametrize("cuda", [False, True])
def test_forms(script, cuda, monkeypatch):
    """Which there are and whose memory is seen; tensors that say that they are on CUDA, as long as nothing runs."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", cuda)
    modes = ["default", "max-autotune"]
    if script is bench_ops:
        forms = list(bench_ops.forms("conv2d", torch.randn(1, 3, 227, 227), ["contiguous"], True, modes, tf32=cuda))
        expected = {"ours", "eager", "space-to-depth"} | ({"eager benchmark", "ours deterministic"} if cuda else set())
        assert {form.settings["tf32"] for form in forms} == {cuda}
    else:
        x = torch.randn(1, 3, 32, 32)
        forms = list(bench_model.forms(AlexNet("cifar"), x, ["contiguous"], True, "float32", modes))
        expected = {"ours", "eager"} | ({"ours compile default"} if cuda else set())
    expected |= {"compile default"} if cuda else set()
    assert {form.name for form in forms if form.memory} == expected
    names = {form.name for form in forms}
    assert names >= {"compile default", "compile max-autotune"}
    assert names >= {"ours graph", "eager graph"} or not cuda


@pytest.mark.parametrize("op", bench_ops.OPS)
def test_other_forms_in_bfloat16(op):
    """Peers for the layers that torch does not have in bfloat16 on the CPU."""
    x = torch.randn(1, *bench_ops.shapes(op)[0]).bfloat16()
    forms = {form.name: form for form in bench_ops.forms(op, x, ["contiguous"], False, [])}
    if op == "max_pool2d":
        assert set(forms) == {"ours", "eager"}
        return
    exact = forms["ours"].run().float()
    torch.testing.assert_close(forms["eager autocast"].run().float(), exact, rtol=0.02, atol=0.02)
    assert {tables.family({"form": name}) for name in ("eager autocast", "openvino bfloat16")} < tables.OTHERS
    if importlib.util.find_spec("openvino") and importlib.util.find_spec("onnxscript"):
        assert torch.as_tensor(forms["openvino bfloat16"].run()[0]).shape == exact.shape


def test_space_to_depth():
    x, conv = torch.randn(1, 3, 227, 227), nn.Conv2d(3, 96, 11, 4)
    torch.testing.assert_close(bench_ops.depth_conv(x, conv.weight, conv.bias), conv(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["caffenet", "owt"])
def test_stock(variant):
    model = AlexNet(variant, num_classes=3).eval()
    size = model.variant.input_size
    stock, x = bench_model.stock(model), torch.randn(1, 3, size, size)
    assert not [m for m in stock.features if type(m).__module__.startswith("alexnet_cuda")]
    assert [m for m in model.features if type(m).__module__.startswith("alexnet_cuda")]
    with torch.no_grad():
        torch.testing.assert_close(stock(x), model(x), rtol=1e-3, atol=1e-3)


def test_epilogues(monkeypatch):
    """All convolutions and linear layers before ReLU, cuDNN's by its definition."""
    cudnn = Mock(side_effect=lambda x, weight, bias, *geometry: F.conv2d(x, weight, bias, *geometry).relu())
    product = Mock(side_effect=torch._addmm_activation)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", cudnn)
    monkeypatch.setattr(torch, "_addmm_activation", product)
    model, x = AlexNet("keras_mnist").eval(), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(bench_model.WithEpilogues(model)(x), model(x), rtol=1e-4, atol=1e-4)
    assert (cudnn.call_count, product.call_count) == (3, 2)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    x = torch.randn(1, 3, 32, 32)
    names = {form.name for form in bench_model.forms(AlexNet("cifar"), x, ["contiguous"], False, "float32", [])}
    assert names >= {"ours with epilogues", "ours with epilogues graph"}


def test_no_stock_form():
    model = AlexNet("original2012", num_classes=3)
    with pytest.raises(ValueError, match=r"no form of alexnet_cuda.LocalResponseNorm.*original2012"):
        bench_model.stock(model)
    forms = bench_model.forms(model, torch.randn(1, 3, 224, 224), ["contiguous"], False, "float32", ["default"])
    assert [form.name for form in forms] == ["ours", "ours compile default"]


def test_networks_of_others():
    model, shape = bench_model.network("torchvision/resnet18")
    ours, eager = bench_model.forms(model.eval(), torch.randn(1, *shape), ["contiguous"], False, "float32", [])
    assert (ours.name, eager.name) == ("ours", "eager")
    torch.testing.assert_close(ours.run(), eager.run(), rtol=1e-3, atol=1e-3)
    assert bench_model.flops(model, shape, False) == 3628146688
    assert bench_model.flops(AlexNet("paper"), (3, 227, 227), True) == 3 * 1448813632 - 2 * 96 * 363 * 55**2


SMALL = ["--device", "cpu", "--batch", "1", "--layouts", "contiguous", "--passes", "inference", "--repeats", "3"]
SMALL += ["--budget", "0.05"]
COMMANDS = [(bench_ops, ["--ops", "max_pool2d", "conv2d"]), (bench_model, ["--variants", "cifar"])]


@pytest.mark.parametrize(("script", "flags"), COMMANDS, ids=["ops", "model"])
@pytest.mark.parametrize("lacking", ["ours", "eager", "time"])
def test_exit_code_says_whether_ours_was_measured(script, flags, lacking, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("broken")

    if lacking == "ours" and script is bench_ops:
        monkeypatch.setitem(bench_ops.OPS, "max_pool2d", (("pool",), fail))
    elif lacking == "ours":
        monkeypatch.setattr(bench_model, "flops", lambda *args: 1)
        monkeypatch.setattr(bench_model, "stock", lambda model: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))
        monkeypatch.setattr(AlexNet, "forward", fail)
    elif lacking == "eager":
        monkeypatch.setattr(nn.MaxPool2d, "forward", fail)
    output = ["--time", "0"] * (lacking == "time") + ["--output", str(tmp_path / "x.json")]
    code = {"ours": 1, "eager": 0, "time": common.INCOMPLETE}[lacking]
    assert script.main([*SMALL, *flags, *output]) == code
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["complete"] == (lacking != "time")
    errors, timed = ({r["form"] for r in result["records"] if key in r} for key in ("error", "median_ms"))
    assert errors & {"ours", "eager"} == {lacking} - {"time"}
    assert bool(timed) == (lacking != "time")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_runtimes(runtime):
    pytest.importorskip(runtime)
    net = nn.Sequential(nn.Conv2d(3, 8, 11, 4), nn.ReLU(), nn.LocalResponseNorm(5, 0.1, 0.75, 2.0), nn.MaxPool2d(3, 2),
                        nn.Flatten(), nn.Dropout(), nn.Linear(8 * 3 * 3, 4)).eval()  # fmt: skip
    x = torch.randn(2, 3, 39, 39)
    y = runtimes.runtimes(accelerate(net), x)[runtime]()[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(y), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("calls", "timed"), [(1, False), (2, False), (4, True), (5, True), (100, True)])
def test_a_form_that_fails_keeps_what_was_measured(calls, timed):
    left = count()

    def fails_after():
        if next(left) >= calls:
            raise RuntimeError("broken")

    forms = [timing.Form("ours", "contiguous", fails_after), timing.Form("eager", "", lambda: None)]
    args, file = SimpleNamespace(budget=0.0, repeats=3), common.Results(None, "ops", {}, {})
    records = timing.measure(forms, timing.Timer("cpu"), args, {"copy": 1e9}, {"bytes": 1000}, file)
    ours, eager = sorted(records, key=lambda r: r["form"] == "eager")
    assert ("median_ms" in ours) == timed == ("copy_share" in ours)
    assert ours.get("error") == (None if calls == 100 else "RuntimeError: broken")
    assert "peak_bytes" in eager
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("measured", "wanted", "failed"),
    [("ours", None, False), ("eager", None, True), ("eager", ["eager"], False), ("eager", ["ours", "eager"], True)],
)
def test_a_case_without_our_form_failed_unless_it_was_left_out(measured, wanted, failed):
    results = common.Results(None, "ops", {}, {})
    timing.report("pool", [{"form": measured, "layout": "", "median_ms": 1.0}], results, wanted)
    assert results.failed == (["pool"] if failed else [])


def test_a_dead_device_ends_the_benchmark(monkeypatch):
    def dead(*_):
        raise RuntimeError("dead")

    monkeypatch.setattr(timing.Timer, "synchronize", dead)
    with pytest.raises(RuntimeError, match="dead"):
        timing.Timer("cpu").attempt(timing.Form("ours", "contiguous", dead), dead)


def test_ranges_are_no_kernels():
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    kinds = [(cuda, False), (cuda, True), (cpu, False), (cuda, False)]
    assert timing.device_events([SimpleNamespace(device_type=d, is_user_annotation=r) for d, r in kinds]) == 2


def assert_problem(name):
    """ModelNew has Model's weights and results, from this package's operators."""
    problem = kernelbench.load(name, 1)
    model, ours = kernelbench.models(problem, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ours.parameters(), strict=True))
    with torch.profiler.profile() as profile:
        assert kernelbench.difference(problem, model, ours, "cpu") <= kernelbench.TOLERANCE
    assert any(event.name.startswith("alexnet_cuda::") for event in profile.events())


@pytest.mark.parametrize("name", kernelbench.PROBLEMS)
def test_kernelbench_problems(name, monkeypatch):
    monkeypatch.setattr(kernelbench, "TRIALS", 1)
    assert_problem(name)


@pytest.mark.devices("emulated")
@pytest.mark.parametrize("name", sorted(kernelbench.PROBLEMS.keys() - {"level1_42", "level3_5"}))  # not the large ones
def test_kernelbench_problems_on_the_emulator(name, device, monkeypatch):
    monkeypatch.setattr(kernelbench, "TRIALS", 1)
    assert_problem(name)


@pytest.mark.parametrize(("error", "code"), [(0.0, 0), (3e-4, 1)])
def test_kernelbench_counts_no_wrong_result(error, code, tmp_path, monkeypatch):
    text = kernelbench.PROBLEMS["lrn"].read_text().replace("return fusion", f"return {1 + error} * fusion")
    (tmp_path / "lrn.py").write_text(text)
    monkeypatch.setitem(kernelbench.PROBLEMS, "lrn", tmp_path / "lrn.py")
    monkeypatch.setattr(timing, "measure_ceilings", lambda *_, **__: {"copy": 1e9})
    flags = [
        *SMALL[:4],
        "--problems",
        "lrn",
        "--repeats",
        "3",
        "--budget",
        "0.05",
        "--output",
        str(tmp_path / "x.json"),
    ]
    assert kernelbench.main(flags) == code
    ours = next(r for r in json.loads((tmp_path / "x.json").read_text())["records"] if r["form"] == "ours")
    assert ours["difference"] == pytest.approx(error, rel=0.05, abs=1e-6)
    assert ("mean_ms" in ours) == ("differs from Model" not in ours.get("error", "")) == (not code)


def test_launch(monkeypatch):
    """Every chosen form runs once, and nothing is measured."""
    shapes = []
    monkeypatch.setitem(bench_ops.OPS, "max_pool2d", (("pool",), lambda x: shapes.append(x.shape)))
    monkeypatch.setattr(timing.Timer, "sample", None)
    flags = ["--launch", "--forms", "ours", "--ops", "max_pool2d", "--layouts", "channels_last"]
    assert bench_ops.main([*SMALL, *flags]) == 0
    assert shapes == [(1, *shape) for shape in bench_ops.BLOCKS]


def test_calls():
    x, weight = torch.randn(1, 3, 35, 35), torch.randn(8, 3, 11, 11)
    assert timing.calls(lambda: ops.max_pool2d(ops.conv2d(x, weight)) + 1, cuda=False) == {"operators": 3}
    assert timing.calls(lambda: None, cuda=False) == {"operators": 0}
    names = ["aten::conv2d", "cudaLaunchKernel", "a kernel", "aten::add", "cudaGraphLaunch", "cudaMemcpyAsync"]
    event = lambda name: SimpleNamespace(name=name, cpu_parent=None, is_user_annotation=False,
                                         device_type=torch.autograd.DeviceType(int(name == "a kernel")))  # fmt: skip
    events = [event(name) for name in names]
    events[3].cpu_parent = events[0]
    assert timing.counts(events) == {"operators": 1, "kernels": 1, "launches": 2}


def test_memory():
    x = torch.randn(1000, requires_grad=True)
    assert timing.saved_bytes(lambda: (x * 2).exp() * x, [x]) == 4000
    assert timing.saved_bytes(lambda: (x * 2).exp() * x) == 8000
    assert timing.peak_bytes(lambda: x.detach() + 1 + 1, cuda=False) == pytest.approx(8000, abs=100)
    assert timing.peak_bytes(lambda: ops.max_pool2d(torch.zeros(1, 96, 55, 55)), cuda=False) >= 96 * 27 * 27 * 4
