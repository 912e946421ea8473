"""What the built CUDA library says of its kernels: nothing spills, the tensor cores' loops hold exactly the products
that they need, and docs/kernel_resources.md is true."""

import re

import instruction_counts as counts
import kernel_resources as resources
import pytest

from alexnet_cuda import _library

LIBRARY = resources.library()
pytestmark = pytest.mark.skipif(
    LIBRARY is None or resources.tool("cuobjdump") is None, reason="no CUDA library or no cuobjdump"
)


@pytest.fixture(scope="module")
def kernels():
    if all(name.endswith("-virtual") for name in _library.CUDA_ARCHITECTURES.split()):
        pytest.skip("the library holds PTX alone")
    return resources.kernels(LIBRARY)


def test_no_kernel_spills(kernels):
    assert len(kernels) > 200
    assert not [k for k in kernels if k.stack or k.instructions["LDL"] or k.instructions["STL"]]


def test_table(kernels):
    version, table = resources.read()
    built = {k.architecture for k in kernels}
    if version != resources.compiler():
        pytest.skip(f"the table is of nvcc {version}")
    expected = {key: cells for key, cells in table.items() if key[1] in built}
    assert resources.rows(kernels) == expected, "run benchmarks/kernel_resources.py"
    assert resources.markdown(version, table) == resources.TABLE.read_text()


def test_instruction_counts(kernels):
    """docs/instruction_counts.md is true, and AlexNets' pooling, LRN and tails stay below what they may cost."""
    if resources.compiler() != resources.read()[0] or counts.ARCHITECTURE not in {k.architecture for k in kernels}:
        pytest.skip("the table is of another compiler or architecture")
    assert counts.markdown(LIBRARY) == counts.TABLE.read_text(), "run benchmarks/instruction_counts.py"


# (channels, filters of a tile) to the instructions of one step: products of 16x8x16 (TF32: 16x8x8), and ldmatrix.
# TF32x3 has three products for each.
TILES = [(1, 64), (1, 96), (3, 64), (3, 96), (4, 64)]
FORWARD = {(c, tile): (tile // 4, 2) for c in (1, 3, 4) for tile in (64, 96)}
SLICES = {1: 2, 3: 3, 4: 4}  # pairs of the K dimension's slices, of a warp
WEIGHT_GRAD = {(c, tile): (tile // 16 * 2 * SLICES[c], tile // 16 + SLICES[c]) for c, tile in TILES}
# 4 products per channel group and shift; again in another branch for each group of which some shifts leave elements out
INPUT_GRAD = {(c, 0): (4 * (2 * c + again), 4) for c, again in [(1, 1), (3, 1), (4, 2)]}
INPUT_GRAD_TF32X3 = {(c, 0): (3 * 2 * 2 * c, 2) for c in (1, 3, 4)}  # its step has half as many filters, and no branch
STEPS = 24  # of the first block, unrolled
BLOCK = {(3, tile): (STEPS * tile // 4, STEPS * 2) for tile in (64, 96)}
PRODUCTS = [  # kernel, expected, kernels for each: dtypes; of the first block also formats, with and without saving
    ("conv2d_mma: mma", FORWARD, 4),
    ("conv2d_weight_grad_mma: weight_grad_mma", WEIGHT_GRAD, 4),
    ("conv2d_input_grad_mma: input_grad_mma", INPUT_GRAD, 4),
    ("conv2d_relu_lrn_max_pool2d: block", BLOCK, 8),
    ("conv2d_relu_lrn_max_pool2d_streamed: block", BLOCK, 8),
]


BLOCK_BYTES = {(64, False): 160768, (64, True): 175616, (96, False): 203392, (96, True): 225664}  # saves NCHW or not


def is_launched(kernel):
    """Whether GPUs that run the machine code of a kernel of the first block choose it, by their shared memory."""
    if not all(name.endswith("-real") for name in _library.CUDA_ARCHITECTURES.split()):
        return True
    architecture = int(re.findall(r"\d+", kernel.architecture)[0])
    tile, nhwc, saves = re.search(r"Layout\w+?Li(\d+)ELb.EEELb(.)ELb(.)E", kernel.symbol).groups()
    needed = BLOCK_BYTES[int(tile), (nhwc, saves) == ("0", "1")]
    most = 1024 * (227 if 90 <= architecture < 120 else 163 if architecture in (80, 87) else 99)
    if "streamed" in kernel.title:
        return needed > (99 * 1024 if architecture == 80 else most)  # machine code for 8.0 runs on 8.6, too
    return needed <= most


@pytest.mark.parametrize(("title", "expected", "copies"), PRODUCTS, ids=[p[0] for p in PRODUCTS])
def test_convolutions_are_tensor_core_instructions(title, expected, copies, kernels):
    found = [k for k in kernels if k.title == title]
    without = title.startswith("conv2d_weight_grad_mma")  # 4 channels of TF32x3
    assert len(found) == (copies * len(expected) - without) * len({k.architecture for k in kernels})
    for k in found:
        dtype, channels, tile = re.search(r"_kernelI(\w*?)Li(\d+)E(?:Li(\d+)E)?", k.symbol).groups()
        products, matrices = expected[int(channels), int(tile or 0)]
        if "weight_grad" in title and (dtype == "f" or "TF32x3" in dtype):
            matrices = 0  # ldmatrix cannot transpose 32-bit elements
        if "TF32x3" in dtype:
            products = 3 * products
            if "weight_grad" in title and int(re.findall(r"\d+", k.architecture)[0]) >= 100:
                products = 0
            if "input_grad" in title:
                products, matrices = INPUT_GRAD_TF32X3[int(channels), 0]
        if "block" in title and not is_launched(k):
            products = matrices = 0
        assert (k.instructions["HMMA"], k.instructions["LDSM"]) == (products, matrices), (k.symbol, k.architecture)


def test_wgmma_is_where_it_can_be(kernels):
    """Two products of 64 pixels, and one wait, in each of the first block's steps; in code for sm_90a alone."""
    for k in (k for k in kernels if k.title.startswith("conv2d_relu_lrn_max_pool2d_wgmma:")):
        steps = STEPS if k.architecture == "90a" else 0
        found = [k.instructions[name] for name in ("HGMMA", "LDSM", "WARPGROUP")]
        assert found == [2 * steps, 2 * steps, 2 * steps], (k.symbol, k.architecture)  # WARPGROUP: arrive and wait
