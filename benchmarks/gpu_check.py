"""Everything worth knowing of a GPU in one command of less than ten minutes, without network.

    python benchmarks/gpu_check.py --output DIR

Blocks, in this order: environment and ceilings; parity of every operator with float64 (parity.py, one process per
operator, and one for ALEXNET_CUDA_KERNELS=wgmma); what decides: bench_ops.py in bfloat16, that kernel's time,
bench_model.py for 1 and 256 images, the fused operators against torch.compile; parity of huge batches; the test suite
on the device, and at the same time compute-sanitizer's four tools over every kernel. What is left of the time goes to
the blocks called "more" (whole networks under torch.compile, other dtypes, sweeps of the batch, max-autotune), which
--blocks more begins with in a run of their own. Each block is a process with a time limit, so that a crash or a hang
costs one block. What it measured until then is in DIR: a log per block, JSON lines per check, blocks.jsonl, and
cuda-*.json, which belong in benchmarks/results; DIR.tar.gz is all of it, renewed after every block. The exit code is 1
if any block failed, or was stopped or not reached and is none of "more".

--dry-run goes through the same motions on the CPU with the smallest sizes, and checks the CUDA operators, their host
code included, on the emulator where that is built (docs/emulator.md).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import common
import timing
import torch
from parity_cases import OPS
from rich.table import Table

from alexnet_cuda._library import WHY_NOT
from alexnet_cuda.kernels import VARIABLE

HERE = Path(__file__).resolve().parent
TIME = 570  # seconds; the limits of all blocks but "more", and the environment, are less
WHOLE_BLOCK = "conv2d_relu_lrn_max_pool2d"
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


@dataclass
class Block:
    """A child process; `limit` in seconds. `json` is the benchmark's file, kept up to where a stopped one came."""

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    json: Path | None = None

    @property
    def optional(self) -> bool:
        """It may be stopped or not reached."""
        return self.name.startswith("more")


@dataclass
class Outcome:
    name: str
    result: str  # ok, failed, stopped, not reached; without a failure: incomplete, skipped
    seconds: float
    message: str


