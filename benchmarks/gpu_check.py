"""Checks and measures a GPU with one command in less than ten minutes, without network.

    python benchmarks/gpu_check.py --output DIR

Blocks, in this order: environment and ceilings; `alexnet-cuda check` (with wgmma and without) and the operators' tests
on the GPU; bench_ops.py in bfloat16, its first block without wgmma, bench_model.py for 1 and 256 images, the fused
operators against torch.compile; batches of more than 2^31 elements; compute-sanitizer's four tools over every kernel.
The time that is left goes to the blocks called "more": torch.compile, other dtypes and batches. Each block is a process
with a time limit, so that a crash costs one block. DIR.tar.gz holds DIR and is renewed after every block. The exit code
is 1 if a block failed, or was stopped or not reached and is none of "more".

--dry-run runs the smallest sizes on the CPU, and some tests of the operators on the emulator (docs/emulator.md).
"""

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
from rich.table import Table

import alexnet_cuda

HERE, TESTS = Path(__file__).resolve().parent, common.ROOT / "python_tests"
TIME = 570  # seconds; the limits of all blocks but "more", and the environment, are less
FIRST_BLOCK = "conv2d_relu_lrn_max_pool2d"
OPS = tuple(alexnet_cuda.ops.__all__)
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
NO_WGMMA = {"ALEXNET_CUDA_WGMMA": "0"}


@dataclass
class Block:
    """A child process; `limit` in seconds. `json` is a benchmark's file, kept up to the point where it was stopped."""

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

    def bench(name: str, seconds: float, longest: float, *arguments: object, **environment: str) -> Block:
        """No case is begun after `seconds`; none takes more than `longest`."""
        what = name.removeprefix("more ")
        file = out / ("more" if what != name else "") / f"{device}-{what.replace(' ', '-')}.json"
        flags = ("--device", device, "--time", seconds, *arguments, "--output", file)
        command = [sys.executable, str(HERE / f"bench_{what.split()[0]}.py"), *map(str, flags)]
        return Block(name, command, seconds + longest, environment, file)

    def tests(name: str, limit: float, selection: str, *files: str) -> Block:
        paths = [str(TESTS / f"test_{file}.py") for file in files]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths, "-k", selection]
        return Block(name, command, limit, {} if dry_run else {"ALEXNET_CUDA_REQUIRE": "cpu,cuda"})

    check = [sys.executable, "-m", "alexnet_cuda.cli", "check", "--device", device]
    if dry_run:
        small = ("--batch", 1, "--budget", 0.1, "--repeats", 3, "--layouts", "channels_last", "--threads", 1)
        os.environ["OMP_NUM_THREADS"] = "1"  # of the children: with so little work, threads would only wait
        emulated = "emulated" if importlib.util.find_spec("alexnet_cuda._emulated") else "cpu"
        return [[
            Block("check", [*check, "--small"], 110),
            tests("tests", 110, f"{emulated} and unbatched", "operators"),
            bench("ops", 50, 50, *small, "--ops", "max_pool2d", FIRST_BLOCK),
            bench("more model", 50, 50, *small, "--variants", "cifar"),
        ]]  # fmt: skip
    sanitizers = [
        Block(tool, [*sanitizer(tool), *check, "--small"] if sanitizer(tool) else [], 75,
              {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        for tool in SANITIZERS
    ]  # fmt: skip
    compiled = ("--compile", "default", "--layouts", "channels_last", "--budget", 0.5)
    fused, single = ("relu_lrn_max_pool2d", FIRST_BLOCK), ("local_response_norm", "max_pool2d", "conv2d")
    sweep = ("--layouts", "channels_last", "--budget", 0.3)
    half = ("--dtype", "float16", "--passes", "training", "--blocks", 1)
    wider = ("--dtype", "float32", "tf32")
    return [
        [
            Block("check", check, 110),
            Block("check without wgmma", check, 110, NO_WGMMA),
            *(tests(f"tests {name}", 110, "cuda", name) for name in (*OPS, "operators", "host_checks")),
            tests("tests cuda_only", 110, "not huge", "cuda_only"),
        ],
        [bench("ops", 85, 15, "--budget", 0.5)],
        [bench("ops without wgmma", 15, 15, "--ops", FIRST_BLOCK, "--budget", 1, **NO_WGMMA)],
        [bench("model", 70, 20, "--batch", 1, 256, "--budget", 3)],
        [bench("ops compile", 65, 25, *compiled, "--ops", *fused)],
        [tests("tests huge", 50, "huge", "cuda_only")],  # up to 60 GB, and with nothing else on the device
        sanitizers,
        [bench("more model compile", 90, 60, *compiled)],
        [bench("more ops dtypes", 105, 15, *wider, "--budget", 0.5)],
        [bench("more model dtypes", 60, 20, *wider, "--budget", 2)],
        [bench("more ops float16", 30, 15, *half, *sweep)],
        [bench("more ops sweep", 85, 15, "--batch", 1, 32, 128, 1024, *sweep)],
        [bench("more model sweep", 45, 20, "--batch", 32, 128, 1024, *sweep)],
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
    if tool == "memcheck":  # torch makes API calls that may fail; launches of our kernels are checked
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
            result = "incomplete" if block.optional or block.name in SANITIZERS else "stopped"
    if block.json and common.part(block.json).exists():
        common.finish(block.json, complete=False)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if result not in ("ok", "incomplete"):
        common.console.print(f"{block.name}: {result}", *lines[-15:], sep="\n  ", style="red", markup=False)
    return Outcome(block.name, result, time.monotonic() - begin, (lines or [f"exit code {child.returncode}"])[-1])


def environment(out: Path, device: str) -> Outcome:
    """The machine, and how fast it copies and multiplies; fails without kernels for `device`."""
    begin = time.monotonic()
    try:
        smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        smi = str(error)
    (out / "nvidia-smi.txt").write_text(smi)
    if device == "cuda":
        state = alexnet_cuda.build_info()["CUDA kernels"]
        why = "torch finds no GPU" if not torch.cuda.is_available() else "" if state == "loaded" else state
        if why:
            return Outcome("environment", "failed", time.monotonic() - begin, f"no CUDA kernels: {why}")
    machine = common.machine(device)
    dtypes = ["float32", "bfloat16"] if device == "cpu" else list(common.DTYPES)
    ceilings = timing.measure_ceilings(device, dtypes, timing.Timer(device), small=device == "cpu")
    (out / "environment.json").write_text(json.dumps({"machine": machine, "ceilings": ceilings}, indent=1) + "\n")
    if device == "cuda":
        torch.cuda.empty_cache()
    message = f"{machine['device']}, torch {machine['torch']}, commit {machine['commit']}"
    return Outcome("environment", "ok", time.monotonic() - begin, message)


def main(arguments: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--output", type=Path, required=True, help="folder")
    flags.add_argument("--blocks", nargs="+", metavar="NAME", help="only those whose names begin so: check more ...")
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
    return 0 if all(o.result in ("ok", "incomplete", "skipped") for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
