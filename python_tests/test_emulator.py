"""The emulator itself, and CUDA kernels on it where the operators' own tests do not reach: one case per kernel in
another order of threads and with inputs behind unaligned addresses, large shapes, special values.

All other tests run the threads of a block in random order: a kernel whose result depends on it lacks a barrier."""

from functools import partial

import numpy as np
import pytest
import torch
from helpers import (
    SETTINGS,
    _emulated,
    assert_close,
    assert_matches,
    emulator,
    exact_lrn,
    exact_tail,
    in_layout,
    round_to_tf32,
)

from alexnet_cuda import ops, reference
from alexnet_cuda.reference import ORDERS

op = torch.ops.alexnet_cuda_emulated

NAMES = {torch.float16: "half", torch.bfloat16: "bfloat16"}
halves = pytest.mark.parametrize("dtype", list(NAMES), ids=lambda d: str(d)[6:])
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


# ---- kernels -------------------------------------------------------------------------------------------------------


def check(function, exact, arguments, x):
    """Output and gradient against float64, and that the output has the same bits where nothing is differentiated."""
    function = partial(function, **arguments)
    y, _ = assert_matches(function, partial(exact, **arguments), [x])
    assert function(x).equal(y)


TAIL = dict(size=5, alpha=0.3, k=2.0)
KERNELS = {
    "lrn": (ops.local_response_norm, exact_lrn, TAIL, (2, 24, 5, 7)),
    "spatial-lrn": (ops.local_response_norm, exact_lrn, dict(size=3, alpha=0.5, across="spatial"), (2, 3, 7, 5)),
    "pool": (ops.max_pool2d, reference.max_pool2d, {}, (2, 8, 9, 7)),
    **{o: (ops.relu_lrn_max_pool2d, exact_tail, TAIL | dict(order=o), (2, 24, 9, 11)) for o in ORDERS},
}


@pytest.mark.devices("emulated")
@layouts
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_settings(kernel, setting, layout, dtype, device):
    *kernel, shape = KERNELS[kernel]
    with emulator(**setting):
        check(*kernel, in_layout(torch.randn(shape).to(dtype), layout))


@pytest.mark.devices("emulated")
@layouts
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(1, 96, 55, 55), (1, 256, 27, 27)], ids=["first-block", "second-block"])
def test_relu_lrn_max_pool2d_of_a_whole_image(shape, order, layout, device):
    check(*KERNELS[order][:3], in_layout(torch.randn(shape).bfloat16(), layout))


@pytest.mark.devices("emulated")
@pytest.mark.parametrize(("channels", "size", "groups"), [(2**19 + 8, 5, 1), (2**16, 3, 2**16)])
def test_more_channels_than_a_grid_has_rows(channels, size, groups, device):
    x, options = torch.randn(1, channels, 1, 1), dict(size=size, alpha=0.1 * size, groups=groups)
    exact = lambda x: reference.local_response_norm(x, **options)
    assert_matches(lambda x: ops.local_response_norm(x, **options), exact, [x])
    y = ops.relu_lrn_max_pool2d(x, **options, order="lrn-pool-relu", kernel_size=1, stride=1)
    assert_close(y, exact(x.double()).relu())


@layouts
def test_subnormal_sums_without_k(layout):
    x = in_layout(torch.full((1, 16, 1, 2), 1e-20), layout)
    y = op.local_response_norm(x, 5, 2, 0.2, 0.75, 0.0, 1, False)
    assert_close(y, reference.local_response_norm(x.double(), 5, 1.0, k=0.0))


# ---- the emulator --------------------------------------------------------------------------------------------------


def run(name, values, outputs):
    x = values.contiguous()
    return torch.from_numpy(
        _emulated.run_test_kernel(name, (x.view(torch.uint16) if x.element_size() == 2 else x).numpy().ravel(), outputs)
    )


def test_shuffles():
    x = torch.randn(32)
    groups, lanes = x.view(4, 8), torch.arange(32)
    expected = [groups.sum(1).repeat_interleave(8), x[(lanes - 1).clamp(min=0)],
                x[torch.where(lanes % 4 < 3, lanes + 1, lanes)], x[3].expand(32)]  # fmt: skip
    torch.testing.assert_close(run("shuffles", x, 128), torch.cat(expected))


