"""What ptxas says of every kernel: nothing may spill or use a stack frame, on any architecture.

Compiles for one old and one new architecture; ALEXNET_CUDA_ARCHITECTURES=all (or a list such as "80 100") for others.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    *(f"csrc/cuda/{op}.cu" for op in ("conv2d", "local_response_norm", "max_pool2d", "relu_lrn_max_pool2d")),
    "csrc/emulator/test_kernels.cu",
]
ALL = "80 86 89 90a 100 120"
ARCHITECTURES = os.environ.get("ALEXNET_CUDA_ARCHITECTURES", "80 90a").replace("all", ALL).split()
NVCC = shutil.which("nvcc")
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
    command = [NVCC, "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", *targets]
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
