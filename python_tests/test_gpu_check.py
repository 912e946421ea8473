"""The plan of the GPU check, what is left of it when it is killed, and a dry run on the CPU and the emulator."""

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time

import common
import gpu_check
import pytest
import tables

README = (common.ROOT / "benchmarks" / "README.md").read_text()
DECIDING = 430  # seconds of the first command that a build leaves: for the blocks up to the counters
BY_NAME = {b.name: b for group in gpu_check.blocks(common.ROOT, dry_run=False) for b in group}


def test_blocks_fit_into_the_time():
    groups = gpu_check.blocks(common.ROOT, dry_run=False)
    limits = {group[0].name: max(b.limit for b in group) for group in groups}
    order = list(limits)
    assert order[:7] == ["environment", "smoke", "check", "ops wgmma", "ops", "model", "counters"]
    assert sum(limits[name] for name in order[:7]) <= DECIDING
    both = sum(limit for name, limit in limits.items() if not name.startswith("more"))
    assert both <= DECIDING + 230 + 50  # of two commands; their last one may be stopped
    compiled = [op for name in ("ops compile", "more ops compile") for op in BY_NAME[name].command[2:]]
    assert [op for op in gpu_check.OPS if op not in compiled] == []
    assert [len(group) for group in groups if "tests huge" in [b.name for b in group]] == [1]
    for b in BY_NAME.values():
        if b.json:  # they end by themselves
            assert float(b.command[b.command.index("--time") + 1]) + 10 <= b.limit


def test_every_operators_tests_run_on_the_gpu():
    tests = [b for b in BY_NAME.values() if "tests" in b.name]
    assert {b.environment["ALEXNET_CUDA_REQUIRE"] for b in tests} == {"cpu,cuda"}
    files = [path for b in tests for path in b.command if path.endswith(".py")]
    assert all(os.path.exists(path) for path in files)
    assert all(any(path.endswith(f"test_{op}.py") for path in files) for op in gpu_check.OPS)
    assert "ALEXNET_CUDA_WGMMA" in BY_NAME["check without wgmma"].environment.keys() - BY_NAME["check"].environment


def test_no_test_of_cuda_only_is_left_out():
    text = (gpu_check.TESTS / "test_cuda_only.py").read_text()
    selections = [b.command[-1] for b in BY_NAME.values() if any("cuda_only" in word for word in b.command)]
    words = {word for selection in selections for word in selection.split()}
    names = re.findall(r"def test_(\w+)", text)
    assert len(names) > 5
    assert [name for name in names if not any(word in name for word in words - {"or", "and"})] == []


@pytest.mark.parametrize("there", [True, False])
def test_tools(there, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/bin/{name}" if there else None)
    found = {b.name: b for group in gpu_check.blocks(tmp_path, dry_run=False) for b in group}
    if there:
        assert found["racecheck"].command[:3] == ["/bin/compute-sanitizer", "--tool", "racecheck"]
        assert found["racecheck"].command[-4:] == ["check", "--device", "cuda", "--small"]
        assert found["counters"].command[:3] == ["/bin/ncu", "--clock-control", "none"]
    else:
        outcomes = [gpu_check.run(found[name], gpu_check.Output(tmp_path), 1e9) for name in ("racecheck", "counters")]
        assert [(o.result, o.message) for o in outcomes] == [("skipped", "its tool is not installed")] * 2


@pytest.mark.parametrize(
    ("code", "limit", "result"), [("1", 60, "failed"), ("77", 60, "incomplete"), ("0", 6, "stopped")]
)
def test_results_of_blocks(code, limit, result, tmp_path):
    wait = "import time; print('x', flush=True); time.sleep(60); " if result == "stopped" else "print('x'); "
    block = gpu_check.Block("block", [sys.executable, "-c", f"{wait}raise SystemExit({code})"], limit)
    output = gpu_check.Output(tmp_path)
    outcome = gpu_check.run(block, output, end=1e9)
    assert (outcome.result, outcome.message) == (result, "x")
    assert (output.work / "block.log").read_text() == "x\n"


def finished(folder):
    return [json.loads(line) for line in (folder / "blocks.jsonl").read_text().splitlines()]


def many_blocks(out, dry_run):
    code = "import os, sys; open(sys.argv[1], 'wb').write(os.urandom(1 << 19)); print('end')"
    command = lambda name: [sys.executable, "-c", code, f"{name}.json"]
    return [[gpu_check.Block(f"b{i}.{k}", command(f"b{i}.{k}"), 60) for k in "xyz"] for i in range(99)]


def in_a_group_of_its_own(out):
    os.setsid()
    gpu_check.main(["--output", str(out)])


def test_killed_at_any_moment(tmp_path, monkeypatch):
    """Five times, while blocks end all the time: the archive is whole and holds every block that is called finished."""
    monkeypatch.setattr(gpu_check, "blocks", many_blocks)
    monkeypatch.setattr(gpu_check.tempfile, "tempdir", str(tmp_path))
    for turn in range(5):
        out = tmp_path / str(turn)
        child = multiprocessing.get_context("fork").Process(target=in_a_group_of_its_own, args=[out])
        child.start()
        while not (out / "blocks.jsonl").exists():
            assert child.is_alive()
            time.sleep(0.01)
        time.sleep(random.uniform(0, 1.5))
        os.killpg(child.pid, signal.SIGKILL)
        child.join()
        with tarfile.open(out / "results.tar.gz") as archive:
            sizes = {member.name: len(archive.extractfile(member).read()) for member in archive}
        for block in finished(out):
            assert block["result"] == "ok"
            assert (sizes[f"{block['name']}.json"], sizes[f"{block['name']}.log"]) == (1 << 19, 4)
        assert len(list(out.iterdir())) <= 4


def is_running(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read() != ""  # a zombie's is empty
    except OSError:
        return False


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL])
def test_running_blocks_end_with_the_check(kill, tmp_path, monkeypatch):
    """So do the processes that a block has started."""
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '99']).pid, flush=True); time.sleep(99)"
    monkeypatch.setattr(gpu_check, "blocks", lambda *_: [[gpu_check.Block("b", [sys.executable, "-c", code], 99)]])
    monkeypatch.setattr(gpu_check.tempfile, "tempdir", str(tmp_path))
    check = multiprocessing.get_context("fork").Process(target=in_a_group_of_its_own, args=[tmp_path / "out"])
    check.start()
    while not (pid := "".join(log.read_text() for log in tmp_path.glob("gpu_check-*/b.log"))):
        assert check.is_alive()
        time.sleep(0.05)
    assert is_running(int(pid))
    os.kill(check.pid, kill)
    check.join()
    end = time.monotonic() + 20
    while is_running(int(pid)):
        assert time.monotonic() < end
        time.sleep(0.05)
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        assert archive.getnames() in ([], ["b.log"])