def test_shared_memory_and_asynchronous_copies():
    x = torch.randn(512)
    assert torch.equal(run("reverse", x[:128], 128), x[:128].flip(0))
    assert torch.equal(run("warp_exchange", x[:64], 64), x[:64].view(32, 2).flip(1).ravel())
    assert torch.equal(run("copies", x, 512), torch.where(torch.arange(512) // 4 % 4 == 3, 0.0, x))


@halves
def test_maxima(dtype):
    a, b = torch.randn(2, 32)
    a[:8] = torch.tensor([torch.nan, 1.0, 0.0, -0.0, -0.0, torch.inf, 1e-40, -1.0])
    b[:8] = torch.tensor([1.0, torch.nan, -0.0, 0.0, -0.0, torch.nan, -1.0, 1e-40])
    got = run(f"maxima_{NAMES[dtype]}", torch.cat([a, b]), 160).view(5, 32)
    expected = torch.maximum(a, b)
    expected[2:4] = 0.0  # not -0
    rounded = torch.maximum(a.to(dtype), b.to(dtype)).float()
    rounded[2:4] = 0.0
    for value, want in zip(got, [expected, rounded, rounded]):
        torch.testing.assert_close(value, want, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(value[2:5].signbit(), torch.tensor([False, False, True]))
    normal = expected.where(expected != 1e-40, 0.0)  # what is subnormal counts as 0
    torch.testing.assert_close(got[3:], torch.stack([normal.rsqrt(), normal.sqrt()]), equal_nan=True)


def test_too_much_shared_memory():
    with emulator(shared_memory=0), pytest.raises(_emulated.Error, match=r"invalid launch .* bytes of shared memory"):
        run("reverse", torch.zeros(128), 128)


@halves
def test_tensor_cores(dtype):
    name = NAMES[dtype]
    a, b = torch.randn(64, 16).to(dtype), torch.randn(96, 16).to(dtype)
    exact = a.double() @ b.double().T

    def check(actual, expected):
        torch.testing.assert_close(actual.view(expected.shape).double(), expected, rtol=1e-5, atol=1e-5)

    check(run(f"matrix_product_{name}", torch.cat([a[:16], b[:8]]), 128), exact[:16, :8])
    check(run(f"transposed_product_{name}", torch.cat([a[:16].ravel(), b[:8].T.ravel()]), 128), exact[:16, :8])
    for n in (96, 64):
        check(run(f"warpgroup_product_{n}_{name}", torch.cat([a, b[:n]]), 64 * n), 2 * exact[:, :n])


def test_tf32_tensor_cores():
    a, b = torch.randn(16, 8), torch.randn(8, 8)
    exact = round_to_tf32(a).double() @ round_to_tf32(b).double().T
    d = run("matrix_product_tf32", torch.cat([a, b]), 128).view(16, 8)
    torch.testing.assert_close(d.double(), exact, rtol=1e-5, atol=1e-5)


MISTAKES = {
    "missing_barrier": "uninitialised|without a barrier",
    "missing_second_barrier": "without a barrier",
    "two_writers": "overwrites what was written",
    "warp_barrier_for_block": "uninitialised|without a barrier",
    "warpgroup_barrier_for_block": "uninitialised|without a barrier",
    "read_out_of_bounds": "out of bounds: bytes 256 to 259 of an array of 256",
    "write_out_of_bounds": "out of bounds: bytes -4 to -1",
    "uninitialised": "uninitialised",
    "misaligned": "misaligned",
    "divergent_barrier": "deadlock: 40 of 64 threads in __syncthreads .*; 24 of 64 threads returned",
    "two_barriers": "divergence",
    "divergent_shuffle": "deadlock: .* in a warp operation",
    "missing_wait": "not waited for yet",
    "wait_after_barrier": "not waited for yet|without a barrier",
    "copy_at_the_end": "ends before it has waited for its copies",
    "global_write_out_of_bounds": "wrote outside an array",
    "misaligned_global_read": r"misaligned access to global memory at broken_kernels.cu:\d+: \d+ bytes behind",
    "misaligned_global_write": "misaligned access to global memory",
}


def test_every_mistake_is_listed():
    assert sorted(MISTAKES) == _emulated.broken_kernels()


@pytest.mark.parametrize("order", ["ascending", "descending", "random"])
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found(name, order):
    """One mistake per kernel, found in every order of the threads, with a message that says where."""
    with emulator(order), pytest.raises(_emulated.Error, match=MISTAKES[name]) as caught:
        _emulated.run_broken_kernel(name, np.zeros(128, np.float32), 128)
    assert "broken_kernels.cu:" in str(caught.value)
    if name != "global_write_out_of_bounds":
        assert "block (0, 0, 0)" in str(caught.value)
