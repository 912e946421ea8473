"""The convolution kernels of CUDA on the emulator: conv2d.cu for float32 where TF32 is slow (here "ffma"), else those
on tensor cores, conv2d_mma.cu, conv2d_weight_grad_mma.cu and conv2d_input_grad_mma.cu.

For TF32 the exact result is that of the rounded inputs, so that the tolerance is that of float32 sums."""

from contextlib import contextmanager

import pytest
import torch
from helpers import (
    SETTINGS,
    assert_close,
    emulator,
    exact_conv2d,
    forward_and_gradients,
    in_layout,
    round_to_tf32,
    tf32,
)

from alexnet_cuda import reference

op = torch.ops.alexnet_cuda_emulated

CONV = [  # shape, filters, padding, ceil_mode: 11x11, stride 4
    pytest.param((1, 3, 23, 27), 96, 0, False, id="alexnet"),
    pytest.param((2, 3, 12, 18), 64, 2, True, id="padding-ceil"),
    pytest.param((1, 1, 30, 13), 7, 0, True, id="grey-few-filters"),
    pytest.param((1, 4, 14, 19), 100, 2, False, id="four-channels-two-tiles"),
    pytest.param((1, 3, 71, 71), 8, 0, True, id="several-blocks"),
    pytest.param((131, 1, 11, 11), 3, 0, False, id="many-images"),
    pytest.param((1, 1, 11, 277), 16, 0, False, id="two-strips"),
    pytest.param((1, 1, 23, 27), 96, 0, False, id="grey"),
    pytest.param((1, 4, 23, 27), 96, 0, False, id="four-channels"),
    pytest.param((1, 3, 9, 15), 95, 11, False, id="windows-in-the-padding"),
]
dtypes = pytest.mark.parametrize("dtype", ["float32", "ffma", "tf32", "float16", "bfloat16"])
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


@contextmanager
def products(dtype, **setting):
    """A device, and torch's settings, that multiply so."""
    with tf32(dtype == "tf32"), emulator(compute_capability=86 if dtype == "ffma" else 90, **setting):
        yield


def kernels(x, grad, weight, bias, padding, ceil_mode, nan_grad=None):
    """(output, gradient of the weight, of the bias, of x)."""
    y = op.conv2d(x, weight, bias, 4, padding, 1, ceil_mode, False)
    dw, db = op._conv2d_weight_grad(grad, x, 11, 4, padding, 1, True)
    size = x.shape[2:]
    return y, dw, db, op._conv2d_input_grad(grad if nan_grad is None else nan_grad, weight, *size, 4, padding, 1)


