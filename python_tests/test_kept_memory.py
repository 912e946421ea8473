"""CPU results in memory that earlier ones left (csrc/cpu/memory.h)."""

import copy
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch

import alexnet_cuda
from alexnet_cuda import ops

pytestmark = pytest.mark.usefixtures("kernels")
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _limit():
    before = alexnet_cuda.set_kept_memory(0)
    alexnet_cuda.set_kept_memory(64 * MIB)
    yield
    alexnet_cuda.set_kept_memory(before)


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


def test_results_in_use_share_nothing():
    ys = [result(fill=float(i)) for i in range(5)]
    assert len({y.data_ptr() for y in ys}) == 5
    assert [y.unique().tolist() for y in ys] == [[float(i)] for i in range(5)]


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


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_more_than_the_limit_is_kept():
    x = torch.zeros(64, 64, 64, 64)  # 64 MiB
    alexnet_cuda.set_kept_memory(0)
    ops.max_pool2d(x, 1, 1)
    before = resident()
    del_after = [ops.max_pool2d(x, 1, 1) for _ in range(4)]
    assert resident() - before > 200 * MIB
    del del_after
    assert resident() - before < 32 * MIB
    alexnet_cuda.set_kept_memory(150 * MIB)
    held = [ops.max_pool2d(x, 1, 1) for _ in range(4)]
    del held
    assert 100 * MIB < resident() - before < 150 * MIB + 16 * MIB
    alexnet_cuda.set_kept_memory(0)
    assert resident() - before < 32 * MIB


def test_copies_and_shared_memory():
    y = result(fill=5.0)
    for other in (copy.deepcopy(y), pickle.loads(pickle.dumps(y)), y.clone().share_memory_(), y.share_memory_()):
        assert other.unique().tolist() == [5.0]


def test_threads():
    """Results of several sizes come and go in several threads; nobody sees another's numbers."""
    wrong = []

    def work(seed):
        order = torch.Generator().manual_seed(seed)
        held = []
        for step in range(40):
            mib = int(torch.randint(1, 5, (), generator=order))
            held.append((seed * 100 + step, result(mib, fill=float(seed * 100 + step))))
            if len(held) > 3:
                value, y = held.pop(int(torch.randint(4, (), generator=order)))
                if y.min() != value or y.max() != value:
                    wrong.append((value, y.min().item(), y.max().item()))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def run(code, mib):
    return subprocess.run([sys.executable, "-c", f"import alexnet_cuda; {code}"], capture_output=True, text=True,
                          env={**os.environ, "ALEXNET_CUDA_KEPT_MIB": mib})  # fmt: skip


def test_environment_variable_and_bad_limits():
    assert run("print(alexnet_cuda.build_info()['CPU memory kept'])", "7").stdout == "up to 7 MiB\n"
    assert "ALEXNET_CUDA_KEPT_MIB: expected a whole number of MiB, got 'much'" in run("", "much").stderr
    assert run("print(alexnet_cuda.set_kept_memory(1), alexnet_cuda.set_kept_memory(2))", "0").stdout == "0 1\n"
    with pytest.raises(ValueError, match="expected limit to be at least 0, got -1"):
        alexnet_cuda.set_kept_memory(-1)
