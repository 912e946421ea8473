"""AlexNet's first convolution on the CPU emulator, against the plain-torch reference in float64: float32 by the kernels
of conv2d.cu, the others on tensor cores, by conv2d_mma.cu, conv2d_weight_grad_mma.cu and conv2d_input_grad_mma.cu.

The reference of TF32 gets inputs that are rounded to it, so that its results are those of float32 sums."""

import pytest
import torch
from helpers import assert_close
from test_emulator import Batch, _emulator, fibers, gradient, layouts, random, tf32  # noqa: F401

from alexnet_cuda import reference

CONV = [  # shape, filters, padding, ceil_mode: 11x11, stride 4
    pytest.param((1, 3, 23, 27), 96, 0, False, id="alexnet"),
    pytest.param((2, 3, 12, 18), 64, 2, True, id="padding-ceil"),
    pytest.param((1, 1, 30, 13), 7, 0, True, id="grey-few-filters"),
    pytest.param((1, 4, 14, 19), 100, 2, False, id="four-channels-two-tiles"),
    pytest.param((1, 3, 71, 71), 8, 0, True, id="several-blocks"),
    pytest.param((131, 1, 11, 11), 3, 0, False, id="more-images-than-slices"),
    pytest.param((1, 1, 11, 277), 16, 0, False, id="two-strips"),
    pytest.param((1, 1, 23, 27), 96, 0, False, id="grey"),
    pytest.param((1, 4, 23, 27), 96, 0, False, id="four-channels"),
    pytest.param((1, 3, 9, 15), 95, 11, False, id="windows-in-the-padding"),
]
dtypes = pytest.mark.parametrize("dtype", ["float32", "tf32", "float16", "bfloat16"])


def batch_of(shape, dtype, channels_last):
    """The dtype in memory, the batch, and the function that rounds as the kernels do what they multiply."""
    stored = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    batch = Batch(shape, stored, channels_last)
    batch.images = (dtype, *batch.images[1:])
    return stored, batch, tf32 if dtype == "tf32" else lambda x: x


