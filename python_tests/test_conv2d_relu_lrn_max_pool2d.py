from functools import partial

import pytest
import torch
from helpers import assert_close, assert_matches, exact_block, forward_and_gradients, in_layout, memory_format

from alexnet_cuda import ops, reference
from alexnet_cuda._library import has_kernel
from alexnet_cuda.reference import ORDERS

# (N, C, H, W), filters, options
CASES = [
    ((2, 3, 47, 51), 96, dict(size=5, k=2.0)),
    ((1, 3, 48, 45), 64, dict(size=5, k=2.0, ceil_mode=True, groups=2)),
    ((3, 1, 40, 39), 20, dict(size=4, alpha=0.1, padding=2, pool_ceil_mode=True, window="onnx")),
    ((1, 4, 37, 60), 9, dict(size=3, alpha=0.1, beta=0.5, pool_padding=1)),
    ((1, 3, 37, 40), 6, dict(size=3, alpha=0.1, across="spatial")),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("shape", "filters", "options"), CASES, ids=str)
def test_matches_float64(shape, filters, options, order, dtype, layout, device):
    x = in_layout(torch.randn(shape, device=device).to(dtype), layout)
    weight, bias = torch.randn(filters, shape[1], 11, 11, device=device) / 19, torch.randn(filters, device=device)
    inputs = [x, weight.to(dtype), bias.to(dtype)]
    function, stock = (partial(m.conv2d_relu_lrn_max_pool2d, **options, order=order) for m in (ops, reference))
    exactly = dtype == torch.float64  # elsewhere rounding may choose another maximum of a window
    exact = partial(exact_block, **options, order=order)
    y, _ = assert_matches(function, exact, inputs, exactly, [function, stock])
    if not exactly:  # the same as the two ops one after the other
        conv = {name: options[name] for name in ("padding", "ceil_mode") if name in options}
        tail = {name.removeprefix("pool_"): value for name, value in options.items() if name not in conv}
        parts = lambda *i: ops.relu_lrn_max_pool2d(ops.conv2d(*i, **conv), **tail, order=order)
        grad = torch.randn(y.shape)
        for got, expected in zip(*(forward_and_gradients(f, inputs, grad)[1] for f in (function, parts))):
            assert_close(got, expected.double())
    if layout in ("contiguous", "channels_last") and shape[1] > 1 and has_kernel(x) and "across" not in options:
        assert memory_format(y) == memory_format(x)


def assert_kernels_agree(n, size, filters, options, dtype, layout, monkeypatch):
    """wgmma's kernel and mma.sync's: the same but for the order of sums."""
    wgmma = torch.cuda.get_device_capability()[0] == 9
    x = in_layout(torch.randn(n, 3, size, size, device="cuda").to(dtype), layout)
    weight, bias = torch.randn(filters, 3, 11, 11, device="cuda") / 19, torch.randn(filters, device="cuda")
    inputs, results = [x, weight.to(dtype).requires_grad_(), bias.to(dtype)], []
    for variable in ("0", "1"):
        monkeypatch.setenv("ALEXNET_CUDA_WGMMA", variable)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            y = ops.conv2d_relu_lrn_max_pool2d(*inputs, 5, 0.1, k=2.0, **options)
            torch.cuda.synchronize()
        assert ("block_wgmma_kernel" in str([e.name for e in profile.events()])) == (variable == "1" and wgmma)
        results.append((y, *y.grad_fn.saved_tensors[2:]))
    (expected, a_expected, code_expected), (y, a, code) = results
    assert_close(y, expected.double())
    assert_close(a, a_expected.double())
    assert (code != code_expected).double().mean() < 0.01


@pytest.mark.devices("cuda")
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("size", "filters", "options"), [(227, 96, {}), (224, 96, dict(padding=2)), (99, 64, {})])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_cuda_kernels_agree(size, filters, options, n, dtype, layout, device, monkeypatch):
    assert_kernels_agree(n, size, filters, options, dtype, layout, monkeypatch)


@pytest.mark.devices("cuda")
@pytest.mark.parametrize(("size", "filters"), [(227, 96), (99, 64)])
def test_cuda_kernels_agree_for_many_images(size, filters, device, monkeypatch):
    assert_kernels_agree(300, size, filters, {}, torch.bfloat16, "channels_last", monkeypatch)
