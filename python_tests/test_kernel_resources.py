"""What ptxas says of every kernel: nothing may spill or use a stack frame, on any architecture.

Compiles for one old and one new architecture; ALEXNET_CUDA_ARCHITECTURES=all (or a list such as "80 100") for others.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ["conv2d", "conv2d_mma", "conv2d_weight_grad_mma", "local_response_norm", "max_pool2d", "relu_lrn_max_pool2d"]
KERNELS += ["conv2d_relu_lrn_max_pool2d"]
SOURCES = [*(f"csrc/cuda/{name}.cu" for name in KERNELS), "csrc/emulator/test_kernels.cu"]
ALL = "80 86 89 90a 100 120"
ARCHITECTURES = os.environ.get("ALEXNET_CUDA_ARCHITECTURES", "80 90a").replace("all", ALL).split()
NVCC = shutil.which("nvcc")
COMPILE = ["-std=c++17", "-O3", "--expt-relaxed-constexpr"]
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: Path(s).stem)
def test_no_spills(source, tmp_path):
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = [NVCC, *COMPILE, "-Xptxas=-v", *targets]
    result = subprocess.run(
        [*command, "-cubin" if len(targets) == 1 else "-c", "-o", tmp_path / "out", ROOT / source],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "C7510" not in result.stderr, "a wgmma is serialised"
    kernels = [k.groupdict() for k in KERNEL.finditer(result.stderr)]
    assert len(kernels) == result.stderr.count("Compiling entry function") >= len(ARCHITECTURES)
    guilty = [k for k in kernels if int(k["stack"]) or int(k["stores"]) or int(k["loads"])]
    assert not guilty, "\n".join(f"{k['architecture']} {k['name']}: {k['stack']} bytes of stack" for k in guilty)


def cuobjdump():
    """That of the CUDA toolkit, or the one that comes with Triton."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return shutil.which("cuobjdump") or (bundled if bundled and bundled.exists() else None)


# (channels, filters of a tile) to the instructions of one step: products of 16x8x16, and ldmatrix.
FORWARD = {(c, tile): (tile // 4, 2) for c in (1, 3, 4) for tile in (64, 96)}
SLAB_PAIRS = {1: 2, 3: 3, 4: 4}  # of a warp
WEIGHT_GRAD = {
    (c, tile): (tile // 16 * 2 * SLAB_PAIRS[c], tile // 16 + SLAB_PAIRS[c])
    for c, tile in [(1, 64), (1, 96), (3, 64), (3, 96), (4, 64)]
}
BLOCK = {(3, tile): (24 * tile // 4, 24 * 2) for tile in (64, 96)}  # its 24 steps are unrolled
PRODUCTS = [  # source, kernel, expected, kernels for each: dtypes; for the block also layouts, with and without saving
    ("conv2d_mma", "mma", FORWARD, 2),
    ("conv2d_weight_grad_mma", "weight_grad_mma", WEIGHT_GRAD, 2),
    ("conv2d_relu_lrn_max_pool2d", "block", BLOCK, 8),
]


@pytest.mark.skipif(NVCC is None or cuobjdump() is None, reason="no nvcc or no cuobjdump")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("source", "name", "expected", "copies"), PRODUCTS, ids=[p[0] for p in PRODUCTS])
def test_convolution_is_tensor_core_instructions(source, name, expected, copies, architecture, tmp_path):
    """The loops hold exactly the products that the algorithm needs, and nothing touches local memory."""
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    source = ROOT / f"csrc/cuda/{source}.cu"
    subprocess.run([NVCC, *COMPILE, target, "-cubin", "-o", tmp_path / "out.cubin", source], check=True)
    command = [cuobjdump(), "-sass", tmp_path / "out.cubin"]
    code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kernel = re.compile(rf"Function : \w*\d{name}_kernel\w*Li(\d+)ELi(\d+)E\w*\n(.*?)(?=Function|\Z)", re.DOTALL)
    kernels = kernel.findall(code)
    assert len(kernels) == copies * len(expected)
    for channels, tile, instructions in kernels:
        found = [len(re.findall(rf"\b{i}\b", instructions)) for i in ("HMMA", "LDSM", "STL", "LDL")]
        assert found == [*expected[int(channels), int(tile)], 0, 0], (channels, tile)
