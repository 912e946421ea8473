"""Linear layers in float32 on the CPU (ops/linear.py): torch's results, and who computes them."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_all_close, assert_same_derivatives, forward_and_gradients
from torch.autograd import forward_ad

from alexnet_cuda import _library
from alexnet_cuda.ops import linear as module
from alexnet_cuda.ops.linear import linear

pytestmark = pytest.mark.usefixtures("kernels")


def tensors(images, inputs=1024, outputs=1100):
    return torch.randn(images, inputs), torch.randn(outputs, inputs) / 32, torch.randn(outputs)


def close(got, expected):
    assert_all_close([got], [expected], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("images", [0, 1, 2, 7, 8, 40, 129])
@pytest.mark.parametrize("relu", [False, True])
def test_is_torchs(images, relu):
    x, weight, bias = tensors(images)
    assert module._is_served(x, weight, bias)
    for b in (bias, None):
        expected = F.linear(x, weight, b)
        y = linear(x, weight, b, relu=relu)
        close(y, expected.relu() if relu else expected)
        assert y.is_contiguous()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("images", [1, 9])
def test_derivatives(images, relu):
    stock = lambda *inputs: F.linear(*inputs).relu() if relu else F.linear(*inputs)
    assert_same_derivatives(partial(linear, relu=relu), stock, tensors(images))


def test_opcheck_and_compile():
    x, weight, bias = (leaf.requires_grad_() for leaf in tensors(9))
    torch.library.opcheck(torch.ops.alexnet_cuda.linear.default, (x, weight, bias, True))
    grad = torch.randn(9, 1100)
    torch.library.opcheck(torch.ops.alexnet_cuda._linear_weight_grad.default, (grad, x.detach()))
    compiled = torch.compile(lambda *leaves: linear(*leaves, relu=True), fullgraph=True, backend="aot_eager")
    results = (forward_and_gradients(f, (x, weight, bias)) for f in (compiled, partial(linear, relu=True)))
    torch.testing.assert_close(*results)


def test_weight_gradient_uses_cached_memory():
    """The memory of the last one: it was not copied on its way to .grad either."""
    before = _library._C.set_cache_limit(64 << 20)
    try:
        x, weight, _ = tensors(3)
        weight.requires_grad_()
        linear(x, weight).sum().backward()
        address = weight.grad.data_ptr()
        weight.grad = None
        linear(x, weight).sum().backward()
        assert weight.grad.data_ptr() == address
    finally:
        _library._C.set_cache_limit(before)


def test_what_torch_computes():
    x, weight, bias = tensors(3)
    assert not module._is_served(x, weight[:1000], bias[:1000])  # small
    assert not module._is_served(x.double(), weight.double(), bias.double())
    assert not module._is_served(x[:, :1000], weight, bias)
    assert not module._is_served(x[0], weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        close(linear(x, weight, bias), F.linear(x, weight, bias))
    close(torch.vmap(linear, (0, None))(x[:, None], weight)[:, 0], F.linear(x, weight))
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(linear(forward_ad.make_dual(x, x), weight)).tangent is not None
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x[:, :1000], weight)