def blocks(out: Path, dry_run: bool) -> list[list[Block]]:
    """Groups to run one after another; the blocks of a group run at the same time."""
    device = "cpu" if dry_run else "cuda"
    threads = 1 if dry_run else max(1, (os.cpu_count() or 1) // (len(OPS) + 1))  # of each parity process

    def script(name: str, *arguments: object, on: str = device) -> list[str]:
        return [sys.executable, str(HERE / f"{name}.py"), "--device", on, *map(str, arguments)]

    def parity(
        name: str, ops: tuple[str, ...], *arguments: object, limit: float = 110, kernels: str = "auto", on: str = device
    ) -> Block:
        lines = out / f"{name.replace(' ', '-')}.jsonl"
        command = script("parity", "--ops", *ops, "--output", lines, "--time", limit - 10, *arguments, on=on)
        return Block(name, command, limit, {VARIABLE: kernels, "OMP_NUM_THREADS": str(threads)})

    def bench(name: str, seconds: float, longest: float, *arguments: object) -> Block:
        """No case is begun after `seconds`; none takes more than `longest`."""
        what = name.removeprefix("more ")
        file = out / ("more" if what != name else "") / f"{device}-{what.replace(' ', '-')}.json"
        command = script(f"bench_{what.split()[0]}", "--time", seconds, *arguments, "--output", file)
        return Block(name, command, seconds + longest, json=file)

    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    smoke = script("parity", "--smoke")
    if dry_run:
        small = ("--batch", 1, "--budget", 0.1, "--repeats", 3, "--layouts", "contiguous", "--threads", 1)
        test = [str(common.ROOT / "python_tests" / "test_max_pool2d.py"), "-k", "cpu and unbatched"]
        os.environ["OMP_NUM_THREADS"] = "1"  # of the children: with so little work, threads would only wait
        emulator, on = [], "cpu"
        if importlib.util.find_spec("alexnet_cuda._emulated"):
            on = "emulator"
            emulator = [parity("parity emulator", OPS, on=on)]
            smoke = script("parity", "--smoke", on=on)
        return [
            [
                *emulator,
                parity("parity", OPS, "--tiny"),
                parity("parity large", OPS, "--tiny", "--large", on=on),
                Block("tests", [*pytest, *test], 110),
                Block("kernels", [*smoke, "--time", "100"], 110),
            ],
            [
                bench("ops", 50, 50, *small, "--ops", "max_pool2d", WHOLE_BLOCK),
                bench("more model", 50, 50, *small, "--variants", "cifar"),
            ],
        ]
    tests = [  # of these files; the others need more packages than torch and pytest, and no GPU
        Block(f"tests {name}", [*pytest, str(common.ROOT / "python_tests" / f"test_{name}.py"), "-k", "cuda or gpu"],
              85, {"ALEXNET_CUDA_REQUIRE": "cpu,cuda"})
        for name in (*OPS, "kernels", "library")
    ]  # fmt: skip
    sanitizers = [
        Block(tool, [*sanitizer(tool), *smoke, "--time", "50"] if sanitizer(tool) else [], 75,
              {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        for tool in SANITIZERS
    ]  # fmt: skip
    compiled = ("--compile", "default", "--layouts", "channels_last", "--budget", 0.5)
    fused, single = ("relu_lrn_max_pool2d", WHOLE_BLOCK), ("local_response_norm", "max_pool2d", "conv2d")
    sweep = ("--layouts", "channels_last", "--budget", 0.3)
    half = ("--dtype", "float16", "--passes", "training", "--blocks", 1)
    wider = ("--dtype", "float32", "tf32")
    # of an H100 with 16 cores expected: 70, 85, 20, 70, 75, 25, 60 s; the others get what these leave
    return [
        [*(parity(f"parity {op}", (op,)) for op in OPS), parity("parity wgmma", (WHOLE_BLOCK,), kernels="wgmma")],
        [bench("ops", 85, 15, "--budget", 0.5)],
        [bench("ops wgmma", 15, 15, "--wgmma", "--ops", WHOLE_BLOCK, "--budget", 1)],
        [bench("model", 70, 20, "--batch", 1, 256, "--budget", 3)],
        [bench("ops compile", 65, 25, *compiled, "--ops", *fused)],
        [parity("parity large", OPS, "--large", limit=50)],
        [*tests, *sanitizers],
        [bench("more model compile", 90, 60, *compiled)],
        [bench("more ops dtypes", 105, 15, *wider, "--budget", 0.5)],
        [bench("more model dtypes", 60, 20, *wider, "--budget", 2)],
        [bench("more ops float16", 30, 15, *half, *sweep)],
        [bench("more ops sweep", 40, 15, "--batch", 1, 32, *sweep)],
        [bench("more model sweep", 45, 20, "--batch", 32, 128, 1024, *sweep)],
        [bench("more ops sweep large", 45, 15, "--batch", 128, 1024, *sweep)],
        [bench("more ops compile", 130, 30, *compiled, "--ops", *single)],
        [bench("more model max-autotune", 200, 200, "--compile", "max-autotune", *sweep)],
        [bench("more ops max-autotune", 300, 60, "--compile", "max-autotune", *sweep)],
    ]


def sanitizer(tool: str) -> list[str]:
    """The command before a program's own; initcheck must see every kernel, the others look at ours only."""
    path = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if path is None:
        return []
    only = [] if tool == "initcheck" else ["--kernel-name", "kns=alexnet_cuda"]
    if tool == "memcheck":  # torch asks for things that may not be there; our own launches are checked
        only += ["--report-api-errors", "no"]
    return [path, "--tool", tool, *only, "--error-exitcode", "99", "--print-limit", "20"]


def run(block: Block, out: Path, end: float) -> Outcome:
    begin = time.monotonic()
    limit = min(block.limit, end - begin)
    if not block.command:
        return Outcome(block.name, "skipped", 0, "no compute-sanitizer")
    if limit < 5:
        return Outcome(block.name, "skipped" if block.optional else "not reached", 0, "no time left")
    log = out / f"{block.name.replace(' ', '-')}.log"
    environment = os.environ | {"COLUMNS": "160"} | block.environment
    with open(log, "w") as file:  # started outside the source tree, so that the installed package is imported
        child = subprocess.Popen(block.command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=out,
                                 start_new_session=True)  # fmt: skip
        try:
            result = {0: "ok", common.INCOMPLETE: "incomplete"}.get(child.wait(limit), "failed")
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            result = "incomplete" if block.optional else "stopped"
    if block.json and common.part(block.json).exists():
        common.finish(block.json, complete=False)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if result not in ("ok", "incomplete"):
        common.console.print(f"{block.name}: {result}", *lines[-15:], sep="\n  ", style="red", markup=False)
    return Outcome(block.name, result, time.monotonic() - begin, (lines or [f"exit code {child.returncode}"])[-1])


def environment(out: Path, device: str) -> Outcome:
    """What this machine is and how fast it copies and multiplies; fails without CUDA kernels."""
    begin = time.monotonic()
    try:
        smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        smi = str(error)
    (out / "nvidia-smi.txt").write_text(smi)
    why = WHY_NOT[device] or ("" if device == "cpu" or torch.cuda.is_available() else "torch finds no GPU")
    if why:
        return Outcome("environment", "failed", time.monotonic() - begin, f"no {device} kernels: {why}")
    machine = common.machine(device)
    dtypes = ["float32", "bfloat16"] if device == "cpu" else list(common.DTYPES)
    ceilings = timing.measure_ceilings(device, dtypes, timing.Timer(device), small=device == "cpu")
    (out / "environment.json").write_text(json.dumps({"machine": machine, "ceilings": ceilings}, indent=1) + "\n")
    if device == "cuda":
        torch.cuda.empty_cache()
    message = f"{machine['device']}, torch {machine['torch']}, commit {machine['commit']}"
    return Outcome("environment", "ok", time.monotonic() - begin, message)


def failures(out: Path) -> list[str]:
    """The checks of the parity blocks that failed, then those that could not run."""
    records = [json.loads(line) for path in sorted(out.glob("parity*.jsonl"))
               for line in path.read_text().splitlines() if line.endswith("}")]  # fmt: skip
    records.sort(key=lambda r: r["ok"] is None)
    return [f"{r['op']}: {r['check']}: {r['message']}" for r in records if not r["ok"]]


def main(arguments: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--output", type=Path, required=True, help="folder")
    flags.add_argument("--blocks", nargs="+", metavar="NAME", help="only those whose names begin so: parity more ...")
    flags.add_argument("--time", type=float, default=TIME, help="seconds for everything")
    flags.add_argument("--dry-run", action="store_true", help="on the CPU, with the smallest sizes")
    args = flags.parse_args(arguments)
    end, out = time.monotonic() + args.time, args.output.resolve()
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []

    def note(outcome: Outcome) -> None:
        outcomes.append(outcome)
        with open(out / "blocks.jsonl", "a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        common.console.print(f"{outcome.name}: {outcome.result} after {outcome.seconds:.0f} s: {outcome.message}",
                             markup=False)  # fmt: skip

    (out / "blocks.jsonl").unlink(missing_ok=True)
    note(environment(out, "cpu" if args.dry_run else "cuda"))
    if outcomes[0].result == "ok":
        for group in blocks(out, args.dry_run):
            chosen = [b for b in group if not args.blocks or b.name.startswith(tuple(args.blocks))]
            with ThreadPoolExecutor(max(1, len(chosen))) as pool:
                for future in [pool.submit(run, block, out, end) for block in chosen]:
                    note(future.result())
            os.replace(shutil.make_archive(f"{out}.part", "gztar", out), f"{out}.tar.gz")
    table = Table("block", "result", "seconds", "last line")
    for o in outcomes:
        style = {"ok": "green", "skipped": "yellow", "incomplete": "yellow"}.get(o.result, "red")
        table.add_row(o.name, f"[{style}]{o.result}", f"{o.seconds:.0f}", o.message[:90].replace("[", r"\["))
    common.console.print(table)
    for line in failures(out)[:20]:
        common.console.print(line[:240], style="red", markup=False)
    return 0 if all(o.result in ("ok", "incomplete", "skipped") for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
