"""Writes docs/instruction_counts.md: what the kernels for AlexNets' pooling, LRN and fused tail execute, by count.

Reads the sm_90a machine code of the built `_cuda.so` with cuobjdump; needs no GPU. Each kernel is a straight line with
at most one loop. Instructions are counted along it: branches forward are not taken, so that blocks that depend on a
condition count, but for those that gpu::rare_branch marks; the loop counts as often as the launch makes a thread go
through it. python_tests/test_kernel_resources.py compares the library with the table.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import kernel_resources as resources

TABLE = Path(__file__).resolve().parents[1] / "docs" / "instruction_counts.md"
ARCHITECTURE = "90a"
# H200: multiprocessors, clock in Hz, warp instructions and special functions per multiprocessor and cycle; the rate at
# which a copy kernel moved bytes (read and written) on one.
SMS, CLOCK, ISSUE, SPECIAL, COPY_RATE = 132, 1.98e9, 4, 16 / 32, 4.3e12
BATCH, SHAPES = 256, ((96, 55, 55), (256, 27, 27))  # of blocks 1 and 2: channels, height, width
TYPES = {"bfloat16": ("13__nv_bfloat16", 2), "float32": ("f", 4)}
GPU_THREADS = 1 << 18  # for which the launchers cut a batch into tiles
INTRODUCTION = f"""# Instructions of the kernels for AlexNets' pooling, LRN and fused tail

Written by benchmarks/instruction_counts.py from the library that nvcc {{compiler}} built for sm_{ARCHITECTURE}. These
are counts and the times that follow from them; nothing here was measured on a GPU. Batch {BATCH}; block 1 has 96x55x55
elements, block 2 256x27x27. *loads*, *stores*: bytes x number, of a thread along the kernel. *instructions*: warp
instructions for 1,000 elements of x. The rest are times on an H200 ({SMS} multiprocessors, {CLOCK / 1e9} GHz) in us.
*issue*: of all instructions, {ISSUE} per multiprocessor and cycle. *special*: of the square roots, {32 * SPECIAL:.0f}
per multiprocessor and cycle. *memory*: of the bytes that have to be moved, at {COPY_RATE / 1e12} TB/s. *bound*: the
largest of the three. relu_lrn_max_pool2d in the order relu-pool-lrn is two kernels, its backward three: their figures
are added. The ReLU in the first, which max_pool2d skips, is counted in both.

