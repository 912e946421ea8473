"""What ptxas and the machine code say of every kernel: nothing spills or has a stack frame on any architecture, the
tensor cores' loops hold what they should, and docs/kernel_resources.md is true.

Compiles for one old and one new architecture; ALEXNET_CUDA_ARCHITECTURES=all (or a list such as "80 100") for others.
"""

import os
import re
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import kernel_resources as resources

ROOT = resources.ROOT
TEST_KERNELS = ROOT / "csrc/emulator/test_kernels.cu"
ALL = " ".join(resources.ARCHITECTURES)
ARCHITECTURES = tuple(os.environ.get("ALEXNET_CUDA_ARCHITECTURES", "80 90a").replace("all", ALL).split())
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
no_machine_code = pytest.mark.skipif(resources.cuobjdump() is None, reason="no cuobjdump")


@cache
def compiled(source):
    return resources.compile_kernels(source, ARCHITECTURES)


@pytest.mark.parametrize("source", [*resources.SOURCES, TEST_KERNELS], ids=lambda s: s.stem)
def test_no_spills(source):
    kernels = compiled(source)
    assert {k.architecture for k in kernels} == set(ARCHITECTURES)
    assert not [(k.name, k.architecture) for k in kernels if k.spilled or k.stack or k.count("STL|LDL")]


@no_machine_code
@pytest.mark.parametrize("source", resources.SOURCES, ids=lambda s: s.stem)
def test_table(source):
    version, table = resources.read()
    assert list(table) == [s.name for s in resources.SOURCES], "run benchmarks/kernel_resources.py"
    assert not [key for key, cells in table[source.name].items() if cells[1:3] != ("0", "0")], "spills"
    if version != resources.nvcc_version():
        pytest.skip(f"the numbers are those of {version}")
    expected = {key: cells for key, cells in table[source.name].items() if key[1] in ARCHITECTURES}
    rows = resources.rows(source, compiled(source))
    assert len(rows) == len(compiled(source)), "two kernels have one name"
    assert rows == expected, "run benchmarks/kernel_resources.py"


# (channels, filters of a tile) to the instructions of one step: products of 16x8x16 (TF32: 16x8x8), and ldmatrix.
FORWARD = {(c, tile): (tile // 4, 2) for c in (1, 3, 4) for tile in (64, 96)}
SLAB_PAIRS = {1: 2, 3: 3, 4: 4}  # of a warp
WEIGHT_GRAD = {
    (c, tile): (tile // 16 * 2 * SLAB_PAIRS[c], tile // 16 + SLAB_PAIRS[c])
    for c, tile in [(1, 64), (1, 96), (3, 64), (3, 96), (4, 64)]
}
# Of a shift, 4 products a plane; again in another branch for each plane of which some shifts leave elements out.
INPUT_GRAD = {(c, 0): (4 * (2 * c + again), 4) for c, again in [(1, 1), (3, 1), (4, 2)]}
STEPS = {1: 9, 3: 24, 4: 32}  # of the block, unrolled
BLOCK = {(c, tile): (STEPS[c] * tile // 4, STEPS[c] * 2) for c, tile in [(1, 64), (1, 96), (3, 64), (3, 96), (4, 64)]}
PRODUCTS = [  # source, kernel, expected, kernels for each: dtypes; of the block also layouts, with and without saving
    ("conv2d_mma", "mma", FORWARD, 3),
    ("conv2d_weight_grad_mma", "weight_grad_mma", WEIGHT_GRAD, 3),
    ("conv2d_input_grad_mma", "input_grad_mma", INPUT_GRAD, 3),
    ("conv2d_relu_lrn_max_pool2d", "block", BLOCK, 8),
]


@no_machine_code
@pytest.mark.parametrize(("source", "name", "expected", "copies"), PRODUCTS, ids=[p[0] for p in PRODUCTS])
def test_convolution_is_tensor_core_instructions(source, name, expected, copies):
    """The loops hold exactly the products that the algorithm needs."""
    found = []
    for k in compiled(ROOT / f"csrc/cuda/{source}.cu"):
        if match := re.search(rf"\d{name}_kernelI(\w*?)Li(\d+)E(?:Li(\d+)E)?", k.name):
            found.append((k.architecture, *match.groups(), k.count("HMMA"), k.count("LDSM")))
    assert len(found) == copies * len(expected) * len(ARCHITECTURES)
    for architecture, dtype, channels, tile, products, matrices in found:
        wanted = expected[int(channels), int(tile or 0)]
        if (name, dtype) == ("weight_grad_mma", "f"):
            wanted = wanted[0], 0  # ldmatrix cannot transpose 32-bit elements
        assert (products, matrices) == wanted, (architecture, dtype, channels, tile)


@no_machine_code
def test_wgmma_is_where_it_can_be():
    """Two products of 64 pixels, and one wait, in each of the block's steps; on sm_90a alone."""
    for k in compiled(ROOT / "csrc/cuda/conv2d_relu_lrn_max_pool2d_wgmma.cu"):
        steps = STEPS[int(re.findall(r"Li(\d+)E", k.name)[0])] if k.architecture == "90a" else 0
        found = [k.count(instruction) for instruction in ("HGMMA", "LDSM", r"WARPGROUP\.DEPBAR")]
        assert found == [2 * steps, 2 * steps, steps], (k.name, k.architecture)


def test_names_and_launches():
    text = (ROOT / "csrc/cuda/local_response_norm.cu").read_text() + (ROOT / "csrc/cuda/lrn.h").read_text()
    symbol = "_ZN12alexnet_cuda12_GLOBAL__N_114spatial_kernelIfLNS0_4PassE1EEEvPKT_S5_PS3_Pf"
    problem = "_ZN12alexnet_cuda19lrn_backward_kernelINS_12_GLOBAL__N_18BackwardI6__halfLb1ELb0EEEEEvT_"
    names = resources.plain_names([symbol, problem], text)
    plain = [(name, [resources.plain_argument(*a, text) for a in arguments]) for name, arguments in names.values()]
    assert plain == [("spatial_kernel", ["float", "terms"]),
                     ("lrn_backward_kernel", ["Backward", "half", "NHWC", "any LRN"])]  # fmt: skip
    assert resources.dynamic_shared("lrn_backward_tile_kernel", {}, text) == " + n"
    assert resources.dynamic_shared("lrn_backward_kernel", {}, text) == ""
    launch = """constexpr int kRows = 128 / 2, kWide = 4 * kRows; template <int kTile> constexpr int kRow = kTile + 8;
        constexpr int kBytes = std::max(2 * kChannels * kRow<kTile>, kWide);
        return gpu::launch(kernel<T, kChannels>, dim3(1, divide_up(2, kTile)), dim3(2), kBytes, stream, x);"""
    assert resources.dynamic_shared("kernel", {"kChannels": "3", "kTile": "96"}, launch) == " + 624"
