"""The CPU caching allocator (csrc/cpu/memory.h): results in memory of freed ones."""

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from alexnet_cuda import _library, ops

pytestmark = pytest.mark.usefixtures("kernels")
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _limit():
    before = set_limit(0)
    set_limit(64 * MIB)
    yield
    set_limit(before)


def set_limit(limit):
    """In bytes; returns the limit before."""
    return _library._C.set_cache_limit(limit)


def result(mib=2, fill=1.0):
    """A result of `mib` MiB, each element of which is `fill`."""
    return ops.max_pool2d(torch.full((mib, 64, 64, 64), fill), 1, 1)


def test_a_freed_result_serves_the_next_of_about_its_size():
    y = result()
    address = y.data_ptr()
    del y
    z = result(fill=2.0)
    assert z.data_ptr() == address
    assert z.unique().tolist() == [2.0]


def test_a_view_keeps_the_memory():
    view = result(fill=3.0)[1]
    others = [result(fill=4.0) for _ in range(3)]
    assert view.unique().tolist() == [3.0]
    assert others[0].unique().tolist() == [4.0]


@pytest.mark.parametrize("shape", [(2, 8, 500, 500), (1, 8, 500, 500)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_strides_are_those_of_torch(shape, layout):
    x = torch.randn(shape).to(memory_format=layout)
    y = torch.ops.alexnet_cuda.local_response_norm(x, 5, 2, 1e-4, 0.75, 1.0, 1, False)
    assert y.stride() == torch.empty(shape, memory_format=layout).stride()
    assert y.is_contiguous(memory_format=layout)


LIMITS = """
import os, torch
from alexnet_cuda import _library, ops

MIB = 2**20

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

set_limit = _library._C.set_cache_limit
x = torch.zeros(64, 64, 64, 64)  # 64 MiB
set_limit(0)
ops.max_pool2d(x, 1, 1)
before = resident()
held = [ops.max_pool2d(x, 1, 1) for _ in range(4)]
assert resident() - before > 200 * MIB
del held
assert resident() - before < 32 * MIB
set_limit(150 * MIB)
held = [ops.max_pool2d(x, 1, 1) for _ in range(4)]
del held
assert 100 * MIB < resident() - before < 150 * MIB + 16 * MIB
set_limit(0)
assert resident() - before < 32 * MIB
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_more_than_the_limit_is_cached():
    """In a process of its own: training in this one may have told glibc to keep freed memory."""
    result = subprocess.run([sys.executable, "-c", LIMITS], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_negative_limit_is_none():
    result()
    set_limit(-1)
    assert set_limit(64 * MIB) == 0


def test_copies_and_shared_memory():
    y = result(fill=5.0)
    for other in (copy.deepcopy(y), pickle.loads(pickle.dumps(y)), y.clone().share_memory_(), y.share_memory_()):
        assert other.unique().tolist() == [5.0]


def test_threads():
    """Results of several sizes come and go in several threads; nobody sees another's numbers."""

    def work(seed):
        order = torch.Generator().manual_seed(seed)
        held = []
        for step in range(40):
            mib = int(torch.randint(1, 5, (), generator=order))
            held.append((seed * 100 + step, result(mib, fill=float(seed * 100 + step))))
            if len(held) > 3:
                value, y = held.pop(int(torch.randint(4, (), generator=order)))
                assert y.min() == y.max() == value

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_environment_variable(monkeypatch):
    """Read when the library is loaded."""
    for value, limit in (("7", 7 * MIB), ("0", 0)):
        monkeypatch.setenv("ALEXNET_CUDA_CACHE_MIB", value)
        _library._load_cpu()
        assert _library.build_info()["CPU cache"] == f"up to {value} MiB of freed results"
        assert set_limit(1) == limit
    monkeypatch.setenv("ALEXNET_CUDA_CACHE_MIB", "much")
    with pytest.raises(ValueError, match="ALEXNET_CUDA_CACHE_MIB: expected a whole number of MiB, got 'much'"):
        _library._load_cpu()
