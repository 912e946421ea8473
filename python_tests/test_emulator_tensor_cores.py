"""AlexNet's first convolution in half precision, on the CPU emulator: the kernels of conv2d_mma.cu and
conv2d_weight_grad_mma.cu against the plain-torch reference in float64."""

import pytest
import torch
from helpers import assert_close
from test_emulator import DTYPES, Batch, _emulator, fibers, gradient, layouts, random  # noqa: F401

from alexnet_cuda import reference

TENSOR_CORES = [  # shape, filters, padding, ceil_mode: 11x11, stride 4
    pytest.param((1, 3, 23, 27), 96, 0, False, id="alexnet"),
    pytest.param((2, 3, 12, 18), 64, 2, True, id="padding-ceil"),
    pytest.param((1, 1, 30, 13), 7, 0, True, id="grey-few-filters"),
    pytest.param((1, 4, 14, 19), 100, 2, False, id="four-channels-two-tiles"),
    pytest.param((1, 3, 71, 71), 8, 0, True, id="several-blocks"),
    pytest.param((131, 1, 11, 11), 3, 0, False, id="more-images-than-slices"),
    pytest.param((1, 1, 11, 277), 16, 0, False, id="two-strips"),
]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d)[6:])
@layouts
@pytest.mark.parametrize(("shape", "filters", "padding", "ceil_mode"), TENSOR_CORES)
def test_conv2d_on_tensor_cores(shape, filters, padding, ceil_mode, dtype, channels_last):
    batch, x = Batch(shape, dtype, channels_last), random(*shape, dtype=dtype)
    weight, bias = random(filters, shape[1], 11, 11, dtype=dtype, scale=0.1), random(filters, dtype=dtype)
    x[-1, -1, shape[2] // 2, shape[3] // 3] = torch.nan  # spoils the windows it lies in and no others
    x[0, 0, -1, -1] = torch.nan
    expected = reference.conv2d(x, weight, bias, 4, padding, ceil_mode)
    assert not expected.isnan().all()
    w, b = batch.raw(weight, image=False), batch.raw(bias, image=False)
    y = _emulator.conv2d(batch.images, batch.raw(x), w, b, filters, 11, 4, padding, ceil_mode)
    assert_close(batch.tensor(y, expected.shape), expected)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d)[6:])
@layouts
@pytest.mark.parametrize(("shape", "filters", "padding", "ceil_mode"), TENSOR_CORES)
def test_conv2d_weight_grad_on_tensor_cores(shape, filters, padding, ceil_mode, dtype, channels_last):
    batch, x = Batch(shape, dtype, channels_last), random(*shape, dtype=dtype)
    weight = torch.zeros(filters, shape[1], 11, 11).double()
    x[-1, -1, shape[2] // 2, shape[3] // 3] = torch.nan  # spoils the taps that meet it and no others
    expected = reference.conv2d(x, weight, None, 4, padding, ceil_mode)
    grad = random(*expected.shape, dtype=dtype)
    geometry = (filters, 11, 4, padding, ceil_mode)
    dw = _emulator.conv2d_weight_grad(batch.images, batch.raw(grad), batch.raw(x), *geometry)
    exact = gradient(lambda w: reference.conv2d(x, w, None, 4, padding, ceil_mode), weight, grad)
    assert not exact.isnan().all()
    assert_close(batch.tensor(dw, weight.shape, image=False), exact)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_tap_on_tensor_cores(channels):
    """A NaN at each pixel in turn: each reaches the windows it lies in, whatever slab it was sorted into."""
    x = random(64, channels, 15, 15, dtype=torch.float16)  # four windows
    weight = random(1, channels, 11, 11, dtype=torch.float16)
    for n in range(64):
        x[n, n % channels, (n * 4) % 15, (n * 7 + n // 15) % 15] = torch.nan
    batch = Batch(x.shape, torch.float16, False)
    y = _emulator.conv2d(batch.images, batch.raw(x), batch.raw(weight, image=False), None, 1, 11, 4, 0, False)
    assert_close(batch.tensor(y, (64, 1, 2, 2)), reference.conv2d(x, weight, None, 4))