"""
PER_BLOCK = ("instructions", "issue", "special", "memory", "bound")
COLUMNS = ["kernel", "dtype", "format", "loads", "stores"] + [
    f"{name} {block}" for block in (1, 2) for name in PER_BLOCK
]


@dataclass
class Launch:
    """Warps of a launch, how often each goes through its loop, and the bytes that have to be moved."""

    warps: float
    trips: float
    bytes: float


@dataclass
class Kernel:
    """`launch(size, channels_last, channels, height, width)`, and parts of its symbol, or of its symbols in NHWC and
    NCHW. {T} stands for the dtype, {nhwc} for that flag of a template, {parity} for what 16-bit planes with an odd
    number of elements have."""

    launch: Callable[[int, bool, int, int, int], Launch]
    symbols: tuple[str, ...]

    def symbol(self, mangled: str, size: int, channels_last: bool) -> re.Pattern[str]:
        text = self.symbols[0 if channels_last else -1]
        parity = f"LN.*6ParityE{2 if size == 2 and not channels_last else 0}E"
        return re.compile(text.replace("{T}", f"_kernelI{mangled}").replace("{nhwc}", f"Lb{int(channels_last)}E")
                          .replace("{parity}", parity) + "E")  # fmt: skip


def tile_rows(threads: float, rows: int, per_warp: int = 1) -> int:
    tiles = min(max(GPU_THREADS // int(threads), 1), ceil(rows / 4))
    return ceil(rows / (ceil(tiles / per_warp) * per_warp))


def pooled(size: int) -> int:
    return (size - 3) // 2 + 1


def traffic(size: int, c: int, h: int, w: int, full: int, quarter: int, codes: bool) -> float:
    """Bytes of so many tensors like x, so many like y, and the codes."""
    return BATCH * c * (size * full * h * w + (size * quarter + codes) * pooled(h) * pooled(w))


def pooling(backward: bool, codes: bool = True):
    def launch(size: int, channels_last: bool, c: int, h: int, w: int) -> Launch:
        columns, rows = (ceil(w / 2), ceil(h / 2)) if backward else (pooled(w), pooled(h))
        # in NCHW a thread has two columns, and a plane or, of 16-bit elements, two
        of_image = columns * (c * size // 16) if channels_last else ceil(columns / 2) * (c * size // 4)
        threads = BATCH * of_image
        per_tile = tile_rows(threads, rows)
        return Launch(threads / 32 * ceil(rows / per_tile), per_tile, traffic(size, c, h, w, 1, 1, codes))

    return launch


def normalisation(tensors: int, of_pooled: bool = False):
    def launch(size: int, channels_last: bool, c: int, h: int, w: int) -> Launch:
        if of_pooled:
            h, w = pooled(h), pooled(w)
        warps = BATCH * h * w * (c / 8 if channels_last else 1) / 32
        return Launch(warps, 0 if channels_last else c / 8, traffic(size, c, h, w, tensors, 0, False))

    return launch


def tail(backward: bool, codes: bool = True):
    def launch(size: int, channels_last: bool, c: int, h: int, w: int) -> Launch:
        pairs, rows = (ceil(w / 2), ceil(h / 2)) if backward else (pooled(w), pooled(h))
        if backward and not channels_last:  # a thread goes through all channels of four pixels
            return Launch(BATCH * pairs * rows / 32, c / 8, traffic(size, c, h, w, 2, 1, codes))
        shared, lanes, runs = (0 if backward else 1), (8 if channels_last else 32), (4 if channels_last else 1)
        row_lanes = 8
        while row_lanes < min(lanes, pairs + shared):
            row_lanes *= 2
        warps = BATCH * ceil(c / 8 / runs) * ceil(pairs / (row_lanes - shared))
        per_tile = tile_rows(warps * 32, rows, lanes // row_lanes)
        tiles = ceil(ceil(rows / per_tile) / (lanes // row_lanes))
        return Launch(warps * tiles, per_tile, traffic(size, c, h, w, 2 if backward else 1, 1, codes))

    return launch


POOL, LRN, TAIL = r"_max_pool2d_3x3s2_cu_.*\d", r"_local_response_norm_cu_.*\d", r"_relu_lrn_max_pool2d_alexnet_cu_.*\d"
POOL_BACKWARD, TAIL_NCHW = POOL.replace("_cu", "_backward_cu"), TAIL.replace("_cu", "_nchw_cu")
POOL_INFERENCE_SYMBOLS = (POOL + "forward_3x3s2{T}{nhwc}Lb0ELb0E{parity}",)
POOL_SYMBOLS = (POOL + "forward_3x3s2{T}{nhwc}Lb1ELb0E{parity}",)
POOL_BACKWARD_SYMBOLS = (POOL_BACKWARD + "backward_3x3s2_nhwc{T}", POOL_BACKWARD + "backward_3x3s2_nchw{T}{parity}")
LRN_SYMBOLS = (LRN + "forward_nhwc{T}", LRN + "forward_nchw{T}")
LRN_BACKWARD_SYMBOLS = (LRN + "backward_nhwc{T}", LRN + "backward_nchw{T}")
WORK = {
    "max_pool2d forward, inference": [Kernel(pooling(False, False), POOL_INFERENCE_SYMBOLS)],
    "max_pool2d forward": [Kernel(pooling(False), POOL_SYMBOLS)],
    "max_pool2d backward": [Kernel(pooling(True), POOL_BACKWARD_SYMBOLS)],
    "local_response_norm forward": [Kernel(normalisation(2), LRN_SYMBOLS)],
    "local_response_norm backward": [Kernel(normalisation(3), LRN_BACKWARD_SYMBOLS)],
    "relu_lrn_max_pool2d forward, inference": [Kernel(tail(False, False), (TAIL + "forward{T}{nhwc}Lb0E",))],
    "relu_lrn_max_pool2d forward": [Kernel(tail(False), (TAIL + "forward{T}{nhwc}Lb1E",))],
    "relu_lrn_max_pool2d backward": [
        Kernel(tail(True), (TAIL + "backward_nhwc{T}", TAIL_NCHW + "backward_nchw{T}Lb1E")),
    ],
    "relu-pool-lrn forward, inference": [
        Kernel(pooling(False, False), POOL_INFERENCE_SYMBOLS),
        Kernel(normalisation(2, of_pooled=True), LRN_SYMBOLS),
    ],
    "relu-pool-lrn forward": [
        Kernel(pooling(False), POOL_SYMBOLS),
        Kernel(normalisation(2, of_pooled=True), LRN_SYMBOLS),
    ],
    "relu-pool-lrn backward": [
        Kernel(pooling(False, False), POOL_INFERENCE_SYMBOLS),
        Kernel(normalisation(3, of_pooled=True), LRN_BACKWARD_SYMBOLS),
        Kernel(pooling(True), POOL_BACKWARD_SYMBOLS),
    ],
}


def instructions(code: str) -> list[tuple[int, str, str, int | None]]:
    """(address, predicate, operation, target of a branch) of a kernel's SASS."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);", code)
    targets = [re.findall(r"0x([0-9a-f]+)", rest) if name == "BRA" else [] for _, _, name, rest in lines]
    return [(int(at, 16), predicate + ("P" if re.search(r"\bU?P\d", rest) and name == "BRA" else ""), name,
             int(target[-1], 16) if target else None)
            for (at, predicate, name, rest), target in zip(lines, targets, strict=True)]  # fmt: skip


