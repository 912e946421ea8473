"""Devices, dtypes and layouts that the op tests share.

What a machine cannot test is skipped with its reason; ALEXNET_CUDA_REQUIRE ("cpu,emulator,cuda") makes a missing part
a failure instead, so that a test run cannot silently test the plain-torch twins against themselves.
"""

import os

import pytest
import torch

from alexnet_cuda import build_info
from alexnet_cuda._library import WHY_NOT

REQUIRED = set(filter(None, os.environ.get("ALEXNET_CUDA_REQUIRE", "").split(",")))
HAS_GPU = torch.cuda.is_available()
torch.backends.cudnn.allow_tf32 = False  # tolerances are those of the dtypes; TF32 has tests of its own


def pytest_report_header():
    return [f"{key}: {value}" for key, value in build_info().items()]


def pytest_configure():
    if "cpu" in REQUIRED and WHY_NOT["cpu"]:
        raise pytest.UsageError(f"ALEXNET_CUDA_REQUIRE: no CPU kernels: {WHY_NOT['cpu']}")
    if "cuda" in REQUIRED and (WHY_NOT["cuda"] or not HAS_GPU):
        raise pytest.UsageError(f"ALEXNET_CUDA_REQUIRE: no CUDA kernels: {WHY_NOT['cuda'] or 'no GPU'}")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_GPU, reason="no GPU"))])
def device(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def dtype(request):
    return request.param


@pytest.fixture(params=["contiguous", "channels_last", "offset", "sliced", "permuted"])
def layout(request):
    return request.param


@pytest.fixture
def kernels():
    """Skips what only compiled kernels do."""
    if WHY_NOT["cpu"]:
        pytest.skip(f"no CPU kernels: {WHY_NOT['cpu']}")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
