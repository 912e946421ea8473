"""What the operators have in common: compilation, transforms, autocast, empty batches, determinism."""

from functools import partial

import pytest
import torch
from helpers import assert_same_bits

from alexnet_cuda import ops
from alexnet_cuda.reference import ORDERS

IMAGE, PHOTO, WEIGHT = (96, 14, 15), (3, 67, 63), (64, 3, 11, 11)
OPERATORS = {  # function of (x, weights ...), shape of one image, shapes of the weights
    "lrn": (partial(ops.local_response_norm, size=5, alpha=0.1), IMAGE),
    "pool": (ops.max_pool2d, IMAGE),
    "conv2d": (ops.conv2d, PHOTO, WEIGHT),
    **{o: (partial(ops.relu_lrn_max_pool2d, size=5, alpha=0.1, order=o), IMAGE) for o in ORDERS},
    **{
        f"block-{o}": (partial(ops.conv2d_relu_lrn_max_pool2d, bias=None, size=5, k=2.0, order=o), PHOTO, WEIGHT)
        for o in ORDERS
    },
}


@pytest.fixture(params=OPERATORS)
def operator(request, device):
    """(function, one image, weights)"""
    function, *shapes = OPERATORS[request.param]
    image, *weights = (torch.randn(shape, device=device) for shape in shapes)
    return function, image, [weight / 19 for weight in weights]


def run(function, inputs):
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y.square().sum(), leaves)


@pytest.mark.devices("cpu", "cuda")
def test_compile(operator):
    function, image, weights = operator
    inputs = [torch.stack([image, image.flip(0)]), *weights]
    for got, want in zip(run(torch.compile(function, fullgraph=True), inputs), run(function, inputs)):
        torch.testing.assert_close(got, want)


@pytest.mark.devices("cpu", "cuda")
def test_vmap_and_func_grad(operator):
    function, image, weights = operator
    loose = dict(rtol=1e-4, atol=1e-4) if weights else {}  # float32 sums of hundreds of products, in another order
    x, dims = torch.stack([image, -image, image.flip(0)])[:, None], (0, *[None] * len(weights))
    together = torch.stack([function(one, *weights) for one in x])
    torch.testing.assert_close(torch.vmap(function, dims)(x, *weights), together, **loose)
    gradient = torch.func.grad(lambda x, *weights: function(x, *weights).square().sum())
    gradients = torch.stack([gradient(one, *weights) for one in x])
    torch.testing.assert_close(torch.vmap(gradient, dims)(x, *weights), gradients, **loose)
    torch.testing.assert_close(run(function, [x[:, 0], *weights])[1], gradients[:, 0], **loose)


def test_unbatched_and_empty(operator):
    function, image, weights = operator
    y = function(image[None], *weights)
    if getattr(function, "func", None) is not ops.local_response_norm:  # whose 3-D input is (N, C, L)
        assert_same_bits(function(image, *weights)[None], y)
    empty = image[None][:0].requires_grad_()
    y_empty = function(empty, *weights)
    assert y_empty.shape == (0, *y.shape[1:])
    y_empty.sum().backward()
    assert empty.grad.shape == empty.shape


def test_autocast(operator):
    function, image, weights = operator
    with torch.autocast(image.device.type, torch.bfloat16):
        assert function(image[None].bfloat16(), *weights).dtype == torch.bfloat16
        assert function(image[None], *weights).dtype == (torch.bfloat16 if weights else torch.float32)


def test_deterministic(operator):
    function, image, weights = operator
    inputs = [torch.stack([image, -image, image.flip(0), image.flip(1)]), *weights]
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = [run(function, inputs) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in others:
        assert_same_bits(other, first)
