"""AlexNet's whole first block as one kernel, that of mma.sync and that of wgmma, on the CPU emulator: bit for bit what
the convolution and the fused tail give one after the other, and close to the plain-torch reference in float64."""

import numpy as np
import pytest
import torch
from helpers import assert_close
from test_emulator import DTYPES, Batch, _emulator, fibers, layouts, random  # noqa: F401

from alexnet_cuda import reference

POOL, LRN = (3, 2, 0, False), (5, 2, 0.06, 0.75, 2.0, 1)
BLOCK = [  # shape, filters, padding, ceil_mode, processors
    pytest.param((3, 3, 43, 59), 96, 0, False, 1, id="alexnet-more-images-than-processors"),
    pytest.param((1, 3, 48, 47), 64, 2, True, 9, id="bands-of-one-row"),
    pytest.param((2, 3, 67, 19), 64, 0, False, 5, id="bands-of-two-rows-and-an-unpooled-row"),
    pytest.param((1, 3, 19, 231), 64, 0, True, 1, id="widest"),
    pytest.param((2, 1, 43, 47), 96, 2, False, 3, id="grey"),
    pytest.param((1, 1, 35, 60), 64, 0, True, 1, id="grey-64-filters"),
    pytest.param((2, 4, 37, 48), 64, 1, True, 1, id="four-channels"),
]


def one(batch, x, weight, bias, padding, ceil_mode, processors, lrn=LRN, save=True):
    """(y, a, code) of mma.sync's kernel and of wgmma's."""
    b = None if bias is None else batch.raw(bias, image=False)
    inputs = batch.images, batch.raw(x), batch.raw(weight, image=False), b, len(weight), padding, ceil_mode
    return [
        _emulator.conv2d_relu_lrn_max_pool2d(*inputs, lrn, POOL, save, processors, wgmma) for wgmma in (False, True)
    ]


def two(batch, x, weight, bias, padding, ceil_mode):
    """The same of the convolution and the tail."""
    b, filters = None if bias is None else batch.raw(bias, image=False), len(weight)
    w = batch.raw(weight, image=False)
    a = _emulator.conv2d(batch.images, batch.raw(x), w, b, filters, 11, 4, padding, ceil_mode)
    dtype, channels_last, n, _, *size = batch.images
    size = [(s + 2 * padding - 11 + 3 * ceil_mode) // 4 + 1 for s in size]
    y, code = _emulator.relu_lrn_max_pool2d((dtype, channels_last, n, filters, *size), a, 0, LRN, POOL, True)
    return y, a, code


def check(batch, x, weight, bias, padding, ceil_mode, processors):
    """That all give the same; y."""
    expected = two(batch, x, weight, bias, padding, ceil_mode)
    for results in one(batch, x, weight, bias, padding, ceil_mode, processors):
        for got, want in zip(results, expected):
            np.testing.assert_array_equal(got, want)
    return expected[0]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d)[6:])
@layouts
@pytest.mark.parametrize(("shape", "filters", "padding", "ceil_mode", "processors"), BLOCK)
def test_block(shape, filters, padding, ceil_mode, processors, dtype, channels_last):
    batch, x = Batch(shape, dtype, channels_last), random(*shape, dtype=dtype)
    weight, bias = random(filters, shape[1], 11, 11, dtype=dtype, scale=0.1), random(filters, dtype=dtype)
    y = check(batch, x, weight, bias, padding, ceil_mode, processors)
    expected = reference.conv2d_relu_lrn_max_pool2d(
        x, weight, bias, 5, 0.3, k=2.0, padding=padding, ceil_mode=ceil_mode
    )
    assert_close(batch.tensor(y, expected.shape), expected)
    for without, a, code in one(batch, x, weight, bias, padding, ceil_mode, processors, save=False):
        assert without.tobytes() == y.tobytes()
        assert a.size == code.size == 0


@layouts
@pytest.mark.parametrize(
    ("values", "channels"), [("ties", 3), ("zeros", 3), ("nan", 1), ("nan", 3), ("nan", 4), ("inf", 3)]
)
def test_block_of_special_values(values, channels, channels_last):
    """Equal maxima, zeros of both signs and NaN: the same choice as the tail's, and NaN where a window meets what makes
    one and nowhere else."""
    dtype, shape = torch.float16, (16, channels, 19, 35)
    batch, x = Batch(shape, dtype, channels_last), random(*shape, dtype=dtype)
    weight = random(64, channels, 11, 11, dtype=dtype, scale=0.1)
    if values == "ties":
        x = torch.zeros_like(x)
        x[:, :, ::16, ::12] = 1
        weight = weight.sign()
    elif values == "zeros":  # small sums round to them
        x, weight = (1e-5 * x).to(dtype).double(), (1e-3 * weight).to(dtype).double()
    else:  # at every place of a 4x4 cell
        for n in range(16):
            x[n, n % channels, 8 + n // 4, 8 + n % 4] = float(values)
    spoilt = batch.tensor(check(batch, x, weight, None, 0, False, 16), (16, 64, 1, 3)).isnan()
    assert spoilt[..., 0].all() == (values == "nan")
    assert not spoilt[..., 2].any()


@pytest.mark.parametrize("fibers", ["random"], indirect=True)
@pytest.mark.parametrize(("size", "padding", "ceil_mode"), [(227, 0, False), (224, 2, False), (224, 0, True)])
def test_block_of_a_whole_image(size, padding, ceil_mode):
    dtype, shape = torch.bfloat16, (1, 3, size, size)
    batch, x = Batch(shape, dtype, True), random(*shape, dtype=dtype)
    weight, bias = random(96, 3, 11, 11, dtype=dtype, scale=0.05), random(96, dtype=dtype)
    check(batch, x, weight, bias, padding, ceil_mode, 1)


@pytest.mark.parametrize(
    ("shape", "filters", "lrn"),
    [
        pytest.param((1, 3, 47, 51), 64, (5, 2, 0.06, 0.5, 2.0, 1), id="beta"),
        pytest.param((1, 3, 47, 51), 64, (5, 2, 0.06, 0.75, 2.0, 2), id="groups"),
        pytest.param((1, 3, 47, 51), 64, (3, 1, 0.06, 0.75, 2.0, 1), id="size"),
        pytest.param((1, 3, 47, 51), 64, (5, 2, 0.06, 0.75, 0.0, 1), id="k"),
        pytest.param((1, 3, 47, 51), 48, LRN, id="filters"),
        pytest.param((1, 2, 47, 51), 64, LRN, id="two-channels"),
        pytest.param((1, 4, 47, 51), 96, LRN, id="four-channels-96-filters"),
        pytest.param((1, 3, 19, 235), 64, LRN, id="57-columns"),
        pytest.param((1, 3, 16, 51), 64, LRN, id="nothing-to-pool"),
    ],
)
def test_what_the_block_does_not_do(shape, filters, lrn):
    batch, x = Batch(shape, torch.float16, False), random(*shape)
    with pytest.raises(ValueError, match="cannot"):
        one(batch, x, random(filters, shape[1], 11, 11), None, 0, False, 1, lrn)
