"""The axes of the operator tests: device, dtype, memory layout.

The devices are `cpu`, `emulated` (the CUDA kernels, run on the CPU: docs/emulator.md) and `cuda`. A test with the
fixture `device` runs on each of them that this machine has, or on those that `@pytest.mark.devices("cpu", "cuda")`
names. ALEXNET_CUDA_REQUIRE ("cpu,emulated,cuda") makes a missing one an error, so that no run passes by comparing
plain torch with itself.
"""

import os
from contextlib import nullcontext

import pytest
import torch
from helpers import HAS_GPU, _emulated, emulated_operators, emulator

from alexnet_cuda import _library

WITH_KERNELS = {
    "cpu": "cpu" in _library.KERNEL_DTYPES,
    "emulated": "cpu" in _library.KERNEL_DTYPES and _emulated is not None,
    "cuda": "cuda" in _library.KERNEL_DTYPES and HAS_GPU,
}
AVAILABLE = WITH_KERNELS | {"cpu": True, "cuda": HAS_GPU}  # there, plain torch takes the place of a missing library
collect_ignore_glob = [] if AVAILABLE["emulated"] else ["test_emulator*.py"]
torch.backends.cudnn.allow_tf32 = False  # tolerances are those of the dtypes; TF32 has tests of its own
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


def pytest_report_header():
    devices = ", ".join(name for name, available in AVAILABLE.items() if available)
    return [f"devices: {devices}", *(f"{key}: {value}" for key, value in _library.build_info().items())]


def pytest_configure():
    for name in filter(None, os.environ.get("ALEXNET_CUDA_REQUIRE", "").split(",")):
        if not WITH_KERNELS.get(name):
            raise pytest.UsageError(f"ALEXNET_CUDA_REQUIRE: no {name} kernels on this machine")


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("devices")
        metafunc.parametrize("device", marker.args if marker else list(AVAILABLE), indirect=True)


def is_collected(item):
    """Not on devices that this machine lacks. On the emulator, neither float64, for which CUDA has no kernels, nor
    every dtype of a strided input: it is copied before a kernel reads it."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    device, dtype, layout = (params.get(name) for name in ("device", "dtype", "layout"))
    if device != "emulated":
        return AVAILABLE.get(device, True)
    copied = layout in ("offset", "sliced", "permuted") and dtype not in (None, torch.float16)
    return AVAILABLE["emulated"] and dtype != torch.float64 and not copied


def pytest_collection_modifyitems(items):
    items[:] = filter(is_collected, items)


@pytest.fixture
def device(request, monkeypatch):
    """The torch device; while it is used for `emulated`, the operators of CPU tensors are those on the emulator."""
    if request.param != "emulated":
        yield request.param
        return
    monkeypatch.setitem(_library.KERNEL_DTYPES, "cpu", _library.KERNEL_DTYPES["cpu"] - {torch.float64})
    with emulated_operators():
        yield "cpu"


@pytest.fixture(params=[torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def dtype(request):
    return request.param


@pytest.fixture(params=["contiguous", "channels_last", "offset", "sliced", "permuted"])
def layout(request):
    return request.param


@pytest.fixture
def kernels():
    """Skips what only compiled kernels do."""
    if reason := _library.UNAVAILABLE_REASON["cpu"]:
        pytest.skip(f"no CPU kernels: {reason}")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with emulator() if AVAILABLE["emulated"] else nullcontext():
        yield
