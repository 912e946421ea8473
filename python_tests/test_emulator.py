"""The CUDA kernels, run on the CPU by csrc/emulator, against the plain-torch reference in float64.

Every test runs with the fibers in ascending, descending and random order: a kernel whose result depends on the order
in which its threads run lacks a barrier.
"""

import importlib

import numpy as np
import pytest
import torch
from conftest import REQUIRED
from helpers import TOLERANCE, assert_close

from alexnet_cuda import reference

try:
    _emulator = importlib.import_module("alexnet_cuda._emulator")
except ModuleNotFoundError:
    if "emulator" in REQUIRED:
        raise
    pytest.skip("alexnet_cuda._emulator is not built (cmake -DALEXNET_CUDA_EMULATOR=ON)", allow_module_level=True)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])


@pytest.fixture(params=["ascending", "descending", "random"], autouse=True)
def fibers(request):
    _emulator.set_order(request.param, 7)


def random(*shape, dtype=torch.float32, scale=1.0):
    """Values that `dtype` holds exactly, in float64."""
    return (scale * torch.randn(*shape)).to(dtype).double()


class Batch:
    """What the emulator's functions take and give, as float64 tensors in NCHW."""

    def __init__(self, shape, dtype, channels_last):
        self.dtype, self.channels_last = dtype, channels_last
        self.images = (str(dtype)[6:], channels_last, *shape)

    def raw(self, x, image=True):
        if image and self.channels_last:
            x = x.permute(0, 2, 3, 1)
        x = x.contiguous() if x.dtype == torch.uint8 else x.to(self.dtype).contiguous()
        return (x.view(torch.uint16) if x.element_size() == 2 else x).numpy().ravel()

    def tensor(self, raw, shape, image=True):
        x = torch.from_numpy(np.ascontiguousarray(raw))
        x = x.view(self.dtype) if x.element_size() == 2 else x
        if image and self.channels_last:
            n, c, h, w = shape
            return x.view(n, h, w, c).permute(0, 3, 1, 2)
        return x.view(shape)


def gradient(function, x, grad):
    x = x.clone().requires_grad_()
    y = function(x)
    return torch.autograd.grad(y, x, grad)[0]


# ---- local response normalisation ----------------------------------------------------------------------------------

LRN = [  # shape, size, alpha, beta, k, groups, window, across
    pytest.param((2, 24, 5, 7), 5, 0.3, 0.75, 2.0, 1, "torch", "channels", id="alexnet"),
    pytest.param((1, 40, 3, 3), 5, 0.3, 0.75, 1.0, 2, "torch", "channels", id="groups-of-20"),
    pytest.param((2, 12, 3, 5), 5, 0.3, 0.75, 1.0, 2, "torch", "channels", id="groups-of-6"),
    pytest.param((1, 3, 4, 5), 5, 0.3, 0.75, 1.0, 1, "torch", "channels", id="three-channels"),
    pytest.param((3, 10, 1, 1), 4, 0.5, 0.75, 1.0, 1, "torch", "channels", id="even-torch"),
    pytest.param((1, 10, 3, 2), 4, 0.5, 0.6, 1.5, 1, "onnx", "channels", id="even-onnx"),
    pytest.param((1, 70, 2, 3), 3, 0.5, 0.5, 1.0, 2, "torch", "channels", id="two-chunks"),
    pytest.param((1, 8, 3, 3), 21, 0.5, 1.0, 1.0, 1, "torch", "channels", id="window-wider-than-channels"),
    pytest.param((1, 4, 2, 2), 1, 0.5, 0.75, 1.0, 1, "torch", "channels", id="window-of-one"),
    pytest.param((2, 3, 7, 5), 3, 0.5, 0.75, 1.0, 1, "torch", "spatial", id="spatial"),
    pytest.param((1, 2, 5, 6), 4, 0.5, 0.6, 1.0, 1, "onnx", "spatial", id="spatial-even"),
]