def path(code: str) -> tuple[list[str], list[str]]:
    """Operations outside the loop and of one trip through it."""
    found = instructions(code)
    index = {at: i for i, (at, *_) in enumerate(found)}
    walked: dict[int, str] = {}  # by address, in order
    loop: tuple[int, int] | None = None
    i = 0
    while i < len(found) and found[i][0] not in walked:
        at, predicate, name, target = found[i]
        walked[at] = name
        if name == "PMTRIG" or (name == "EXIT" and not predicate):  # what follows a rare branch's mark is not executed
            break
        i += 1
        if target is None:
            continue
        if target in walked:
            loop = loop or (target, at)
        elif not predicate or any(found[j][2] == "PMTRIG" for j in range(i, index[target])):
            i = index[target]
    order = list(walked)
    if loop is None:
        return list(walked.values()), []
    begin, end = order.index(loop[0]), order.index(loop[1]) + 1
    names = list(walked.values())
    return names[:begin] + names[end:], names[begin:end]


def accesses(names: list[str], kind: str) -> str:
    """For example 16x3 4x2: three accesses of 16 bytes and two of 4."""
    widths = Counter(
        next((size for part, size in (("128", 16), ("64", 8), ("U16", 2), ("U8", 1)) if f".{part}" in name), 4)
        for name in names if name.startswith(kind)
    )  # fmt: skip
    return " ".join(f"{size}x{widths[size]}" for size in sorted(widths, reverse=True))


def rows(library: Path) -> Iterator[tuple[str, ...]]:
    functions = resources.sass(library, ARCHITECTURE)
    for title, kernels in WORK.items():
        for dtype, (mangled, size) in TYPES.items():
            for channels_last in (True, False):
                wanted = [kernel.symbol(mangled, size, channels_last) for kernel in kernels]
                paths = [path(next(code for symbol, code in functions.items() if w.search(symbol))) for w in wanted]
                every = [name for outside, loop in paths for name in outside + loop]
                cells = [title, dtype, "NHWC" if channels_last else "NCHW", accesses(every, "LDG"),
                         accesses(every, "STG")]  # fmt: skip
                for c, h, w in SHAPES:
                    executed, times = 0.0, dict.fromkeys(("issue", "special", "memory"), 0.0)
                    for kernel, (outside, loop) in zip(kernels, paths, strict=True):
                        launch = kernel.launch(size, channels_last, c, h, w)
                        special, special_loop = (sum(n.startswith("MUFU.") for n in names) for names in (outside, loop))
                        count = launch.warps * (len(outside) + launch.trips * len(loop))
                        executed += count
                        times["issue"] += count / (SMS * ISSUE * CLOCK)
                        roots = launch.warps * (special + launch.trips * special_loop)
                        times["special"] += roots / (SMS * SPECIAL * CLOCK)
                        times["memory"] += launch.bytes / COPY_RATE
                    cells.append(f"{executed / (BATCH * c * h * w / 1000):.0f}")
                    cells += [*(f"{t * 1e6:.0f}" for t in times.values()), max(times, key=times.__getitem__)]
                yield tuple(cells)


def markdown(library: Path) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|---|" + "---|" * 2 + ("---:|" * 4 + "---|") * len(SHAPES)]
    lines += [f"| {' | '.join(cells)} |" for cells in rows(library)]
    return INTRODUCTION.format(compiler=resources.compiler()) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    found = resources.library()
    if found is None or resources.tool("cuobjdump") is None:
        sys.exit(f"instruction_counts: {'no cuobjdump' if found else 'the package was built without nvcc'}")
    TABLE.write_text(markdown(found))
