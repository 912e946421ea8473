"""Shared by the benchmarks: flags, the machine's description, and results that are written as they are measured."""

import argparse
import json
import os
import platform
import subprocess
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages
import torch
from rich.console import Console

import alexnet_cuda

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
INCOMPLETE = 77  # exit code: nothing failed, but not everything was reached
console = Console(highlight=False, soft_wrap=True)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The flags that both benchmarks have."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    flags.add_argument("--batch", type=int, nargs="+", help="images; none: 32 on the CPU, 256 on CUDA")
    flags.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    flags.add_argument("--passes", nargs="+", choices=("inference", "training"), default=["inference", "training"])
    flags.add_argument("--forms", nargs="+", help="names of forms; none: all")
    flags.add_argument("--launch", action="store_true", help="run every form once, for a profiler, and measure nothing")
    flags.add_argument("--compile", nargs="*", metavar="MODE", default=[], help="torch.compile: default, max-autotune")
    flags.add_argument("--threads", type=int, help="of the CPU; none: torch's choice")
    flags.add_argument("--repeats", type=int, default=30, help="most rounds of a case")
    flags.add_argument("--budget", type=float, default=10.0, help="seconds of measuring per case (3 rounds at least)")
    flags.add_argument("--time", type=float, default=float("inf"), help="seconds after which no case is begun")
    flags.add_argument("--output", type=Path, help="JSON file; none: only what is printed")
    return flags


def machine(device: str) -> dict[str, Any]:
    """Versions and hardware that a figure depends on."""
    info = alexnet_cuda.build_info()
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "kind": device, "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "alexnet_cuda": info["version"], "cpu_kernels": info["CPU kernels"],
        "cuda_kernels": info["CUDA kernels"], "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"capability": f"{properties.major}.{properties.minor}", "sms": properties.multi_processor_count,
                  "memory_bytes": properties.total_memory, "l2_bytes": properties.L2_cache_size,
                  "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}  # fmt: skip
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--match="]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("ALEXNET_CUDA_COMMIT", "unknown")


class Results(AbstractContextManager):
    """A JSON file that grows line by line as FILE.part and takes FILE's place when everything is measured.

    FILE: {"kind": ..., "machine": {...}, "ceilings": {...}, "complete": bool, "records": [{...}, ...]}
    """

    def __init__(self, output: Path | None, kind: str, machine: dict, ceilings: dict) -> None:
        self.output = output
        self.complete = True
        self.failed: list[str] = []  # cases without one of our forms
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            part(output).write_text("")
        self.add({"kind": kind, "machine": machine, "ceilings": ceilings})

    def add(self, value: dict) -> None:
        if self.output:
            with open(part(self.output), "a") as file:
                file.write(json.dumps(value) + "\n")

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self.output and error is None:
            finish(self.output, self.complete)

    def exit_code(self) -> int:
        """1 if one of our forms failed, those of others may; INCOMPLETE if only time was lacking."""
        if self.failed:
            console.print(f"ours failed: {'; '.join(self.failed)}", style="red", markup=False)
        return 1 if self.failed else 0 if self.complete else INCOMPLETE


def part(output: Path) -> Path:
    return output.with_name(output.name + ".part")


def finish(output: Path, complete: bool) -> None:
    """Turn FILE.part, which may end in half a line if its writer was stopped, into FILE."""
    text = part(output).read_text()
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    if not lines:
        return
    # one record a line, so that a diff of two runs can be read
    head = json.dumps({**lines[0], "complete": complete}, indent=1)[:-2]
    body = ",\n  ".join(json.dumps(line) for line in lines[1:])
    part(output).write_text(f'{head},\n "records": [\n  {body}\n ]\n}}\n')
    os.replace(part(output), output)
