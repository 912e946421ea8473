"""Writes docs/kernel_resources.md: what ptxas and the machine code say of every CUDA kernel, on every architecture.

Needs nvcc, c++filt and cuobjdump (of the CUDA toolkit, or the one that comes with Triton), no GPU.
python_tests/test_kernel_resources.py compares what it compiles with that table.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "kernel_resources.md"
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
HEADER = ("kernel", "sm", "registers", "spilled", "local", "shared", "HMMA", "HGMMA", "FFMA")
INTRODUCTION = """# What every CUDA kernel uses

From benchmarks/kernel_resources.py; {compiler}. *sm*: the architectures of which a row is true. *registers*: of a
thread. *spilled*: bytes stored and loaded because there were too few. *local*: bytes of stack. *shared*: bytes of a
block, declared + added by the launch (n: depends on the size of the images or of an element). HMMA (mma.sync), HGMMA
(wgmma) and FFMA (float multiply-add): instructions in the code, not executed ones.
"""
FLAGS = {  # template parameters: what false and true mean
    "kLast": ("NCHW", "NHWC"),
    "kChannelsLast": ("NCHW", "NHWC"),
    "kAlexNet": ("any LRN", "AlexNet's LRN"),
}
PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>.*)",
    re.DOTALL,
)


@dataclass
class Kernel:
    """One kernel on one architecture; `code` is its disassembly, None without cuobjdump."""

    name: str
    architecture: str
    registers: int
    spilled: int
    stack: int
    shared: int
    code: str | None

    def count(self, instruction: str) -> int:
        """How often an instruction stands in the code, whatever its suffixes."""
        return len(re.findall(rf"\b(?:{instruction})\b", self.code or ""))


def nvcc_version() -> str:
    text = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    return "nvcc " + re.findall(r"\bV([\d.]+)", text)[0]


def cuobjdump() -> str | None:
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return shutil.which("cuobjdump") or (str(bundled) if bundled and bundled.exists() else None)


def compile_kernels(source: Path, architectures: tuple[str, ...]) -> list[Kernel]:
    """Every kernel of a source on every architecture; RuntimeError with what nvcc says if it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "out.fatbin"
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
        command = ["nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", *targets, "-fatbin"]
        done = subprocess.run([*command, "-o", binary, source], capture_output=True, text=True)
        if done.returncode or "C7510" in done.stderr:  # C7510: a wgmma is serialised
            raise RuntimeError(done.stderr)
        tool, code = cuobjdump(), {}
        if tool:
            text = subprocess.run([tool, "-sass", binary], check=True, capture_output=True, text=True).stdout
            for binary_code in text.split("Fatbin elf code:")[1:]:
                architecture = re.findall(r"arch = sm_(\w+)", binary_code)[0]
                for function in binary_code.split("Function : ")[1:]:
                    name, body = function.split("\n", 1)
                    code[architecture, name] = body
    kernels = []
    for part in done.stderr.split("Compiling entry function")[1:]:
        found = PTXAS.match("Compiling entry function" + part)
        if not found:
            raise RuntimeError(f"{source.name}: ptxas says something new:\n{part}")
        name, architecture, stack, stores, loads, registers, rest = found.groups()
        shared = re.search(r"(\d+) bytes smem", rest)
        numbers = int(registers), int(stores) + int(loads), int(stack), int(shared[1]) if shared else 0
        kernels.append(Kernel(name, architecture, *numbers, code[architecture, name] if tool else None))
    return kernels


def rows(source: Path, kernels: list[Kernel]) -> dict[tuple[str, str], tuple[str, ...]]:
    """(kernel, architecture) to the other cells of its row."""
    text = "".join(path.read_text() for path in [*sorted(source.parent.glob("*.h")), source])
    names = plain_names([k.name for k in kernels], text)
    table = {}
    for k in kernels:
        name, arguments = names[k.name]
        title = ", ".join([name, *(plain_argument(*pair, text) for pair in arguments)])
        counts = (k.registers, k.spilled, k.stack, f"{k.shared}{dynamic_shared(name, dict(arguments), text)}",
                  k.count("HMMA"), k.count("HGMMA"), k.count("FFMA2?"))  # fmt: skip
        table[title, k.architecture] = tuple(map(str, counts))
    return table