@dtypes
@layouts
@pytest.mark.parametrize(("shape", "filters", "padding", "ceil_mode"), CONV)
def test_conv2d(shape, filters, padding, ceil_mode, dtype, layout, **setting):
    rounded = round_to_tf32 if dtype == "tf32" else lambda t: t
    stored = "float32" if dtype in ("tf32", "ffma") else dtype
    x = torch.randn(shape)
    weight, bias = 0.1 * torch.randn(filters, shape[1], 11, 11), torch.randn(filters)
    x[-1, -1, shape[2] // 2, shape[3] // 3] = torch.nan  # spoils what meets it, and nothing else
    x[0, 0, -1, -1] = torch.nan
    x, weight, bias = (t.to(getattr(torch, stored)) for t in (x, weight, bias))
    exact = lambda *inputs: reference.conv2d(*inputs, 4, padding, ceil_mode)
    grad = torch.randn(exact(x, weight, None).shape).to(x.dtype)
    nan_grad = grad.clone()
    nan_grad[-1, -1, -1, grad.shape[3] // 2] = torch.nan  # spoils the pixels of its window, and no others
    with products(dtype, **setting):
        got = kernels(*(in_layout(t, layout) for t in (x, grad)), weight, bias, padding, ceil_mode,
                      in_layout(nan_grad, layout))  # fmt: skip
    inputs = [rounded(x).double(), rounded(weight).double(), bias.double()]
    y, (_, *parameters) = forward_and_gradients(exact, inputs, rounded(grad).double())
    _, (dx, *_) = forward_and_gradients(exact, inputs, rounded(nan_grad).double())
    for result, expected in zip(got, [y.detach(), *parameters, dx]):
        assert not expected.isnan().all()
        assert_close(result, expected)


@pytest.mark.parametrize("dtype", ["float32", "tf32", "float16", "bfloat16"])
@layouts
@pytest.mark.parametrize(
    ("shape", "filters"),
    [((4, 1, 71, 75), 7), ((1, 1, 11, 259), 16), ((20, 1, 15, 19), 70)],
    ids=["several-stages", "strips-of-32-outputs", "several-images-in-a-stage"],
)
def test_long_weight_gradient(shape, filters, dtype, layout):
    """Thread blocks go through several stages of pixels, with the next one loaded meanwhile, and past images' ends."""
    rounded, stored = (round_to_tf32, "float32") if dtype == "tf32" else (lambda t: t, dtype)
    x = torch.randn(shape).to(getattr(torch, stored))
    weight = torch.zeros(filters, shape[1], 11, 11)
    grad = torch.randn(exact_conv2d(x, weight).shape).to(x.dtype)
    with tf32(dtype == "tf32"):
        got = op._conv2d_weight_grad(in_layout(grad, layout), in_layout(x, layout), 11, 4, 0, 1, True)
    inputs = [rounded(x).double(), weight.double(), torch.zeros(filters, dtype=torch.double)]
    for result, expected in zip(got, forward_and_gradients(exact_conv2d, inputs, rounded(grad).double())[1][1:]):
        assert_close(result, expected)


@dtypes
@layouts
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_settings(setting, layout, dtype):
    test_conv2d(*CONV[0].values, dtype, layout, **setting)


@pytest.mark.parametrize("dtype", ["float32", "ffma", "tf32", "float16"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_tap(channels, dtype):
    """A NaN at each pixel in turn reaches the windows it lies in, wherever in shared memory its products are summed."""
    x = torch.randn(64, channels, 15, 15).half()  # four windows; halves need no rounding to TF32
    weight = torch.randn(1, channels, 11, 11).half()
    for n in range(64):
        x[n, n % channels, (n * 4) % 15, (n * 7 + n // 15) % 15] = torch.nan
    stored = torch.float16 if dtype == "float16" else torch.float32
    with products(dtype):
        y = op.conv2d(x.to(stored), weight.to(stored), None, 4, 0, 1, False, False)
    assert_close(y, exact_conv2d(x, weight))


@pytest.mark.parametrize(("size", "padding", "ceil_mode"), [(227, 0, False), (224, 2, False), (224, 0, True)])
def test_tf32_of_a_whole_image(size, padding, ceil_mode):
    x, weight = in_layout(torch.randn(1, 3, size, size), "channels_last"), torch.randn(64, 3, 11, 11)
    with tf32():
        y = op.conv2d(x, weight, None, 4, padding, 1, ceil_mode, False)
    assert_close(y, exact_conv2d(round_to_tf32(x), round_to_tf32(weight), None, 4, padding, ceil_mode))


@layouts
def test_tf32_of_extremes(layout):
    """Infinities stay what they are, and products may be as large as float32's."""
    x, weight = torch.randn(3, 1, 11, 11), torch.randn(1, 1, 11, 11).abs() / 121
    x[0, 0, 3, 10], x[1, 0, 10, 5], x[2] = torch.inf, -torch.inf, 2.0**127
    with tf32():
        y = op.conv2d(in_layout(x, layout), weight, None, 4, 0, 1, False, False)
    assert_close(y, exact_conv2d(x, round_to_tf32(weight)))


def on_device(capability, x, grad, weight, padding=0, ceil_mode=False):
    """(output, gradient of x, of the weight, of the bias)."""
    with emulator(compute_capability=capability):
        y = op.conv2d(x, weight, None, 4, padding, 1, ceil_mode, False)
        dx = op._conv2d_input_grad(grad, weight, *x.shape[2:], 4, padding, 1)
        return y, dx, *op._conv2d_weight_grad(grad, x, 11, 4, padding, 1, True)


# In both formats. 1e-30: no part of an element is lost. Sums of one sign show a bias.
@pytest.mark.parametrize(
    ("shape", "filters", "padding", "ceil_mode", "sample", "layout"),
    [
        ((1, 3, 19, 25), 96, 0, False, torch.rand, "channels_last"),
        ((1, 3, 21, 14), 64, 1, True, torch.randn, "contiguous"),
        ((1, 1, 20, 13), 96, 2, True, torch.randn, "channels_last"),
        ((1, 1, 20, 13), 64, 0, False, torch.rand, "contiguous"),
        ((1, 4, 14, 19), 64, 0, True, torch.rand, "channels_last"),
        ((1, 4, 13, 16), 96, 2, False, torch.randn, "contiguous"),
        ((1, 1, 71, 75), 7, 0, False, torch.rand, "channels_last"),  # a weight's gradient is a sum over 272 pixels
    ],
)
def test_three_products_of_tf32_are_as_exact_as_floats(shape, filters, padding, ceil_mode, sample, layout):
    x, weight = in_layout(sample(shape) * 1e-30, layout), sample(filters, shape[1], 11, 11)
    exact = lambda *inputs: reference.conv2d(*inputs, None, 4, padding, ceil_mode)
    grad = in_layout(sample(exact(x, weight).shape), layout)
    y, (dx, dw) = forward_and_gradients(exact, [x.double(), weight.double()], grad.double())
    found, floats = (on_device(capability, x, grad, weight, padding, ceil_mode) for capability in (90, 86))
    for i, (expected, *results) in enumerate(zip((y, dx, dw, grad.double().sum((0, 2, 3))), found, floats)):
        error, of_floats = ((r - expected).abs().max() / expected.abs().max() for r in results)
        assert error <= (min(1e-6, of_floats) if i < 2 else 1e-6)  # dw and db are shorter sums


def test_devices_with_fast_tf32():
    x, grad, weight = torch.randn(1, 1, 11, 15), torch.randn(1, 2, 1, 2), torch.randn(2, 1, 11, 11)
    floats = on_device(86, x, grad, weight)
    for capability in (80, 86, 89, 90, 100, 103, 120):
        y, dx, dw, _ = on_device(capability, x, grad, weight)
        for result, of_floats, without in zip((y, dx, dw), floats, [(86, 89, 120)] * 2 + [(86, 89, 100, 103, 120)]):
            assert result.equal(of_floats) == (capability in without)


@pytest.mark.parametrize("where", ["x", "weight", "grad"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3.4028234e38, -3.4e38])
def test_three_products_of_tf32_of_extremes(value, where):
    """They give what float products give, and reach nothing else that a tensor core multiplies."""
    inputs = {"x": torch.randn(1, 3, 15, 18), "weight": torch.randn(7, 3, 11, 11).bfloat16().float() / 128}
    inputs["grad"] = torch.randn(1, 7, 2, 2) / 16
    at = {"x": (0, 2, 11, 2), "weight": (1, 2, 3, 4), "grad": (0, 2, 1, 1)}  # row 11 lies below the first windows
    inputs[where][at[where]] = value
    layout = "contiguous" if value < 0 else "channels_last"
    x, grad = (in_layout(inputs[name], layout) for name in ("x", "grad"))
    found, floats = (on_device(capability, x, grad, inputs["weight"]) for capability in (90, 86))
    for got, expected in zip(found, floats):
        assert_close(got, expected.double())
        untouched = expected.abs() < 1e3
        assert untouched.any()
        torch.testing.assert_close(got[untouched], expected[untouched], rtol=0, atol=1e-5)
