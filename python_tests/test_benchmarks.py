"""The benchmarks' own arithmetic and files, and a dry run of the GPU check; never a speed."""

import importlib.util
import json
import os
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn

from alexnet_cuda import AlexNet, ops, reference

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import bench_model
import bench_ops
import common
import gpu_check
import parity
import runtimes
import tables

ROOT = Path(__file__).parents[1]


def test_readme_shows_the_results():
    assert tables.main(["--check"]) == 0


def results(folder, median=2.0, complete=True):
    """A run of one case with one record of ours and one of eager."""
    machine = {"device": "toy", "kind": "cpu", "threads": 1, "cpu_kernels": "none", "torch": "2", "commit": "0",
               "date": "2012-12-03"}  # fmt: skip
    case = {"case": "pool", "shape": [3, 4, 5], "pass": "training", "dtype": "float32", "batch": 2}
    file = common.Results(folder / "toy.json", "ops", machine, {"copy": 1e9, "gemm": {"float32": 1e12}})
    with file:
        file.add({**case, "form": "ours", "layout": "contiguous", "median_ms": median, "copy_share": 0.5,
                  "saved_bytes": 2**20})  # fmt: skip
        file.add({**case, "form": "eager", "layout": "channels_last", "median_ms": 5.0})
        file.add({**case, "form": "eager", "layout": "contiguous", "error": "no"})
        if not complete:
            raise KeyboardInterrupt
    return folder / "toy.json"


def test_tables(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"head\n{tables.BEGIN}{tables.END}\ntail\n")
    (tmp_path / "docs").mkdir()
    arguments = ["--results", str(tmp_path), "--readme", str(readme)]
    results(tmp_path)
    assert tables.main([*arguments, "--check"]) == 1
    assert tables.main(arguments) == 0
    assert tables.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert "| pool | 2x3x4x5 float32 | training | 2 | 5 | **2.5** | **2.5** | 50% | 1 / - | - / - |" in text
    assert "**CUDA**: not measured" in text
    assert text.startswith("head\n")
    assert text.endswith("\ntail\n")
    assert (tmp_path / "docs" / "measured-toy.svg").exists()
    results(tmp_path, median=1.0)
    assert tables.main([*arguments, "--check"]) == 1


def test_wgmma_has_a_column_and_is_in_no_ratio():
    forms = {"eager": 9, "space-to-depth": 8, "ours graph": 4, "ours": 5, "ours wgmma": 1, "compile default": 6}
    case = {"case": "pool", "shape": [3, 4, 5], "pass": "training", "dtype": "bfloat16", "batch": 2}
    records = [{**case, "form": form, "layout": "contiguous", "median_ms": ms, "peak_bytes": ms * 2**20}
               for form, ms in forms.items()]  # fmt: skip
    header, _, row = tables.table({"records": records})
    assert "| ours, contiguous | ours, wgmma, contiguous | eager, contiguous | torch.compile |" in header
    assert row.startswith("| pool | 2x3x4x5 bfloat16 | training | 4 | 1 | 8 | 6 | **2** | **1.5** |")
    assert row.endswith("| 4 / 9 |")


def test_roofline(tmp_path):
    machine = {"device": "toy", "kind": "cuda"}
    case = {"case": "relu_lrn_max_pool2d", "shape": [96, 55, 55], "pass": "training", "flops": 0, "bytes": 10**9}
    records = [
        {**case, "dtype": dtype, "batch": batch, "form": form, "layout": "contiguous", "median_ms": ms}
        for batch in (1, 256) for dtype in ("float32", "tf32") for form, ms in (("ours", 1), ("eager", 9))
    ]  # fmt: skip
    ceilings = {"copy": 4e12, "gemm": {"float32": 5e13, "tf32": 4e14}}
    result = {"kind": "ops", "machine": machine, "ceilings": ceilings, "records": records}
    assert [(r["batch"], r["dtype"]) for r, _, _ in tables.points(result)] == [(256, "float32"), (256, "tf32")]
    assert tables.operations(records[-1]) == 256 * 96 * (3025 * (28 + 2) + 729 * 9)
    assert tables.operations({**case, "case": "conv2d", "shape": [3, 227, 227], "batch": 2, "flops": 7}) == 7
    (tmp_path / "docs").mkdir()
    tables.draw_roofline("toy", result, tmp_path)
    assert (tmp_path / tables.roofline("toy")).exists()
    assert tables.pictures({"toy": result}) == [tables.picture("toy"), tables.roofline("toy")]


