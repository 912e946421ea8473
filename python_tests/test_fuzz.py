"""Random shapes, layouts, dtypes, constants and thread counts against float64."""

import pytest
import torch
from helpers import assert_close, forward_and_gradients, in_layout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_conv2d import exact as exact_conv2d
from test_local_response_norm import exact as exact_lrn
from test_relu_lrn_max_pool2d import exact as exact_tail

from alexnet_cuda import ops
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


def tensor(draw, *shape):
    """Distinct values, so that rounding decides no maximum."""
    values = torch.randperm(
        torch.Size(shape).numel(), generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))
    )
    x = (values.double().view(shape) / max(1, values.numel() - 1) * 6 - 3).to(draw(st.sampled_from(DTYPES)))
    torch.set_num_threads(draw(st.integers(1, 3)))
    return in_layout(x, draw(st.sampled_from(LAYOUTS)))


def check(function, exact, *inputs, gradients=True):
    want = exact(*(x.double() for x in inputs))
    grad = torch.randn(want.shape, dtype=torch.float64).to(inputs[0].dtype).double()
    y, got = forward_and_gradients(function, inputs, grad)
    assert_close(y, want)
    if gradients:
        _, wanted = forward_and_gradients(exact, [x.double() for x in inputs], grad)
        for a, b in zip(got, wanted):
            assert_close(a, b)


@many
@given(st.data())
def test_local_response_norm(data):
    channels, constants = data.draw(lrn_arguments())
    x = tensor(
        data.draw, data.draw(st.integers(0, 3)), channels, data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    )
    check(lambda x: ops.local_response_norm(x, **constants), lambda x: exact_lrn(x, **constants), x)


@many
@given(st.data())
def test_relu_lrn_max_pool2d(data):
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
    x = tensor(data.draw, data.draw(st.integers(0, 3)), channels, height, width)
    # half inputs tie, and normalising in float32 or float64 breaks such ties differently
    exactly = x.dtype in (torch.float32, torch.float64)
    check(
        lambda x: ops.relu_lrn_max_pool2d(x, **constants),
        lambda x: exact_tail(x, **constants),
        x,
        gradients=exactly,
    )


@many
@given(st.data())
def test_conv2d(data):
    channels, filters = data.draw(st.sampled_from([1, 3, 4])), data.draw(st.integers(1, 70))
    options = dict(padding=data.draw(st.integers(0, 5)), ceil_mode=data.draw(st.booleans()))
    height, width = (data.draw(st.integers(11, 40)) for _ in range(2))
    x = tensor(data.draw, data.draw(st.integers(1, 3)), channels, height, width)
    weight = (torch.randn(filters, channels, 11, 11) / 19).to(x.dtype)
    bias = torch.randn(filters).to(x.dtype)
    check(lambda *i: ops.conv2d(*i, **options), lambda *i: exact_conv2d(*i, **options), x, weight, bias)
