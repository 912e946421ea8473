import math

import pytest
import torch
from helpers import (
    assert_close,
    distinct,
    exact_tail,
    forward_and_gradients,
    in_layout,
    memory_format,
    saved_bytes,
)

from alexnet_cuda import ops, reference
from alexnet_cuda._library import has_kernel
from alexnet_cuda.nn import ReLULRNMaxPool2d
from alexnet_cuda.reference import ORDERS

CASES = [
    ((2, 96, 15, 13), dict(size=5, alpha=1e-4, k=2.0)),
    ((1, 96, 8, 9), dict(size=5, alpha=0.1, k=2.0, groups=2)),
    ((3, 7, 12, 9), dict(size=4, alpha=1.0, beta=0.5, ceil_mode=True)),
    ((2, 6, 11, 14), dict(size=3, alpha=1.0, beta=1.0, padding=1, window="onnx")),
    ((1, 12, 9, 9), dict(size=11, alpha=0.5, beta=0.6, divide_alpha=False, kernel_size=2)),
    ((1, 4, 9, 10), dict(size=6, alpha=1e-4, window="onnx", kernel_size=3, stride=1, padding=1)),
    ((2, 5, 9, 8), dict(size=3, alpha=0.1, across="spatial")),
    ((1, 36, 6, 7), dict(size=5, alpha=0.3, ceil_mode=True)),
    ((1, 24, 5, 6), dict(size=5, alpha=0.3, groups=2, padding=1)),
    ((1, 4, 3, 150), dict(size=5, alpha=0.3)),
    ((1, 4, 45, 3), dict(size=3, alpha=0.3, beta=1.0, groups=2, padding=1, ceil_mode=True)),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("shape", "args"), CASES, ids=str)
def test_matches_float64(shape, args, order, dtype, layout, device):
    x = in_layout(distinct(*shape).to(dtype).to(device), layout)
    want = exact_tail(x, **args, order=order)
    grad = torch.randn(want.shape, dtype=torch.float64)
    y, (gx,) = forward_and_gradients(lambda x: ops.relu_lrn_max_pool2d(x, **args, order=order), [x], grad)
    _, (want_gx,) = forward_and_gradients(
        lambda x: exact_tail(x, **args, order=order), [x.double().cpu()], grad.to(dtype).double()
    )
    assert y.dtype == dtype
    assert_close(y, want)
    assert_close(reference.relu_lrn_max_pool2d(x, **args, order=order), want)
    with torch.no_grad():
        assert_close(ops.relu_lrn_max_pool2d(x, **args, order=order), want)
    if dtype in (torch.float32, torch.float64) or args["alpha"] >= 0.3:  # half inputs tie, broken by rounding
        assert_close(gx, want_gx)
    if layout in ("contiguous", "channels_last") and has_kernel(x) and args.get("across") != "spatial":
        assert memory_format(y) == memory_format(gx) == memory_format(x)


@pytest.mark.parametrize("order", ORDERS)
def test_low_precision_gradient(order, device):
    """Few distinct half values and no overlap between windows: ties go to the first maximum, as in float64."""
    x = torch.randint(-3, 4, (2, 8, 8, 8), device=device).half()
    grad = torch.randn(2, 8, 4, 4).half().double()
    args = dict(size=1, alpha=0.5, order=order, kernel_size=2, stride=2)
    y, (gx,) = forward_and_gradients(lambda x: ops.relu_lrn_max_pool2d(x, **args), [x], grad)
    want, (want_gx,) = forward_and_gradients(lambda x: exact_tail(x, **args), [x.double().cpu()], grad)
    assert_close(y, want)
    assert_close(gx, want_gx)


@pytest.mark.parametrize("special", [-0.0, math.nan, -math.nan, math.inf], ids=str)
def test_special_values(special, layout, device):
    """A zero never wins a window with something larger, whatever its sign; a NaN always wins, whatever its sign."""
    x = torch.rand(2, 32, 9, 9) + 0.1
    x[torch.rand(x.shape) < 0.3] = special
    x = in_layout(x.to(device), layout)
    want = exact_tail(x, 5, order="relu-lrn-pool")
    assert_close(ops.relu_lrn_max_pool2d(x, 5), want)
    assert_close(ops.relu_lrn_max_pool2d(x.requires_grad_(), 5), want)


