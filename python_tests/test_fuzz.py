"""Random shapes, layouts, dtypes, constants and thread counts against float64."""

from functools import partial

import pytest
import torch
from helpers import assert_matches, distinct, exact_conv2d, exact_lrn, exact_tail, in_layout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_winograd_conv2d import check as check_winograd_conv2d

from alexnet_cuda import ops
from alexnet_cuda._library import KERNEL_DTYPES
from alexnet_cuda.reference import ORDERS

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "channels_last", "sliced", "permuted"]
many = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@st.composite
def lrn_arguments(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.integers(1, 40))
    constants = dict(
        size=draw(st.integers(1, 12)),
        alpha=draw(st.floats(1e-4, 2)),
        beta=draw(st.sampled_from([0.5, 0.75, 1.0, 0.6])),
        k=draw(st.sampled_from([0.5, 1.0, 2.0])),
        groups=groups,
        divide_alpha=draw(st.booleans()),
        window=draw(st.sampled_from(["torch", "onnx"])),
    )
    return channels, constants


def tensor(draw, device, *shape):
    """Distinct values, so that rounding decides no maximum."""
    dtypes = [dtype for dtype in DTYPES if dtype in KERNEL_DTYPES.get(device, DTYPES)]
    x = distinct(*shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    x = x.to(device, draw(st.sampled_from(dtypes)))
    torch.set_num_threads(draw(st.integers(1, 3)))
    return in_layout(x, draw(st.sampled_from(LAYOUTS)))


@many
@given(st.data())
def test_local_response_norm(device, data):
    channels, constants = data.draw(lrn_arguments())
    n, height, width = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    x = tensor(data.draw, device, n, channels, height, width)
    assert_matches(partial(ops.local_response_norm, **constants), partial(exact_lrn, **constants), [x])


@many
@given(st.data())
def test_relu_lrn_max_pool2d(device, data):
    channels, constants = data.draw(lrn_arguments())
    kernel_size = data.draw(st.integers(1, 4))
    constants |= dict(
        order=data.draw(st.sampled_from(ORDERS)),
        kernel_size=kernel_size,
        stride=data.draw(st.integers(1, 3)),
        padding=data.draw(st.integers(0, kernel_size // 2)),
        ceil_mode=data.draw(st.booleans()),
    )
    height, width = (data.draw(st.integers(kernel_size, 12)) for _ in range(2))
    x = tensor(data.draw, device, data.draw(st.integers(0, 3)), channels, height, width)
    # half inputs tie, and normalising in float32 or float64 breaks such ties differently
    exactly = x.dtype in (torch.float32, torch.float64)
    assert_matches(partial(ops.relu_lrn_max_pool2d, **constants), partial(exact_tail, **constants), [x], exactly)


@many
@given(st.data())
def test_conv2d(device, data):
    channels, filters = data.draw(st.sampled_from([1, 3, 4])), data.draw(st.integers(1, 70))
    options = dict(padding=data.draw(st.integers(0, 5)), ceil_mode=data.draw(st.booleans()))
    height, width = (data.draw(st.integers(11, 40)) for _ in range(2))
    x = tensor(data.draw, device, data.draw(st.integers(1, 3)), channels, height, width)
    weight = torch.randn(filters, channels, 11, 11).div(19).to(x)
    inputs = x, weight, torch.randn(filters).to(x)
    assert_matches(partial(ops.conv2d, **options), partial(exact_conv2d, **options), inputs)


@many
@given(data=st.data())
def test_winograd_conv2d(data, kernels):
    size, groups = data.draw(st.sampled_from([3, 5])), data.draw(st.integers(1, 3))
    padding = data.draw(st.integers(0, size - 1))
    height, width = (data.draw(st.integers(max(1, size - 2 * padding), 14)) for _ in range(2))
    channels, filters = (groups * 16 * data.draw(st.integers(1, 5)) for _ in range(2))
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    sizes = channels, filters, groups, size, padding, height, width
    check_winograd_conv2d(data.draw(st.integers(1, 24)), sizes, data.draw(st.sampled_from(LAYOUTS)))