@dtypes
@layouts
@pytest.mark.parametrize(("shape", "size", "alpha", "beta", "k", "groups", "window", "across"), LRN)
def test_local_response_norm(shape, size, alpha, beta, k, groups, window, across, dtype, channels_last):
    front, scale = reference.lrn_constants("", shape, size, alpha, groups, True, window, across)
    lrn, spatial = (size, front, scale, beta, k, groups), across == "spatial"
    batch, x, grad = Batch(shape, dtype, channels_last), random(*shape, dtype=dtype), random(*shape, dtype=dtype)

    def exact(x):
        return reference.local_response_norm(x, size, alpha, beta, k, groups=groups, window=window, across=across)

    y = _emulator.local_response_norm(batch.images, batch.raw(x), lrn, spatial)
    assert_close(batch.tensor(y, shape), exact(x))
    dx = _emulator.local_response_norm_backward(batch.images, batch.raw(grad), batch.raw(x), lrn, spatial)
    assert_close(batch.tensor(dx, shape), gradient(exact, x, grad))


@layouts
def test_local_response_norm_of_extremes(channels_last):
    """The largest half squares to 4e9: the sums must be wider than the values. With k = 0, windows of zeros are NaN, as
    in torch, and no other elements are."""
    batch, x = Batch((1, 16, 1, 2), torch.float16, channels_last), torch.full((1, 16, 1, 2), 65504.0).double()
    y = batch.tensor(
        _emulator.local_response_norm(batch.images, batch.raw(x), (5, 2, 2e-5, 0.75, 2.0, 1), False), x.shape
    )
    assert_close(y, reference.local_response_norm(x, 5, 1e-4, 0.75, 2.0))
    x[:, 4:] = 0
    y = batch.tensor(
        _emulator.local_response_norm(batch.images, batch.raw(x), (5, 2, 0.2, 0.75, 0.0, 1), False), x.shape
    )
    assert y[:, :4].isfinite().all()
    assert y[:, 6:].isnan().all()
    batch, x = Batch((1, 16, 1, 2), torch.float32, channels_last), torch.full((1, 16, 1, 2), 1e-20).double()
    y = batch.tensor(  # d is subnormal
        _emulator.local_response_norm(batch.images, batch.raw(x), (5, 2, 0.2, 0.75, 0.0, 1), False), x.shape
    )
    assert_close(y, reference.local_response_norm(x, 5, 1.0, k=0.0))
    x, lrn = random(1, 16, 1, 2), (5, 2, 0.2, 0.75, 0.0, 1)
    x[:, :2] = x[:, 14:] = 0  # a window that reaches two channels over the edge finds only zeros
    batch, grad = Batch((1, 16, 1, 2), torch.float32, channels_last), torch.ones(1, 16, 1, 2).double()
    dx = batch.tensor(
        _emulator.local_response_norm_backward(batch.images, batch.raw(grad), batch.raw(x), lrn, False), x.shape
    )
    assert_close(dx, gradient(lambda x: reference.local_response_norm(x, 5, 1.0, k=0.0), x, grad))