@pytest.mark.parametrize("order", ORDERS)
def test_nan_and_large_half(order, device):
    x = torch.randn(1, 9, 7, 7, device=device)
    x[0, 4, 3, 3] = torch.nan
    torch.testing.assert_close(
        ops.relu_lrn_max_pool2d(x, 5, order=order),
        reference.relu_lrn_max_pool2d(x, 5, order=order),
        equal_nan=True,
    )
    large = (torch.randn(1, 9, 7, 7, device=device) * 2e4).half()
    assert_close(ops.relu_lrn_max_pool2d(large, 5, order=order), exact_tail(large, 5, order=order))


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("order", ORDERS)
def test_gradients(order, device):
    x = (torch.randperm(2 * 4 * 5 * 6).double().view(2, 4, 5, 6) / 20 - 5.02).requires_grad_()
    for args in [dict(size=3, alpha=0.1), dict(size=2, alpha=0.1, beta=0.6, groups=2, padding=1, ceil_mode=True)]:
        function = lambda x, args=args: ops.relu_lrn_max_pool2d(x, **args, order=order)
        assert torch.autograd.gradcheck(function, x, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, x, fast_mode=True)


@pytest.mark.devices("cpu", "cuda")
def test_opcheck(device, kernels):
    formats = [torch.contiguous_format, torch.channels_last, torch.contiguous_format]
    for order, format in enumerate(formats):
        x = torch.randn(2, 6, 8, 9, device=device).contiguous(memory_format=format).requires_grad_()
        lrn, pool = (order, 5, 2, 1e-2, 0.75, 2.0, 1), (3, 2, 0)
        forward = torch.ops.alexnet_cuda.relu_lrn_max_pool2d.default
        torch.library.opcheck(forward, (x, *lrn, *pool, False, True))
        torch.library.opcheck(forward, (x.detach(), *lrn, *pool, False, False))
        y, code = forward(x.detach(), *lrn, *pool, False, True)
        backward = torch.ops.alexnet_cuda._relu_lrn_max_pool2d_backward.default
        torch.library.opcheck(backward, (torch.randn_like(y), x, code, *lrn, *pool))


@pytest.mark.devices("cpu", "cuda")
def test_saves_input_and_one_byte_per_output(device, kernels):
    x = torch.randn(2, 96, 27, 27, device=device, requires_grad=True)
    function = lambda x: ops.relu_lrn_max_pool2d(x, 5)
    assert saved_bytes(function, x) == x.nbytes + function(x).numel()
    with torch.no_grad():
        assert saved_bytes(function, x) == 0


@pytest.mark.parametrize(
    ("shape", "args", "error", "words"),
    [
        ((4, 4), {}, ValueError, "x to be 4-D.*got 2-D"),
        ((1, 4, 9, 9), dict(order="pool-relu-lrn"), ValueError, "order.*got 'pool-relu-lrn'"),
        ((1, 4, 9, 9), dict(size=-1), ValueError, "size.*got -1"),
        ((1, 4, 9, 9), dict(groups=3), ValueError, "groups.*got 3"),
        ((1, 4, 9, 9), dict(padding=2), ValueError, "padding.*got 2"),
        ((1, 4, 2, 9), {}, ValueError, "x to be at least as large as kernel_size 3.*got 2x9"),
    ],
)
@pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])
def test_bad_input(shape, args, error, words, module):
    with pytest.raises(error, match=f"relu_lrn_max_pool2d: expected {words}"):
        module.relu_lrn_max_pool2d(torch.zeros(shape), **{"size": 5, **args})


def test_module():
    x = torch.randn(1, 8, 9, 9)
    block = ReLULRNMaxPool2d(5, k=2.0, order="relu-pool-lrn")
    torch.testing.assert_close(block(x), reference.relu_lrn_max_pool2d(x, 5, k=2.0, order="relu-pool-lrn"))
    assert "order='relu-pool-lrn'" in repr(block)
