"""Checks and measures a GPU with one command in less than ten minutes, without network.

    python benchmarks/gpu_check.py --output DIR

Blocks, what decides first: environment and ceilings; a smoke test of every kernel; `alexnet-cuda check` (with wgmma and
without) and the operators' tests; the first block with wgmma and without, all operators, whole networks; ncu's counters
of every kernel; the fused operators against torch.compile; KernelBench's problems; batches of more than 2^31 elements;
compute-sanitizer's four tools. The time that is left goes to the blocks called "more": torch.compile, other dtypes and
batches. Each block is a process with a time limit, so that a crash costs one block.

DIR gets three files: results.tar.gz (logs and results), blocks.jsonl (a line for each block that has ended), log.txt.
The archive is renewed by renaming after every block, before its line is written, and every 15 seconds: whatever ends
this process, the archive is whole and holds what has been measured, and the blocks that run end, too. The exit code is
1 if a block failed, or was stopped or not reached and is none of "more".

--dry-run runs the smallest sizes on the CPU, and some tests of the operators on the emulator (docs/emulator.md).
"""

import argparse
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import common
from rich.table import Table

import alexnet_cuda

HERE, TESTS = Path(__file__).resolve().parent, common.ROOT / "python_tests"
TIME = 570  # seconds for everything
PATIENCE = 3600  # seconds of a dry run and of its blocks: a limit that is reached on a busy CPU says nothing
FIRST_BLOCK = "conv2d_relu_lrn_max_pool2d"
OPS = tuple(sorted(alexnet_cuda.ops.__all__, key=lambda name: name != FIRST_BLOCK))
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
SECTIONS = ("SpeedOfLight", "WarpStateStats", "MemoryWorkloadAnalysis")
COUNTERS = ("--clock-control", "none", "--target-processes", "all", "--kernel-name-base", "demangled", "--kernel-name",
            "regex:alexnet_cuda", *(flag for section in SECTIONS for flag in ("--section", section)))  # fmt: skip
NO_WGMMA = {"ALEXNET_CUDA_WGMMA": "0"}
LARGEST = 1 << 20  # bytes of a file that are kept: its last ones
# Runs a block's command as the leader of its process group. Standard input is a pipe from the check and ends when the
# check does, even by SIGKILL; then the whole group ends.
GUARD = """
import os, signal, subprocess, sys, threading
def end_with_check():
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=end_with_check, daemon=True).start()
sys.exit(subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL))
"""


