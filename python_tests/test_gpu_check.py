"""The plan of the GPU check, and a dry run of it on the CPU and the emulator."""

import json
import os
import subprocess
import sys
import tarfile

import gpu_check
import pytest


def test_blocks_fit_into_the_time(tmp_path):
    groups = gpu_check.blocks(tmp_path, dry_run=False)
    assert 10 + sum(max(b.limit * (not b.optional) for b in group) for group in groups) < gpu_check.TIME
    block = {b.name: b for group in groups for b in group}
    for name in ("check without wgmma", "ops without wgmma"):
        assert block[name].environment == {"ALEXNET_CUDA_WGMMA": "0"}
        assert block[name.removesuffix(" without wgmma")].environment == {}
    compiled = [op for name in ("ops compile", "more ops compile") for op in block[name].command if op in gpu_check.OPS]
    assert sorted(compiled) == sorted(gpu_check.OPS)
    assert [len(group) for group in groups if "tests huge" in [b.name for b in group]] == [1]
    for b in block.values():
        if b.json:  # they end by themselves
            assert float(b.command[b.command.index("--time") + 1]) + 10 <= b.limit


def test_every_operators_tests_run_on_the_gpu(tmp_path):
    tests = [b for group in gpu_check.blocks(tmp_path, dry_run=False) for b in group if b.name.startswith("tests ")]
    assert {b.environment["ALEXNET_CUDA_REQUIRE"] for b in tests} == {"cpu,cuda"}
    files = [path for b in tests for path in b.command if path.endswith(".py")]
    assert all(os.path.exists(path) for path in files)
    assert all(any(path.endswith(f"test_{op}.py") for path in files) for op in gpu_check.OPS)


@pytest.mark.parametrize("tool", ["/bin/compute-sanitizer", None])
def test_compute_sanitizer(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: tool)
    (block,) = (b for group in gpu_check.blocks(tmp_path, dry_run=False) for b in group if b.name == "racecheck")
    if tool:
        assert block.command[:3] == [tool, "--tool", "racecheck"]
        assert block.command[-4:] == ["check", "--device", "cuda", "--small"]
    else:
        outcome = gpu_check.run(block, tmp_path, end=1e9)
        assert (outcome.result, outcome.message) == ("skipped", "no compute-sanitizer")


@pytest.mark.parametrize(
    ("code", "limit", "result"), [("1", 60, "failed"), ("77", 60, "incomplete"), ("0", 6, "stopped")]
)
def test_results_of_blocks(code, limit, result, tmp_path):
    wait = "import time; print('x', flush=True); time.sleep(60); " if result == "stopped" else "print('x'); "
    block = gpu_check.Block("block", [sys.executable, "-c", f"{wait}raise SystemExit({code})"], limit)
    outcome = gpu_check.run(block, tmp_path, end=1e9)
    assert (outcome.result, outcome.message) == (result, "x")
    assert (tmp_path / "block.log").read_text() == "x\n"


def test_dry_run(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, gpu_check.HERE / "gpu_check.py", "--dry-run", "--output", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = [json.loads(line) for line in (out / "blocks.jsonl").read_text().splitlines()]
    assert [o["name"] for o in outcomes] == ["environment", "check", "tests", "ops", "more model"]
    assert {o["result"] for o in outcomes} == {"ok"}
    assert json.loads((out / "cpu-ops.json").read_text())["complete"]
    assert "all correct" in (out / "check.log").read_text()
    with tarfile.open(tmp_path / "out.tar.gz") as archive:
        assert {"./blocks.jsonl", "./more/cpu-model.json", "./tests.log"} <= set(archive.getnames())