@dtypes
@layouts
@pytest.mark.parametrize(("shape", "filters", "padding", "ceil_mode"), CONV)
def test_conv2d(shape, filters, padding, ceil_mode, dtype, channels_last):
    dtype, batch, rounded = batch_of(shape, dtype, channels_last)
    x = random(*shape, dtype=dtype)
    weight, bias = random(filters, shape[1], 11, 11, dtype=dtype, scale=0.1), random(filters, dtype=dtype)
    x[-1, -1, shape[2] // 2, shape[3] // 3] = torch.nan  # spoils the windows it lies in and no others
    x[0, 0, -1, -1] = torch.nan
    expected = reference.conv2d(rounded(x), rounded(weight), bias, 4, padding, ceil_mode)
    assert not expected.isnan().all()
    w, b = batch.raw(weight, image=False), batch.raw(bias, image=False)
    y = _emulator.conv2d(batch.images, batch.raw(x), w, b, filters, 11, 4, padding, ceil_mode)
    assert_close(batch.tensor(y, expected.shape), expected)


@dtypes
@layouts
@pytest.mark.parametrize(("shape", "filters", "padding", "ceil_mode"), CONV)
def test_conv2d_weight_grad(shape, filters, padding, ceil_mode, dtype, channels_last):
    dtype, batch, rounded = batch_of(shape, dtype, channels_last)
    x = random(*shape, dtype=dtype)
    weight = torch.zeros(filters, shape[1], 11, 11).double()
    x[-1, -1, shape[2] // 2, shape[3] // 3] = torch.nan  # spoils the taps that meet it and no others
    x[0, 0, -1, -1] = torch.nan
    expected = reference.conv2d(x, weight, None, 4, padding, ceil_mode)
    grad = random(*expected.shape, dtype=dtype)
    geometry = (filters, 11, 4, padding, ceil_mode)
    dw, db = _emulator.conv2d_weight_grad(batch.images, batch.raw(grad), batch.raw(x), *geometry)
    exact = gradient(lambda w: reference.conv2d(rounded(x), w, None, 4, padding, ceil_mode), weight, rounded(grad))
    assert not exact.isnan().all()
    assert_close(batch.tensor(dw, weight.shape, image=False), exact)
    assert_close(batch.tensor(db, (filters,), image=False), rounded(grad).double().sum((0, 2, 3)))


@dtypes
@layouts
@pytest.mark.parametrize(("shape", "filters", "padding", "ceil_mode"), CONV)
def test_conv2d_input_grad(shape, filters, padding, ceil_mode, dtype, channels_last):
    dtype, batch, rounded = batch_of(shape, dtype, channels_last)
    x, weight = torch.zeros(shape).double(), random(filters, shape[1], 11, 11, dtype=dtype, scale=0.1)
    grad = random(*reference.conv2d(x, weight, None, 4, padding, ceil_mode).shape, dtype=dtype)
    grad[-1, -1, -1, grad.shape[3] // 2] = torch.nan  # spoils the pixels of its window and no others
    geometry = (filters, 11, 4, padding, ceil_mode)
    dx = _emulator.conv2d_input_grad(batch.images, batch.raw(grad), batch.raw(weight, image=False), *geometry)
    exact = gradient(lambda x: reference.conv2d(x, rounded(weight), None, 4, padding, ceil_mode), x, rounded(grad))
    assert not exact.isnan().all()
    assert_close(batch.tensor(dx, shape), exact)


@pytest.mark.parametrize("dtype", ["float32", "tf32", "float16"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_tap(channels, dtype):
    """A NaN at each pixel in turn: each reaches the windows it lies in, whatever slab it was sorted into."""
    _, batch, _ = batch_of((64, channels, 15, 15), dtype, False)
    x = random(64, channels, 15, 15, dtype=torch.float16)  # four windows
    weight = random(1, channels, 11, 11, dtype=torch.float16)
    for n in range(64):
        x[n, n % channels, (n * 4) % 15, (n * 7 + n // 15) % 15] = torch.nan
    y = _emulator.conv2d(batch.images, batch.raw(x), batch.raw(weight, image=False), None, 1, 11, 4, 0, False)
    assert_close(batch.tensor(y, (64, 1, 2, 2)), reference.conv2d(x, weight, None, 4))


@pytest.mark.parametrize("fibers", ["random"], indirect=True)
@pytest.mark.parametrize(("size", "padding", "ceil_mode"), [(227, 0, False), (224, 2, False), (224, 0, True)])
def test_tf32_of_a_whole_image(size, padding, ceil_mode):
    """Rounding leaves up to 2^-11 of either factor, so up to 2^-10 of a product. Most of it cancels in a sum of 363
    products: errors stay below that part of the largest result."""
    x, weight = random(1, 3, size, size), random(64, 3, 11, 11, scale=0.05)
    _, batch, _ = batch_of(x.shape, "tf32", True)
    w = batch.raw(weight, image=False)
    y = _emulator.conv2d(batch.images, batch.raw(x), w, None, 64, 11, 4, padding, ceil_mode)
    exact = reference.conv2d(x, weight, None, 4, padding, ceil_mode)
    error = (batch.tensor(y, (1, 64, 55, 55)) - exact).abs().max() / exact.abs().max()
    assert 2**-16 < error < 2**-10


def test_tf32_against_float32():
    x, weight = random(1, 3, 27, 31), random(96, 3, 11, 11, scale=0.05)
    results = []
    for dtype in ("tf32", "float32"):
        _, batch, _ = batch_of(x.shape, dtype, False)
        w, geometry = batch.raw(weight, image=False), (96, 11, 4, 0, False)
        y = batch.tensor(_emulator.conv2d(batch.images, batch.raw(x), w, None, *geometry), (1, 96, 5, 6))
        dw = batch.tensor(
            _emulator.conv2d_weight_grad(batch.images, batch.raw(y), batch.raw(x), *geometry)[0], weight.shape
        )
        dx = batch.tensor(_emulator.conv2d_input_grad(batch.images, batch.raw(y), w, *geometry), x.shape)
        results.append((y, dw, dx))
    for a, b in zip(*results):
        assert 2**-16 < (a - b).abs().max() / b.abs().max() < 2**-9  # the gradients' y is rounded as well


@layouts
def test_tf32_of_extremes(channels_last):
    """Infinities stay what they are, and products may be as large as float32's."""
    _, batch, _ = batch_of((3, 1, 11, 11), "tf32", channels_last)
    x, weight = random(3, 1, 11, 11), random(1, 1, 11, 11).abs() / 121
    x[0, 0, 3, 10], x[1, 0, 10, 5], x[2] = torch.inf, -torch.inf, 2.0**127
    y = _emulator.conv2d(batch.images, batch.raw(x), batch.raw(weight, image=False), None, 1, 11, 4, 0, False)
    assert_close(batch.tensor(y, (3, 1, 1, 1)), reference.conv2d(x, tf32(weight), None, 4))


@dtypes
@pytest.mark.parametrize(
    ("channels", "kernel_size", "stride"), [(2, 11, 4), (3, 3, 4), (3, 11, 2)], ids=["channels", "size", "stride"]
)
def test_what_the_kernels_do_not_do(channels, kernel_size, stride, dtype):
    dtype, batch, _ = batch_of((1, channels, 23, 27), dtype, False)
    x, weight = random(1, channels, 23, 27), random(8, channels, kernel_size, kernel_size)
    grad = torch.zeros(reference.conv2d(x, weight, None, stride).shape)
    x, grad, w, geometry = batch.raw(x), batch.raw(grad), batch.raw(weight, image=False), (8, kernel_size, stride)
    for function, arguments in [
        (_emulator.conv2d, (x, w, None)), (_emulator.conv2d_weight_grad, (grad, x)),
        (_emulator.conv2d_input_grad, (grad, w)),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError, match="returned an error"):
            function(batch.images, *arguments, *geometry, 0, False)