@dataclass
class Block:
    """A child process; `limit` in seconds. `json` is a benchmark's file, kept up to the point where it was stopped."""

    name: str
    command: list[str]  # empty: its tool is missing
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
    few = {"OMP_NUM_THREADS": "1" if dry_run else "2"}  # where many blocks share the CPU
    least = PATIENCE if dry_run else 0

    def script(name: str, *arguments: object) -> list[str]:
        return [sys.executable, str(HERE / name), "--device", device, *map(str, arguments)]

    def bench(name: str, seconds: float, longest: float, *arguments: object) -> Block:
        """No case is begun after `seconds`; none takes more than `longest`."""
        what = name.removeprefix("more ")
        file = out / ("more" if what != name else "") / f"{device}-{what.replace(' ', '-')}.json"
        program = what.split()[0] if what.startswith("kernelbench") else f"bench_{what.split()[0]}"
        command = script(f"{program}.py", "--time", seconds, *arguments, "--output", file)
        return Block(name, command, seconds + longest, few if dry_run else {}, file)

    def tests(name: str, selection: str, file: str, limit: float = 95) -> Block:
        path = str(TESTS / f"test_{file}.py")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path, "-k", selection]
        return Block(name, command, max(limit, least), few | ({} if dry_run else {"ALEXNET_CUDA_REQUIRE": "cpu,cuda"}))

    environment = Block("environment", script("environment.py", "--output", out / "environment.json"), max(40, least),
                        few if dry_run else {})  # fmt: skip
    check = [sys.executable, "-m", "alexnet_cuda.cli", "check", "--device", device]
    smoke = Block("smoke", [*check, "--small"], max(40, least), few)
    if dry_run:
        small = ("--batch", 1, "--budget", 0.1, "--repeats", 3, "--layouts", "channels_last", "--threads", 1)
        emulated = "emulated" if importlib.util.find_spec("alexnet_cuda._emulated") else "cpu"
        return [[environment], [
            smoke,
            tests("tests", f"{emulated} and unbatched", "operators"),
            bench("ops", PATIENCE, 0, *small, "--ops", "max_pool2d", FIRST_BLOCK),
            bench("kernelbench", PATIENCE, 0, *small, "--problems", "level1_50", "relu_lrn_pool"),
            bench("more model", PATIENCE, 0, *small, "--variants", "cifar"),
        ]]  # fmt: skip
    ours = ("--forms", "ours", "ours without wgmma")
    sanitizers = [
        Block(name, tool("compute-sanitizer", *options(name), *check, "--small"), 75,
              {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        for name in SANITIZERS
    ]  # fmt: skip
    launches = script("bench_ops.py", "--launch", "--time", 25, "--ops", *OPS, *ours)
    compiled = ("--compile", "default", "--layouts", "channels_last", "--budget", 0.5)
    fused, single = ("relu_lrn_max_pool2d", FIRST_BLOCK), ("local_response_norm", "max_pool2d", "conv2d")
    sweep = ("--layouts", "channels_last", "--budget", 0.3)
    half = ("--dtype", "float16", "--passes", "training", "--blocks", 1)
    wider = ("--dtype", "float32", "tf32")
    return [
        [environment],
        [smoke],
        [
            Block("check", check, 95, few),
            Block("check without wgmma", check, 95, few | NO_WGMMA),
            tests("tests invariants", "bit_identical or graph or stream or device", "cuda_only"),
            tests("tests images", "many_images and bfloat16", "cuda_only"),
            *(tests(f"tests {name}", "cuda", name) for name in (*OPS, "operators", "host_checks")),
            tests("tests memory", "memory_that", "cuda_only"),
        ],
        [bench("ops wgmma", 20, 10, "--ops", FIRST_BLOCK, "--batch", 256, 1, 32, "--budget", 0.5, *ours)],
        [bench("ops", 75, 15, "--budget", 0.4, "--ops", *OPS)],
        [bench("model", 40, 20, "--batch", 256, 1, "--budget", 2)],
        [Block("counters", tool("ncu", *COUNTERS, *launches), 50)],
        [bench("ops compile", 50, 25, *compiled, "--ops", *fused)],
        [bench("kernelbench", 50, 25, "--compile", "default")],
        [tests("tests huge", "huge", "cuda_only", 50)],  # alone: up to 60 GB
        sanitizers,
        [bench("more model compile", 90, 60, *compiled)],
        [bench("more ops dtypes", 105, 15, *wider, "--budget", 0.5)],
        [bench("more model dtypes", 60, 20, *wider, "--budget", 2)],
        [bench("more ops float16", 30, 15, *half, *sweep)],
        [tests("more tests images", "many_images and not bfloat16", "cuda_only")],
        [bench("more ops sweep", 85, 15, "--batch", 1, 32, 128, 1024, *sweep)],
        [bench("more model sweep", 45, 20, "--batch", 32, 128, 1024, *sweep)],
        [bench("more ops compile", 130, 30, *compiled, "--ops", *single)],
        [bench("more model max-autotune", 200, 200, "--compile", "max-autotune", *sweep)],
        [bench("more ops max-autotune", 300, 60, "--compile", "max-autotune", *sweep)],
    ]


def tool(name: str, *arguments: str) -> list[str]:
    """A command; none if CUDA's toolkit does not bring this tool."""
    path = shutil.which(name) or shutil.which(f"/usr/local/cuda/bin/{name}")
    return [path, *arguments] if path else []


def options(sanitizer: str) -> list[str]:
    """initcheck must see every kernel, the others look at ours only."""
    only = [] if sanitizer == "initcheck" else ["--kernel-name", "kns=alexnet_cuda"]
    if sanitizer == "memcheck":  # torch makes API calls that may fail; launches of our kernels are checked
        only += ["--report-api-errors", "no"]
    return ["--tool", sanitizer, *only, "--error-exitcode", "99", "--print-limit", "20"]


class Output:
    """The three files in `folder`. Blocks write into `work`, from which the archive is made."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.work = folder, Path(tempfile.mkdtemp(prefix="gpu_check-"))
        self.lock = threading.RLock()
        for name in ("results.tar.gz", "blocks.jsonl", "log.txt"):
            (folder / name).unlink(missing_ok=True)

    def say(self, *lines: str, style: str = "") -> None:
        with self.lock, open(self.folder / "log.txt", "a") as file:
            file.write("\n".join(lines) + "\n")
        common.console.print(*lines, sep="\n", style=style, markup=False)

    def archive(self) -> None:
        with self.lock:
            part = self.folder / "results.tar.gz.part"
            with tarfile.open(part, "w:gz", compresslevel=1) as tar:
                for path in sorted(p for p in self.work.rglob("*") if p.suffix in (".json", ".log", ".part")):
                    with suppress(FileNotFoundError):  # a running block has renamed it
                        kept = path.read_bytes()[-LARGEST:]
                        entry = tarfile.TarInfo(str(path.relative_to(self.work)))
                        entry.size = len(kept)
                        tar.addfile(entry, io.BytesIO(kept))
            os.replace(part, self.folder / "results.tar.gz")

    def renew(self, ended: threading.Event) -> None:
        self.archive()
        while not ended.wait(15):
            self.archive()

    def note(self, outcome: Outcome) -> Outcome:
        with self.lock:
            self.archive()
            with open(self.folder / "blocks.jsonl", "a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
            self.say(f"{outcome.name}: {outcome.result} after {outcome.seconds:.0f} s: {outcome.message}")
        return outcome


def run(block: Block, output: Output, end: float) -> Outcome:
    begin = time.monotonic()
    limit = min(block.limit, end - begin)
    if not block.command:
        return Outcome(block.name, "skipped", 0, "its tool is not installed")
    if limit < 5:
        return Outcome(block.name, "skipped" if block.optional else "not reached", 0, "no time left")
    log = output.work / f"{block.name.replace(' ', '-')}.log"
    environment = os.environ | {"COLUMNS": "160"} | block.environment
    with (
        open(log, "w") as file,  # started outside the source tree, so that the installed package is imported
        subprocess.Popen([sys.executable, "-S", "-c", GUARD, *block.command], stdin=subprocess.PIPE, stdout=file,
                         stderr=subprocess.STDOUT, env=environment, cwd=output.work, start_new_session=True) as child,
    ):  # fmt: skip
        try:
            result = {0: "ok", common.INCOMPLETE: "incomplete"}.get(child.wait(limit), "failed")
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # a process in the driver may not end, but the guard does
            result = "incomplete" if block.optional or block.name in SANITIZERS else "stopped"
    if block.json and common.part(block.json).exists():
        common.finish(block.json, complete=False)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if result not in ("ok", "incomplete"):
        output.say(f"{block.name}: {result}", *(f"  {line}" for line in lines[-15:]), style="red")
    return Outcome(block.name, result, time.monotonic() - begin, (lines or [f"exit code {child.returncode}"])[-1])


def main(arguments: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--output", type=Path, required=True, help="folder")
    flags.add_argument("--blocks", nargs="+", metavar="NAME", help="only those whose names begin so: check more ...")
    flags.add_argument("--after", type=Path, metavar="FILE", help="an earlier run's blocks.jsonl: what it lacks")
    flags.add_argument("--time", type=float, help=f"seconds for everything; none: {TIME}")
    flags.add_argument("--dry-run", action="store_true", help="on the CPU, with the smallest sizes")
    args = flags.parse_args(arguments)
    usual = PATIENCE if args.dry_run else TIME
    end = time.monotonic() + (usual if args.time is None else args.time)
    output = Output(args.output.resolve())
    earlier = [json.loads(line) for line in args.after.read_text().splitlines()] if args.after else []
    done = [o["name"] for o in earlier if o["result"] in ("ok", "incomplete")]
    wanted = lambda name: name not in done and name.startswith(tuple(args.blocks or [""]))
    outcomes: list[Outcome] = []
    ended = threading.Event()
    renewing = threading.Thread(target=output.renew, args=[ended], daemon=True)
    renewing.start()
    for group in blocks(output.work, args.dry_run):
        chosen = [b for b in group if b.name == "environment" or wanted(b.name)]
        with ThreadPoolExecutor(max(1, len(chosen))) as pool:
            outcomes += pool.map(lambda block: output.note(run(block, output, end)), chosen)
        if outcomes[0].result == "failed":
            break
    ended.set()
    renewing.join()
    shutil.rmtree(output.work, ignore_errors=True)
    table = Table("block", "result", "seconds", "last line")
    for o in outcomes:
        style = {"ok": "green", "skipped": "yellow", "incomplete": "yellow"}.get(o.result, "red")
        table.add_row(o.name, f"[{style}]{o.result}", f"{o.seconds:.0f}", o.message[:90].replace("[", r"\["))
    common.console.print(table)
    return 0 if all(o.result in ("ok", "incomplete", "skipped") for o in outcomes) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, too
    sys.exit(main())
