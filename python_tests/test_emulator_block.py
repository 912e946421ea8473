"""The CUDA kernels of AlexNet's whole first block, of mma.sync with resident or streamed weights and of wgmma, on the
emulator: bit for bit what the convolution and relu_lrn_max_pool2d give one after the other, and close to the exact
result."""

import pytest
import torch
from helpers import SETTINGS, assert_close, emulator, exact_block, in_layout

op = torch.ops.alexnet_cuda_emulated

LRN, POOL = (5, 2, 0.06, 0.75, 2.0, 1), (3, 2, 0, False)  # size, front, alpha, beta, k, groups
KERNELS = [  # compute capability, KB of shared memory: wgmma; mma.sync with resident and with streamed weights
    dict(compute_capability=90),
    dict(compute_capability=80),
    dict(compute_capability=86, shared_memory=99),
]
BLOCK = [  # shape, filters, padding, ceil_mode, multiprocessors
    pytest.param((3, 3, 43, 59), 96, 0, False, 1, id="alexnet-more-images-than-processors"),
    pytest.param((1, 3, 48, 47), 64, 2, True, 9, id="bands-of-one-row"),
    pytest.param((2, 3, 67, 19), 64, 0, False, 5, id="bands-of-two-rows-and-an-unpooled-row"),
    pytest.param((5, 3, 59, 19), 64, 0, False, 4, id="several-rounds-of-bands"),
    pytest.param((1, 3, 19, 231), 64, 0, True, 1, id="widest"),
    pytest.param((2, 3, 43, 47), 96, 2, False, 3, id="padding-2"),
    pytest.param((2, 3, 37, 48), 64, 1, True, 1, id="padding-1"),
]
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def copies(function, *arguments):
    """(tensors that it copied to the emulated device, its result)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = function(*arguments)
    return sum(event.name == "aten::copy_" for event in profile.events()), result


def two_kernels(x, weight, bias, padding, ceil_mode, lrn=LRN):
    a = op.conv2d(x, weight, bias, 4, padding, 1, ceil_mode, False)
    y, code = op.relu_lrn_max_pool2d(a, 0, *lrn, *POOL, True)
    return y, a, code


def bits(t):
    return t.view(torch.int16) if t.element_size() == 2 else t


def check(x, weight, bias, padding, ceil_mode, lrn=LRN, fused=True, saves=(True,), **setting):
    """That all kernels of the block give what the two kernels give, with or without what a backward needs; y. But for
    the codes of NaN, of which any may be named: the gradient is NaN at all of them."""
    expected = two_kernels(x, weight, bias, padding, ceil_mode, lrn)
    nan = expected[0].isnan()
    inputs = 2 if bias is None else 3
    for device in KERNELS:
        with emulator(**device, **setting):
            for save in saves:
                arguments = (x, weight, bias, 4, padding, ceil_mode, 0, *lrn, *POOL, save)
                copied, results = copies(op.conv2d_relu_lrn_max_pool2d, *arguments)
                assert (copied == inputs) == fused  # a second kernel reads the convolution's output
                for got, want in zip(results, expected if save else expected[:1]):
                    if got.dtype == torch.uint8:
                        got, want = (code.masked_fill(nan, 0) for code in (got, want))
                    assert bits(got).equal(bits(want))
                assert save or results[1].numel() == results[2].numel() == 0
    return expected[0]


def random(shape, filters, dtype, layout, scale=0.1):
    x = in_layout(torch.randn(shape).to(dtype), layout)
    return x, (scale * torch.randn(filters, shape[1], 11, 11)).to(dtype), torch.randn(filters).to(dtype)


@dtypes
@layouts
@pytest.mark.parametrize(("shape", "filters", "padding", "ceil_mode", "multiprocessors"), BLOCK)
def test_block(shape, filters, padding, ceil_mode, multiprocessors, dtype, layout, **setting):
    x, weight, bias = random(shape, filters, dtype, layout)
    y = check(x, weight, bias, padding, ceil_mode, saves=(True, False), multiprocessors=multiprocessors, **setting)
    options = dict(padding=padding, ceil_mode=ceil_mode, order="relu-lrn-pool")
    assert_close(y, exact_block(x, weight, bias, 5, 0.3, k=2.0, **options))


@dtypes
@layouts
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_settings(setting, layout, dtype):
    test_block(*BLOCK[1].values, dtype, layout, **setting)


@layouts
@pytest.mark.parametrize("values", ["ties", "zeros", "nan", "inf"])
def test_special_values(values, layout):
    """Equal maxima, zeros of both signs and NaN: the same choice as that of two kernels, and NaN where a window meets
    what makes one and nowhere else."""
    x, weight, _ = random((16, 3, 19, 35), 64, torch.float16, layout)
    if values == "ties":
        x.zero_()
        x[:, :, ::16, ::12] = 1
        weight = weight.sign()
    elif values == "zeros":  # small sums round to them
        x, weight = 1e-5 * x, 1e-3 * weight
    else:  # at every place of a 4x4 block of pixels
        for n in range(16):
            x[n, n % 3, 8 + n // 4, 8 + n % 4] = float(values)
    spoilt = check(x, weight, None, 0, False, multiprocessors=16).isnan()
    assert spoilt[..., 0].all() == (values == "nan")
    assert not spoilt[..., 2].any()


@pytest.mark.parametrize(("size", "padding", "ceil_mode"), [(227, 0, False), (224, 2, False), (224, 0, True)])
def test_whole_image(size, padding, ceil_mode):
    x, weight, bias = random((1, 3, size, size), 96, torch.bfloat16, "channels_last", 0.05)
    check(x, weight, bias, padding, ceil_mode, multiprocessors=1)


@pytest.mark.parametrize(
    ("shape", "filters", "lrn"),
    [
        pytest.param((1, 3, 47, 51), 64, (5, 2, 0.06, 0.5, 2.0, 1), id="beta"),
        pytest.param((1, 3, 47, 51), 64, (5, 2, 0.06, 0.75, 2.0, 2), id="groups"),
        pytest.param((1, 3, 47, 51), 64, (3, 1, 0.06, 0.75, 2.0, 1), id="size"),
        pytest.param((1, 3, 47, 51), 64, (5, 2, 0.06, 0.75, 0.0, 1), id="k"),
        pytest.param((1, 3, 47, 51), 48, LRN, id="filters"),
        pytest.param((1, 1, 47, 51), 96, LRN, id="grey"),
        pytest.param((1, 4, 47, 51), 64, LRN, id="four-channels"),
        pytest.param((1, 3, 19, 235), 64, LRN, id="57-columns"),
    ],
)
def test_what_two_kernels_compute(shape, filters, lrn):
    check(*random(shape, filters, torch.float16, "contiguous"), 0, False, lrn, fused=False)
