import math
from functools import partial

import pytest
import torch
from helpers import assert_close, assert_matches, distinct, exact_tail, in_layout, memory_format

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
    ((1, 40, 6, 8), dict(size=5, alpha=0.3, ceil_mode=True)),
    ((1, 24, 5, 6), dict(size=5, alpha=0.3, groups=2, padding=1)),
    ((1, 8, 3, 150), dict(size=5, alpha=0.3)),
    ((1, 4, 45, 3), dict(size=3, alpha=0.3, beta=1.0, groups=2, padding=1, ceil_mode=True)),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("shape", "args"), CASES, ids=str)
def test_matches_float64(shape, args, order, dtype, layout, device):
    x = in_layout(distinct(*shape).to(dtype).to(device), layout)
    function, stock = (partial(m.relu_lrn_max_pool2d, **args, order=order) for m in (ops, reference))
    exactly = dtype in (torch.float32, torch.float64) or args["alpha"] >= 0.3  # half inputs tie, broken by rounding
    y, (gx,) = assert_matches(function, partial(exact_tail, **args, order=order), [x], exactly, [function, stock])
    if layout in ("contiguous", "channels_last") and has_kernel(x) and args.get("across") != "spatial":
        assert memory_format(y) == memory_format(gx) == memory_format(x)


@pytest.mark.parametrize("order", ORDERS)
def test_low_precision_gradient(order, device):
    """Few distinct half values and no overlap between windows: ties go to the first maximum, as in float64."""
    x = torch.randint(-3, 4, (2, 8, 8, 8), device=device).half()
    args = dict(size=1, alpha=0.5, order=order, kernel_size=2, stride=2)
    assert_matches(partial(ops.relu_lrn_max_pool2d, **args), partial(exact_tail, **args), [x])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("special", [-0.0, math.nan, -math.nan, math.inf], ids=str)
def test_special_values(special, order, layout, device):
    """A zero never wins a window with something larger, whatever its sign; a NaN always wins, whatever its sign."""
    x = torch.rand(2, 32, 9, 9) + 0.1
    x[torch.rand(x.shape) < 0.3] = special
    x = in_layout(x.to(device), layout)
    want = exact_tail(x, 5, order=order)
    assert_close(ops.relu_lrn_max_pool2d(x, 5, order=order), want)
    assert_close(ops.relu_lrn_max_pool2d(x.requires_grad_(), 5, order=order), want)


@pytest.mark.parametrize("order", ORDERS)
def test_large_half(order, device):
    large = (torch.randn(1, 9, 7, 7, device=device) * 2e4).half()
    assert_close(ops.relu_lrn_max_pool2d(large, 5, order=order), exact_tail(large, 5, order=order))


def test_module():
    x = torch.randn(1, 8, 9, 9)
    block = ReLULRNMaxPool2d(5, k=2.0, order="relu-pool-lrn")
    torch.testing.assert_close(block(x), reference.relu_lrn_max_pool2d(x, 5, k=2.0, order="relu-pool-lrn"))
    assert "order='relu-pool-lrn'" in repr(block)