@pytest.mark.parametrize("fibers", ["ascending"], indirect=True)
@pytest.mark.parametrize(("channels", "size", "groups"), [(2**19 + 8, 5, 1), (2**16, 3, 2**16)])
def test_more_channels_than_a_grid_has_rows(channels, size, groups):
    shape, lrn, pool = (1, channels, 1, 1), (size, size // 2, 0.1, 0.75, 1.0, groups), (1, 1, 0, False)
    batch, x = Batch(shape, torch.float32, False), random(*shape)
    y = reference.local_response_norm(x, size, 0.1 * size, groups=groups)
    dx = gradient(lambda x: reference.local_response_norm(x, size, 0.1 * size, groups=groups), x, y)
    assert_close(batch.tensor(_emulator.local_response_norm(batch.images, batch.raw(x), lrn, False), shape), y)
    got = _emulator.local_response_norm_backward(batch.images, batch.raw(y), batch.raw(x), lrn, False)
    assert_close(batch.tensor(got, shape), dx)
    tail, _ = _emulator.relu_lrn_max_pool2d(batch.images, batch.raw(x), 2, lrn, pool, False)
    assert_close(batch.tensor(tail, shape), y.relu())


# ---- max pooling ---------------------------------------------------------------------------------------------------

POOL = [  # shape, kernel_size, stride, padding, ceil_mode
    pytest.param((2, 4, 9, 7), 3, 2, 0, False, id="alexnet"),
    pytest.param((1, 3, 8, 6), 3, 2, 0, True, id="ceil"),
    pytest.param((1, 8, 6, 7), 3, 2, 1, False, id="padding"),
    pytest.param((1, 4, 7, 7), 2, 3, 1, True, id="gaps"),
    pytest.param((1, 1, 16, 17), 15, 4, 7, True, id="largest"),
    pytest.param((2, 5, 4, 4), 3, 1, 1, False, id="stride-one"),
]


def special(shape, dtype):
    """Few different values, so that windows have ties, and some NaN and infinities."""
    x = torch.randint(-2, 3, shape).to(dtype).double()
    x.view(-1)[:: max(2, x.numel() // 9)] = torch.nan
    x.view(-1)[1 :: max(2, x.numel() // 7)] = -torch.inf
    return x


@dtypes
@layouts
@pytest.mark.parametrize("values", ["random", "special"])
@pytest.mark.parametrize(("shape", "kernel_size", "stride", "padding", "ceil_mode"), POOL)
def test_max_pool2d(shape, kernel_size, stride, padding, ceil_mode, values, dtype, channels_last):
    batch = Batch(shape, dtype, channels_last)
    x = random(*shape, dtype=dtype) if values == "random" else special(shape, dtype)
    pool = (kernel_size, stride, padding, ceil_mode)

    def exact(x, **kwargs):
        return reference.max_pool2d(x, kernel_size, stride, padding, ceil_mode, **kwargs)

    expected, indices = exact(x, return_indices=True)
    y, code = _emulator.max_pool2d(batch.images, batch.raw(x), pool, True)
    torch.testing.assert_close(batch.tensor(y, expected.shape).double(), expected, rtol=0, atol=0, equal_nan=True)
    code = batch.tensor(code, expected.shape)
    rows = torch.arange(expected.shape[2])[:, None] * stride - padding + code // kernel_size
    columns = torch.arange(expected.shape[3]) * stride - padding + code % kernel_size
    torch.testing.assert_close(rows * shape[3] + columns, indices, rtol=0, atol=0)

    grad = random(*expected.shape, dtype=dtype)
    dx = _emulator.max_pool2d_backward(batch.images, batch.raw(grad), batch.raw(code), pool)
    assert_close(batch.tensor(dx, shape), gradient(exact, x, grad))
    without_code, none = _emulator.max_pool2d(batch.images, batch.raw(x), pool, False)
    assert none.size == 0
    assert without_code.tobytes() == y.tobytes()


# ---- the fused tail ------------------------------------------------------------------------------------------------

TAIL = [  # shape, size, beta, k, groups, kernel_size, stride, padding, ceil_mode
    pytest.param((2, 24, 9, 11), 5, 0.75, 2.0, 1, 3, 2, 0, False, id="alexnet"),
    pytest.param((1, 36, 6, 7), 5, 0.75, 1.0, 1, 3, 2, 0, True, id="two-chunks-ceil"),
    pytest.param((1, 24, 5, 6), 5, 0.75, 1.0, 2, 3, 2, 1, False, id="groups-padding"),
    pytest.param((1, 5, 6, 5), 4, 0.6, 1.0, 1, 2, 2, 0, False, id="other-sizes"),
    pytest.param((1, 4, 3, 150), 5, 0.75, 1.0, 1, 3, 2, 0, False, id="wide"),
    pytest.param((1, 4, 45, 3), 3, 1.0, 1.0, 2, 3, 2, 1, True, id="tall"),
]


def check_tail(shape, size, beta, k, groups, kernel_size, stride, padding, ceil_mode, order, dtype, channels_last):
    batch, number = Batch(shape, dtype, channels_last), reference.ORDERS.index(order)
    x, pool = random(*shape, dtype=dtype), (kernel_size, stride, padding, ceil_mode)
    lrn = (size, size // 2, 0.3 / size, beta, k, groups)

    def exact(x):
        return reference.relu_lrn_max_pool2d(
            x, size, 0.3, beta, k, order=order, groups=groups, kernel_size=kernel_size, stride=stride, padding=padding,
            ceil_mode=ceil_mode,
        )  # fmt: skip

    expected = exact(x)
    y, code = _emulator.relu_lrn_max_pool2d(batch.images, batch.raw(x), number, lrn, pool, True)
    assert_close(batch.tensor(y, expected.shape), expected)
    grad = random(*expected.shape, dtype=dtype)
    dx = _emulator.relu_lrn_max_pool2d_backward(batch.images, batch.raw(grad), batch.raw(x), code, number, lrn, pool)
    assert_close(batch.tensor(dx, shape), gradient(exact, x, grad))
    without_code, none = _emulator.relu_lrn_max_pool2d(batch.images, batch.raw(x), number, lrn, pool, False)
    assert none.size == 0
    assert without_code.tobytes() == y.tobytes()


@dtypes
@layouts
@pytest.mark.parametrize("order", reference.ORDERS)
@pytest.mark.parametrize(
    ("shape", "size", "beta", "k", "groups", "kernel_size", "stride", "padding", "ceil_mode"), TAIL
)
def test_relu_lrn_max_pool2d(
    shape, size, beta, k, groups, kernel_size, stride, padding, ceil_mode, order, dtype, channels_last
):
    check_tail(shape, size, beta, k, groups, kernel_size, stride, padding, ceil_mode, order, dtype, channels_last)


@layouts
@pytest.mark.parametrize("fibers", ["random"], indirect=True)
@pytest.mark.parametrize("order", reference.ORDERS)
@pytest.mark.parametrize("shape", [(1, 96, 55, 55), (1, 256, 27, 27)], ids=["first-block", "second-block"])
def test_relu_lrn_max_pool2d_of_a_whole_image(shape, order, channels_last):
    check_tail(shape, 5, 0.75, 2.0, 1, 3, 2, 0, False, order, torch.bfloat16, channels_last)


@layouts
@pytest.mark.parametrize("order", reference.ORDERS)
def test_relu_lrn_max_pool2d_of_nan(order, channels_last):
    batch, x = Batch((1, 16, 5, 5), torch.float32, channels_last), random(1, 16, 5, 5)
    x[0, 3, 2, 2] = torch.nan
    y, _ = _emulator.relu_lrn_max_pool2d(
        batch.images, batch.raw(x), reference.ORDERS.index(order), (5, 2, 0.06, 0.75, 1.0, 1), (3, 2, 0, False), False
    )
    assert_close(batch.tensor(y, (1, 16, 2, 2)), reference.relu_lrn_max_pool2d(x, 5, 0.3, order=order))


# ---- the emulator itself -------------------------------------------------------------------------------------------

NAMES = {torch.float16: "half", torch.bfloat16: "bfloat16"}


def run(name, values, outputs):
    x = values.contiguous()
    return torch.from_numpy(
        _emulator.run_test_kernel(name, (x.view(torch.uint16) if x.element_size() == 2 else x).numpy().ravel(), outputs)
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


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d)[6:])
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


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d)[6:])
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


def tf32(x):
    """Rounded to 10 bits of mantissa, ties away from zero."""
    bits = x.float().view(torch.int32)
    return torch.where(x.isfinite(), ((bits + 0x1000) & -0x2000).view(torch.float32), x.float()).to(x.dtype)


def test_tf32_tensor_cores():
    a, b = torch.randn(16, 8), torch.randn(8, 8)
    exact = tf32(a).double() @ tf32(b).double().T
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
    "global_write_out_of_bounds": "wrote outside an array",
    "misaligned_global_read": r"misaligned access to global memory at broken_kernels.cu:\d+: \d+ bytes behind",
    "misaligned_global_write": "misaligned access to global memory",
}


def test_every_mistake_is_listed():
    assert sorted(MISTAKES) == _emulator.broken_kernels()


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found(name):
    """One mistake per kernel, found in every order of the fibers, with a message that says where."""
    x = np.zeros(128, np.float32)
    with pytest.raises(_emulator.Error, match=MISTAKES[name]) as caught:
        _emulator.run_broken_kernel(name, x, 128)
    assert "broken_kernels.cu:" in str(caught.value)
    if name != "global_write_out_of_bounds":
        assert "block (0, 0, 0)" in str(caught.value)


def test_tolerance_covers_dtypes():
    assert set(DTYPES) <= set(TOLERANCE)