def plain_names(mangled: list[str], text: str) -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Of every kernel: its name, and its template's parameters with their arguments; a class's own are among them."""
    lines = subprocess.run(["c++filt"], input="\n".join(mangled), check=True, capture_output=True, text=True).stdout
    lines = lines.replace("(anonymous namespace)", "anonymous")
    parameters = {
        name: re.findall(r"(\w+)\s*(?:,|$)", declared)
        for declared, name in re.findall(
            r"template <([^<>]*)>\s*(?:struct|__global__ void(?: __launch_bounds__\([^)]*\))?)\s+(\w+)", text
        )
    }

    def arguments(name: str, given: str) -> list[tuple[str, str]]:
        pairs = []
        for parameter, argument in zip(parameters.get(name, []), re.findall(r"(?:[^,<]|<[^>]*>)+", given)):
            inner = re.fullmatch(r"(\w+)<(.*)>", argument.strip())
            pairs += [(parameter, inner[1]), *arguments(*inner.groups())] if inner else [(parameter, argument.strip())]
        return pairs

    found = {}
    for symbol, line in zip(mangled, lines.splitlines()):
        call = re.fullmatch(r"(?:void )?(\w+)(?:<(.*?)>)?\(.*", re.sub(r"\b\w+::", "", line))
        found[symbol] = (call[1], arguments(call[1], call[2] or "")) if call else (line, [])
    return found


def plain_argument(parameter: str, argument: str, text: str) -> str:
    """("kTile", "96"): "tile 96"; ("T", "__half"): "half"; ("kLast", "true"): "NHWC"; an enumerator's own name."""
    if parameter in FLAGS:
        return FLAGS[parameter][argument == "true"]
    word = re.sub(r"(?<!^)(?=[A-Z])", " ", parameter.removeprefix("k")).lower()
    if argument in ("true", "false"):
        return word if argument == "true" else f"not {word}"
    if number := re.fullmatch(r"\((\w+)\)(\d+)", argument):
        values = re.search(rf"enum (?:class )?{number[1]}\b[^{{]*{{([^}}]*)}}", text)
        return values[1].split(",")[int(number[2])].split("=")[0].strip().removeprefix("k").lower() if values else word
    return f"{word} {argument}" if re.fullmatch(r"-?\d+", argument) else argument.strip("_").removeprefix("nv_")


def dynamic_shared(kernel: str, arguments: dict[str, str], text: str) -> str:
    """What the launch adds: nothing, " + 1234" where it is a constant, or " + n" where it depends on the call."""
    launch = re.search(rf"gpu::launch\(\s*{kernel}\b[^;]*?,\s*(\w+),\s*stream\b", text)
    if not launch or launch[1] == "0":
        return ""
    constants = dict(re.findall(r"\b(k[A-Z]\w*) = ((?:[^;,<>]|<[^<>]*>)*)(?=[;,>])", text))
    own = re.findall(rf"constexpr int {launch[1]} = ([^;]*);", text[: launch.start()])
    try:
        return f" + {evaluate(own[-1], constants | arguments)}"
    except (IndexError, NameError, SyntaxError):
        return " + n"


def evaluate(expression: str, constants: dict[str, str]) -> int:
    """A C++ expression of integers and constants; those that are templates have the caller's arguments."""
    while (
        known := re.sub(r"\b(k[A-Z]\w*)(?:<\w+>)?", lambda m: f"({constants.get(m[1], m[1])})", expression)
    ) != expression:
        if len(known) > 10_000:
            raise NameError(expression)
        expression = known
    return eval(expression.replace("std::", "").replace("/", "//"), {"__builtins__": {"max": max, "min": min}})


def read(path: Path = TABLE) -> tuple[str, dict[str, dict[tuple[str, str], tuple[str, ...]]]]:
    """(version of nvcc, source to its `rows`)."""
    text = path.read_text()
    table: dict[str, dict[tuple[str, str], tuple[str, ...]]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("## "):
            table[line[3:]] = {}
        elif len(cells) == len(HEADER) and cells[0] != HEADER[0] and not cells[0].startswith("-"):
            table[list(table)[-1]] |= {(cells[0], architecture): tuple(cells[2:]) for architecture in cells[1].split()}
    return re.findall(r"nvcc [\d.]*\d", text)[0], table


def markdown(version: str, table: dict[str, dict[tuple[str, str], tuple[str, ...]]]) -> str:
    lines = [INTRODUCTION.format(compiler=version)]
    for source, kernels in table.items():
        lines += [f"## {source}", "", f"| {' | '.join(HEADER)} |", "|---|---" + "|---:" * (len(HEADER) - 2) + "|"]
        alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for (kernel, architecture), cells in kernels.items():
            alike.setdefault((kernel, cells), []).append(architecture)
        order = sorted(alike.items(), key=lambda item: (item[0][0], ARCHITECTURES.index(item[1][0])))
        lines += [f"| {' | '.join([kernel, ' '.join(on), *cells])} |" for (kernel, cells), on in order]
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--sources", type=Path, nargs="+", default=SOURCES, help="the others' rows stay as they are")
    args = flags.parse_args()
    if not shutil.which("nvcc") or not shutil.which("c++filt") or not cuobjdump():
        sys.exit("kernel_resources: this needs nvcc, c++filt and cuobjdump")
    version, table = nvcc_version(), {}
    if TABLE.exists() and args.sources != SOURCES:
        old, table = read()
        if old != version:
            sys.exit(f"kernel_resources: the table is from {old}, this is {version}; compile all sources")
    for source in args.sources:
        print(source.name, flush=True)
        table[source.name] = rows(source, compile_kernels(source, ARCHITECTURES))
        names = [s.name for s in SOURCES]
        table = {name: table[name] for name in names if name in table}
        TABLE.write_text(markdown(version, table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