def test_interrupted_results(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        results(tmp_path, complete=False)
    file = tmp_path / "toy.json"
    assert not file.exists()
    with open(common.part(file), "a") as half:
        half.write('{"case": ')
    common.finish(file, complete=False)
    result = json.loads(file.read_text())
    assert not result["complete"]
    assert len(result["records"]) == 3
    assert not common.part(file).exists()


def test_least_work():
    x = 2 * 96 * 55 * 55 * 4
    y = 2 * 96 * 27 * 27 * 4
    assert bench_ops.least_work("local_response_norm", (2, 96, 55, 55), 4, False) == (2 * x, 0)
    assert bench_ops.least_work("local_response_norm", (2, 96, 55, 55), 4, True) == (5 * x, 0)
    assert bench_ops.least_work("max_pool2d", (2, 96, 55, 55), 4, True) == (2 * x + 2 * y + y // 2, 0)
    assert bench_ops.least_work("relu_lrn_max_pool2d", (2, 96, 55, 55), 4, True) == (3 * x + 2 * y + y // 2, 0)
    image, weight, flops = 2 * 3 * 227**2 * 4, 96 * 363 * 4, 2 * 2 * 96 * 3025 * 363
    assert bench_ops.least_work("conv2d", (2, 3, 227, 227), 4, False) == (image + weight + x, flops)
    assert bench_ops.least_work("conv2d", (2, 3, 227, 227), 4, True) == (2 * (image + weight + x), 2 * flops)
    block = bench_ops.least_work("conv2d_relu_lrn_max_pool2d", (2, 3, 227, 227), 4, True)
    assert block == (2 * (image + weight + x + y) + y // 2, 2 * flops)


@pytest.fixture
def as_cuda(monkeypatch):
    """Tensors of the CPU say that they are on CUDA: what would be measured there, as long as nothing runs."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)


@pytest.mark.parametrize("script", [bench_ops, bench_model])
@pytest.mark.parametrize("cuda", [False, True])
def test_forms_whose_memory_is_seen(script, cuda, request):
    if cuda:
        request.getfixturevalue("as_cuda")
    modes = ["default", "max-autotune"]
    if script is bench_ops:
        forms = bench_ops.forms("max_pool2d", torch.randn(1, 3, 9, 9), ["contiguous"], True, modes)
    else:
        forms = bench_model.forms(AlexNet("cifar"), torch.randn(1, 3, 32, 32), ["contiguous"], True, "float32", modes)
    seen = {form.name for form in forms if form.memory}
    assert seen - {"ours compile default"} == {"ours", "eager"} | ({"compile default"} if cuda else set())


@pytest.mark.parametrize("tf32", [False, True])
def test_no_case_has_forms_with_and_without_tf32(as_cuda, tf32):
    forms = list(bench_ops.forms("conv2d", torch.randn(1, 3, 227, 227), ["contiguous"], False, [], tf32))
    assert {form.settings["tf32"] for form in forms} == {tf32}
    assert sorted(form.name for form in forms) == [
        "eager", "eager benchmark", "eager graph", "ours", "ours graph", "space-to-depth", "space-to-depth prepared"
    ]  # fmt: skip


def test_space_to_depth():
    x, conv = torch.randn(1, 3, 227, 227), nn.Conv2d(3, 96, 11, 4)
    y = bench_ops.depth_conv(bench_ops.space_to_depth(x), conv.weight, conv.bias)
    torch.testing.assert_close(y, conv(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["caffenet", "ungrouped", "owt"])
def test_stock(variant):
    model = AlexNet(variant, num_classes=3).eval()
    size = model.variant.input_size
    stock, x = bench_model.stock(model), torch.randn(1, 3, size, size)
    assert not [m for m in stock.features if type(m).__module__.startswith("alexnet_cuda")]
    assert [m for m in model.features if type(m).__module__.startswith("alexnet_cuda")]
    with torch.no_grad():
        torch.testing.assert_close(stock(x), model(x), rtol=1e-3, atol=1e-3)


def test_no_stock_form():
    model = AlexNet("original2012", num_classes=3)
    with pytest.raises(ValueError, match="original2012"):
        bench_model.stock(model)
    forms = bench_model.forms(model, torch.randn(1, 3, 224, 224), ["contiguous"], False, "float32", ["default"])
    assert [form.name for form in forms] == ["ours", "ours compile default"]


SMALL = ["--device", "cpu", "--batch", "1", "--layouts", "contiguous", "--passes", "inference", "--budget", "0.05",
         "--repeats", "3"]  # fmt: skip
OPS, MODEL = (bench_ops, ["--ops", "max_pool2d", "conv2d"]), (bench_model, ["--variants", "cifar"])


@pytest.mark.parametrize(("script", "flags"), [OPS, MODEL], ids=["ops", "model"])
@pytest.mark.parametrize("lacking", ["ours", "eager", "time"])
def test_exit_code_says_whether_ours_was_measured(script, flags, lacking, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("broken")

    broken = {"ours": (ops, "max_pool2d"), "eager": (nn.MaxPool2d, "forward")}
    if lacking in broken:
        monkeypatch.setattr(*broken[lacking], fail)
        monkeypatch.setitem(bench_ops.OPS, "max_pool2d", (("pool",), lambda x: ops.max_pool2d(x)))
    output = ["--time", "0"] * (lacking == "time") + ["--output", str(tmp_path / "x.json")]
    assert script.main([*SMALL, *flags, *output]) == (lacking != "eager")
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["complete"] == (lacking != "time")
    errors, timed = ({r["form"] for r in result["records"] if key in r} for key in ("error", "median_ms"))
    assert errors & {"ours", "eager"} == {lacking} - {"time"}
    assert bool(timed) == (lacking != "time")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_runtimes(runtime):
    pytest.importorskip("onnx")
    pytest.importorskip(runtime)
    net = nn.Sequential(nn.Conv2d(3, 8, 11, 4), nn.ReLU(), nn.LocalResponseNorm(5, 0.1, 0.75, 2.0), nn.MaxPool2d(3, 2),
                        nn.Flatten(), nn.Dropout(), nn.Linear(8 * 3 * 3, 4)).eval()  # fmt: skip
    x = torch.randn(2, 3, 39, 39)
    (y,) = list(runtimes.runtimes(net, x, 2.0)[runtime]()) if runtime == "onnxruntime" else [
        runtimes.runtimes(net, x, 2.0)[runtime]()[0]]  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(y), net(2 * x), rtol=1e-4, atol=1e-4)


def test_memory():
    x = torch.randn(1000, requires_grad=True)
    assert common.saved_bytes(lambda: (x * 2).exp() * x, [x]) == 4000
    assert common.saved_bytes(lambda: (x * 2).exp() * x) == 8000
    assert common.peak_bytes(lambda: x.detach() + 1 + 1, cuda=False) == pytest.approx(8000, abs=100)


def test_parity_finds_a_wrong_result(tmp_path, monkeypatch):
    def last_column_missing(*args, **kwargs):
        y = reference.max_pool2d(*args, **kwargs)
        return y * (torch.arange(y.shape[-1]) < y.shape[-1] - 1).to(y)

    arguments = ["--device", "cpu", "--tiny", "--ops", "max_pool2d", "--output", str(tmp_path / "checks.jsonl")]
    assert parity.main(arguments) == 0
    monkeypatch.setattr(ops, "max_pool2d", last_column_missing)
    assert parity.main(arguments) == 1


def test_parity_goes_on_after_a_check_without_memory(tmp_path, monkeypatch):
    def first_time(self, *args, inputs=parity.Case.inputs):
        if (self.shape, *args[:2]) not in seen:
            seen.add((self.shape, *args[:2]))
            raise torch.OutOfMemoryError("full")
        return inputs(self, *args)

    seen = set()
    monkeypatch.setattr(parity.Case, "inputs", first_time)
    lines = tmp_path / "checks.jsonl"
    assert parity.main(["--device", "cpu", "--tiny", "--ops", "max_pool2d", "--output", str(lines)]) == 0
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert 0 < sum(r.get("message") == "skipped: full" for r in records) < len(records)


def test_parity_on_a_second_gpu(monkeypatch):
    for gpus in (1, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        names = [name for name, _ in parity.checks("max_pool2d", "cuda", tiny=True) if " on cuda:1 " in name]
        assert len(names) == 4 * (gpus - 1)
    ((_, check),) = parity.second(parity.small("max_pool2d")[0], torch.float32, "cpu", "channels_last", "cpu")
    check()
    calls = count()
    monkeypatch.setattr(ops, "max_pool2d", lambda *args, **kwargs: reference.max_pool2d(*args, **kwargs) + next(calls))
    with pytest.raises(AssertionError, match="elements that differ"):
        check()


def test_blocks_of_the_gpu_check(tmp_path):
    groups = gpu_check.blocks(tmp_path, dry_run=False)
    assert 10 + sum(max(b.limit * (not b.optional) for b in group) for group in groups) < gpu_check.TIME
    block = {b.name: b for group in groups for b in group}
    for name in ("parity wgmma", "ops wgmma"):
        assert set(block[name].command) & set(parity.OPS) == {"conv2d_relu_lrn_max_pool2d"}
    assert not set(block["ops compile"].command) & set(parity.OPS)  # which is all of them
    assert " --batch 1 32 --layouts channels_last " in " ".join(block["ops sweep"].command)
    assert not block["ops sweep"].optional
    assert len(parity.OPS) * int(block["parity conv2d"].environment["OMP_NUM_THREADS"]) <= max(5, os.cpu_count())
    timed = [b.name for b in block.values() if b.name.startswith(("ops", "model")) and "--time" in b.command]
    assert not [name for name in timed if block[name].optional]  # they may be stopped, and would fail


def test_dry_run_of_the_gpu_check(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "gpu_check.py", "--dry-run", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = [json.loads(line) for line in (tmp_path / "blocks.jsonl").read_text().splitlines()]
    emulated = ["parity emulator"] if importlib.util.find_spec("alexnet_cuda._emulated") else []
    assert [o["name"] for o in outcomes] == ["environment", "parity", *emulated, "ops", "model", "tests", "kernels"]
    assert json.loads((tmp_path / "cpu-ops.json").read_text())["complete"]
