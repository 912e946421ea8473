"""That the GPU check finds what it looks for, and a dry run of it on the emulator."""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from itertools import count
from pathlib import Path

import pytest
import torch

from alexnet_cuda import ops, reference

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import common
import gpu_check
import parity
import parity_checks
from parity_cases import Case, small

ROOT = Path(__file__).parents[1]


def test_parity_finds_a_wrong_result(tmp_path, monkeypatch):
    def last_column_missing(*args, **kwargs):
        y = reference.max_pool2d(*args, **kwargs)
        return y * (torch.arange(y.shape[-1]) < y.shape[-1] - 1).to(y)

    arguments = ["--device", "cpu", "--tiny", "--ops", "max_pool2d", "--output", str(tmp_path / "checks.jsonl")]
    assert parity.main(arguments) == 0
    monkeypatch.setattr(ops, "max_pool2d", last_column_missing)
    assert parity.main(arguments) == 1


def test_parity_goes_on_after_a_check_without_memory(tmp_path, monkeypatch):
    def first_time(self, *args, inputs=Case.inputs):
        if (self.shape, *args[:2]) not in seen:
            seen.add((self.shape, *args[:2]))
            raise torch.OutOfMemoryError("full")
        return inputs(self, *args)

    seen = set()
    monkeypatch.setattr(Case, "inputs", first_time)
    lines = tmp_path / "parity.jsonl"
    arguments = ["--device", "cpu", "--tiny", "--ops", "max_pool2d", "--output", str(lines)]
    assert parity.main(arguments) == common.INCOMPLETE
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    lacking = [r for r in records if r["ok"] is None]
    assert 0 < len(lacking) < len(records)
    assert {r["message"] for r in lacking} == {"could not run: full"}
    assert len(gpu_check.failures(tmp_path)) == len(lacking)


def test_parity_looks_at_inference(monkeypatch):
    def wrong_where_nothing_is_saved(x, *args, **kwargs):
        return reference.max_pool2d(x, *args, **kwargs) + (not torch.is_grad_enabled())

    _, check = next(parity_checks.match(small("max_pool2d")[0], 2, torch.float32, "cpu", ("contiguous",)))
    check()
    monkeypatch.setattr(ops, "max_pool2d", wrong_where_nothing_is_saved)
    with pytest.raises(AssertionError, match="elements off"):
        check()


def test_parity_finds_what_float64_twins_share(monkeypatch):
    """An operator and its twin with the same mistake."""
    ((_, check),) = parity_checks.stock(small("local_response_norm")[0], torch.float32, "cpu", "contiguous")
    check()
    monkeypatch.setattr(ops, "local_response_norm", lambda x, size, alpha, **k: x / (2 + alpha * x**2) ** 0.75)
    with pytest.raises(AssertionError, match="outputs apart"):
        check()


def test_smoke_says_what_it_covered(capsys):
    assert parity.main(["--device", "cpu", "--smoke", "--time", "0"]) == common.INCOMPLETE
    assert capsys.readouterr().out.startswith("no time left after 0 of ")
    runs = list(parity.smoke_runs("cpu"))
    assert len(runs) == len({(str(case), case.op, *rest) for case, *rest in runs})
    assert all(case.args.get("size", 5) == 5 for case, *_ in runs[:60])  # AlexNet's own first
    assert {dtype for _, dtype, *_ in runs} == {torch.float32, torch.float16, torch.bfloat16}


def test_parity_on_a_second_gpu(monkeypatch):
    for gpus in (1, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        names = [name for name, _ in parity_checks.checks("max_pool2d", "cuda", tiny=True) if " on cuda:1 " in name]
        assert len(names) == 4 * (gpus - 1)
    ((_, check),) = parity_checks.second(small("max_pool2d")[0], torch.float32, "cpu", "channels_last", "cpu")
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
        assert set(block[name].command) & set(gpu_check.OPS) == {"conv2d_relu_lrn_max_pool2d"}
    compiled = [op for name in ("ops compile", "more ops compile") for op in block[name].command if op in gpu_check.OPS]
    assert sorted(compiled) == sorted(gpu_check.OPS)
    assert [len(group) for group in groups if "parity large" in [b.name for b in group]] == [1]
    assert len(gpu_check.OPS) * int(block["parity conv2d"].environment["OMP_NUM_THREADS"]) <= max(5, os.cpu_count())
    for b in block.values():
        if "--time" in b.command:  # they end by themselves
            assert float(b.command[b.command.index("--time") + 1]) + 10 <= b.limit
        elif b.command:
            assert b.name.startswith("tests ")


def test_without_compute_sanitizer(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "sanitizer", lambda tool: [])
    (block,) = (b for group in gpu_check.blocks(tmp_path, dry_run=False) for b in group if b.name == "racecheck")
    outcome = gpu_check.run(block, tmp_path, end=1e9)
    assert (outcome.result, outcome.message) == ("skipped", "no compute-sanitizer")


def test_dry_run_of_the_gpu_check(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "benchmarks" / "gpu_check.py", "--dry-run", "--output", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = [json.loads(line) for line in (out / "blocks.jsonl").read_text().splitlines()]
    emulated = ["parity emulator"] if importlib.util.find_spec("alexnet_cuda._emulated") else []
    assert [o["name"] for o in outcomes] == [
        "environment", *emulated, "parity", "parity large", "tests", "kernels", "ops", "more model"
    ]  # fmt: skip
    assert {o["result"] for o in outcomes} == {"ok"}
    assert json.loads((out / "cpu-ops.json").read_text())["complete"]
    with tarfile.open(tmp_path / "out.tar.gz") as archive:
        assert {"./blocks.jsonl", "./more/cpu-model.json", "./parity-large.jsonl"} <= set(archive.getnames())