def test_dry_run(tmp_path):
    """All blocks, and what comes back becomes the documents' tables."""
    out = tmp_path / "out"
    command = [sys.executable, gpu_check.HERE / "gpu_check.py", "--dry-run", "--output"]
    done = subprocess.run([*command, out], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {o["name"] for o in finished(out)} == {"environment", "smoke", "tests", "ops", "more model", "kernelbench"}
    assert {o["result"] for o in finished(out)} == {"ok"}
    assert {path.name for path in out.iterdir()} == {"results.tar.gz", "blocks.jsonl", "log.txt"}
    assert "smoke: ok after" in (out / "log.txt").read_text()
    with tarfile.open(out / "results.tar.gz") as archive:
        assert "all correct" in archive.extractfile("smoke.log").read().decode()
        assert {"environment.json", "tests.log", "more/cpu-model.json"} <= set(archive.getnames())
    for file in ("README.md", "docs/benchmarks.md"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(tables.BEGIN + tables.END)
    folder = tmp_path / "results"
    assert tables.main(["--from", f"{out}/results.tar.gz", "--results", str(folder), "--root", str(tmp_path)]) == 0
    assert json.loads((folder / "cpu-ops.json").read_text())["complete"]
    assert (folder / "more" / "cpu-model.json").exists()
    assert not (folder / "environment.json").exists()
    document = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "| max_pool2d | 1x96x55x55 float32 | inference |" in document
    assert "**CPU, KernelBench**" in document


def test_after_an_earlier_run(tmp_path, monkeypatch):
    """What it finished is left out; the environment is not."""
    names = ("environment", "ops", "model", "more ops")
    monkeypatch.setattr(gpu_check, "blocks", lambda *_: [[gpu_check.Block(name, ["true"], 60)] for name in names])
    earlier = tmp_path / "earlier.jsonl"
    results = {"environment": "ok", "ops": "incomplete", "model": "stopped", "more ops": "ok"}
    earlier.write_text("".join(json.dumps({"name": n, "result": r}) + "\n" for n, r in results.items()))
    assert gpu_check.main(["--output", str(tmp_path / "out"), "--after", str(earlier)]) == 0
    assert [o["name"] for o in finished(tmp_path / "out")] == ["environment", "model"]


def test_results_that_were_cut_off(tmp_path):
    """An archive holds FILE.part of a benchmark that was running: what it says becomes FILE."""
    part = tmp_path / "cuda-ops.json.part"
    part.write_text('{"kind": "ops"}\n{"case": "pool"}\n{"case": ')
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(part, "more/cuda-ops.json.part")
    tables.take(tmp_path / "a.tar.gz", tmp_path)
    result = json.loads((tmp_path / "more" / "cuda-ops.json").read_text())
    assert result == {"kind": "ops", "complete": False, "records": [{"case": "pool"}]}


def test_commands_of_the_readme():
    """Two command lines for a machine that takes 2,000 characters; what they name exists."""
    commands = re.findall(r"^```sh\n(export ALEXNET_CUDA_COMMIT.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert len(command) <= 2000
        assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0
        assert "gpu_check.py --output" in command
