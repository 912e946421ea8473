"""Writes docs/kernel_resources.md: registers, shared memory and instructions of every kernel in the built library.

Reads `_cuda.so` of the installed package with cuobjdump (of the CUDA toolkit, or the one that Triton brings) and
compiles nothing. Rows of architectures that the library does not hold stay as they are, if its compiler is the table's.
python_tests/test_kernel_resources.py compares the library with the table.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from alexnet_cuda import _library

TABLE = Path(__file__).resolve().parents[1] / "docs" / "kernel_resources.md"
COLUMNS = ("kernel", "sm", "instances", "registers", "shared memory", "HMMA", "HGMMA", "FFMA")
INTRODUCTION = """# Resources of the CUDA kernels

Written by benchmarks/kernel_resources.py from the library that nvcc {compiler} built. No kernel has a stack frame, so
none spills registers. *instances*: of the template (dtypes, memory formats, channels, tiles); the other columns give
the smallest and largest of them. *registers*: per thread. *shared memory*: bytes per block known to the compiler (1024
of them reserved by CUDA from sm_90 on), without what a launch adds. *HMMA* (mma.sync), *HGMMA* (wgmma), *FFMA* (float32
multiply-add): instructions in the machine code, not executed ones. A kernel with 4 registers is empty: no GPU that runs
the code of that architecture chooses it.

"""
INSTRUCTIONS = (*COLUMNS[5:], "LDSM", "LDL", "STL", "WARPGROUP")  # those that are counted


@dataclass
class Kernel:
    """One kernel on one architecture: bytes of stack frame and shared memory; instructions by name."""

    symbol: str
    architecture: str
    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]

    @property
    def title(self) -> str:
        """Source file (header: one that several share) and name, without template arguments; in a symbol, the name
        follows its length."""
        source = re.findall(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_", self.symbol)
        end = self.symbol.index("_kernel") + len("_kernel")
        start = next(i for i in range(end - 1, 0, -1) if self.symbol[:i].endswith(str(end - i)))
        return f"{source[0] if source else 'header'}: {self.symbol[start:end].removesuffix('_kernel')}"


def library() -> Path | None:
    """The installed package's CUDA library, whether or not torch could load it."""
    path = _library._C.path.with_name("_cuda.so") if _library._C is not None else None
    return path if path and path.exists() else None


def compiler() -> str:
    return _library.build_info().get("CUDA toolkit", "none")


def tool(name: str) -> str | None:
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin" / name if triton and triton.origin else None
    return shutil.which(name) or (str(bundled) if bundled and bundled.exists() else None)


def sass(path: Path, architecture: str) -> dict[str, str]:
    """Machine code of a library's kernels on an architecture, by symbol."""
    command = [str(tool("cuobjdump")), "--gpu-architecture", f"sm_{architecture}", "--dump-sass", path]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(part.split("\n", 1) for part in text.split("\t\tFunction : ")[1:])


def kernels(path: Path) -> list[Kernel]:
    """Every kernel of a library on every architecture for which it holds machine code."""
    command = [str(tool("cuobjdump")), "--dump-resource-usage", "--dump-sass", path]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = []
    for part in text.split("arch = sm_")[1:]:
        architecture = re.match(r"\w+", part)[0]  # type: ignore[index]
        usage, *functions = part.split("\t\tFunction : ")
        counts = {code.split(maxsplit=1)[0]: {i: code.count(f" {i}") for i in INSTRUCTIONS} for code in functions}
        pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
        for symbol, registers, stack, shared, local in re.findall(pattern, usage):
            numbers = int(registers), int(stack) + int(local), int(shared)
            found.append(Kernel(symbol, architecture, *numbers, counts[symbol]))
    return found


def rows(found: list[Kernel]) -> dict[tuple[str, str], tuple[str, ...]]:
    """(kernel, architecture) to the other cells of its row."""
    groups = defaultdict(list)
    for k in found:
        groups[k.title, k.architecture].append(k)

    def extent(values: list[int]) -> str:
        return str(min(values)) if min(values) == max(values) else f"{min(values)} - {max(values)}"

    return {
        key: (str(len(group)), extent([k.registers for k in group]), extent([k.shared for k in group]),
              *(extent([k.instructions[name] for k in group]) for name in COLUMNS[5:]))
        for key, group in groups.items()
    }  # fmt: skip


def read() -> tuple[str, dict[tuple[str, str], tuple[str, ...]]]:
    """(version of nvcc, `rows`) of the table."""
    text = TABLE.read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return re.findall(r"nvcc (\S+)", text)[0], {(name, sm): tuple(rest) for name, sm, *rest in cells[2:]}


def markdown(version: str, table: dict[tuple[str, str], tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---" + "|---:" * (len(COLUMNS) - 2) + "|"]
    order = sorted(table.items(), key=lambda item: (item[0][0], int(re.findall(r"\d+", item[0][1])[0])))
    lines += [f"| {' | '.join(key + cells)} |" for key, cells in order]
    return INTRODUCTION.format(compiler=version) + "\n".join(lines) + "\n"


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    path = library()
    if path is None or tool("cuobjdump") is None:
        sys.exit(f"kernel_resources: {'no cuobjdump' if path else 'the package was built without nvcc'}")
    found = kernels(path)
    table = rows(found)
    if TABLE.exists() and read()[0] == compiler():
        built = {architecture for _, architecture in table}
        table |= {key: cells for key, cells in read()[1].items() if key[1] not in built}
    TABLE.write_text(markdown(compiler(), table))
    print(f"{len(found)} kernels; {sum(k.stack > 0 for k in found)} with a stack frame")
    return 0


if __name__ == "__main__":
    sys.exit(main())
