"""What the operators have in common: derivatives, registration, compilation, transforms, autocast, empty batches,
determinism, and what they save for backward."""

from functools import partial

import pytest
import torch
from helpers import assert_derivatives, assert_same_bits, forward_and_gradients
from timing import saved_bytes

from alexnet_cuda import ops
from alexnet_cuda.reference import ORDERS

IMAGE, PHOTO, WEIGHT = (96, 14, 15), (3, 67, 63), (64, 3, 11, 11)
BLOCK = partial(ops.conv2d_relu_lrn_max_pool2d, bias=None, size=5, k=2.0)
OPERATORS = {  # function of (x, weights ...), shape of one image, shapes of the weights
    "lrn": (partial(ops.local_response_norm, size=5, alpha=0.1), IMAGE),
    "pool": (ops.max_pool2d, IMAGE),
    "conv2d": (ops.conv2d, PHOTO, WEIGHT),
    "conv2d-3x3": (partial(ops.conv2d, stride=1, padding=1, groups=2, relu=True), (32, 9, 9), (48, 16, 3, 3)),
    **{o: (partial(ops.relu_lrn_max_pool2d, size=5, alpha=0.1, order=o), IMAGE) for o in ORDERS},
    **{f"block-{o}": (partial(BLOCK, order=o), PHOTO, WEIGHT) for o in ORDERS},
}


@pytest.fixture(params=OPERATORS)
def operator(request, device):
    """(function, one image, weights)"""
    function, *shapes = OPERATORS[request.param]
    image, *weights = (torch.randn(shape, device=device) for shape in shapes)
    return function, image, [weight / 19 for weight in weights]


@pytest.mark.devices("cpu", "cuda")
def test_compile(operator):
    function, image, weights = operator
    inputs = [torch.stack([image, image.flip(0)]), *weights]
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(*(forward_and_gradients(f, inputs) for f in (compiled, function)))


@pytest.mark.devices("cpu", "cuda")
def test_vmap_and_func_grad(operator):
    function, image, weights = operator
    loose = dict(rtol=1e-4, atol=1e-4) if weights else {}  # float32 sums of hundreds of products, in another order
    x, dims = torch.stack([image, -image, image.flip(0)])[:, None], (0, *[None] * len(weights))
    together = torch.stack([function(one, *weights) for one in x])
    torch.testing.assert_close(torch.vmap(function, dims)(x, *weights), together, **loose)
    gradient = torch.func.grad(lambda x, *weights: function(x, *weights).square().sum() / 2)
    gradients = torch.stack([gradient(one, *weights) for one in x])
    torch.testing.assert_close(torch.vmap(gradient, dims)(x, *weights), gradients, **loose)
    whole = forward_and_gradients(function, [x[:, 0], *weights])[1][0]
    torch.testing.assert_close(whole, gradients[:, 0], **loose)


def test_unbatched_and_empty(operator):
    function, image, weights = operator
    y = function(image[None], *weights)
    if getattr(function, "func", None) is not ops.local_response_norm:  # whose 3-D input is (N, C, L)
        assert_same_bits(function(image, *weights)[None], y)
    empty, weights = image[None][:0].requires_grad_(), [weight.requires_grad_() for weight in weights]
    y_empty = function(empty, *weights)
    assert y_empty.shape == (0, *y.shape[1:])
    y_empty.sum().backward()
    assert empty.grad.shape == empty.shape
    assert not any(weight.grad.any() for weight in weights)


def test_autocast(operator):
    function, image, weights = operator
    with torch.autocast(image.device.type, torch.bfloat16):
        y = function(image[None].bfloat16(), *weights)
        assert function(image[None], *weights).dtype == (torch.bfloat16 if weights else torch.float32)
    assert y.dtype == torch.bfloat16
    assert_same_bits(y, function(image[None].bfloat16(), *(weight.bfloat16() for weight in weights)))


def test_deterministic(operator):
    function, image, weights = operator
    inputs = [torch.stack([image, -image, image.flip(0), image.flip(1)]), *weights]
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = [forward_and_gradients(function, inputs) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for other in others:
        assert_same_bits(other, first)


@pytest.mark.devices("cpu", "cuda")
def test_saves_for_backward(operator, request, kernels):
    """Its inputs, what backward needs of the output of a convolution, and one byte for each window of a pooling."""
    function, image, weights = operator
    inputs = [leaf.requires_grad_() for leaf in (image[None], *weights)]
    name, y = request.node.callspec.params["operator"], function(*inputs)
    expected = 0 if name == "pool" else sum(leaf.nbytes for leaf in inputs)
    expected += {"lrn": 0, "conv2d": 0, "conv2d-3x3": y.nbytes}.get(name, y.numel())
    if name.startswith("block"):
        expected += ops.conv2d(*inputs).nbytes
    assert saved_bytes(partial(function, *inputs)) == expected
    with torch.no_grad():
        assert saved_bytes(partial(function, *inputs)) == 0


POOL = dict(pool=(3, 2, 0, False), ceil=(3, 2, 1, True), gaps=(2, 3, 1, False))
FILTERS = [(2, 1, 11, 11), (2,)]
TAIL = dict(size=2, alpha=0.1, beta=0.6, groups=2, padding=1, ceil_mode=True)
DERIVATIVES = {  # function of x (and weight, bias), their shapes, which derivatives are taken in one direction only
    **{name: (lambda x, a=a: ops.max_pool2d(x, *a), [(2, 2, 7, 8)]) for name, a in POOL.items()},
    "conv2d": (ops.conv2d, [(2, 1, 15, 16), *FILTERS], (True, True)),
    "conv2d-ceil": (partial(ops.conv2d, padding=1, ceil_mode=True), [(2, 1, 12, 14), *FILTERS], (True, True)),
}
for o in ORDERS:
    tail = partial(ops.relu_lrn_max_pool2d, order=o)
    DERIVATIVES[o] = partial(tail, size=3, alpha=0.1), [(2, 4, 5, 6)], (False, True)
    DERIVATIVES[f"{o}-ceil"] = partial(tail, **TAIL), [(2, 4, 5, 6)], (False, True)
    block = partial(ops.conv2d_relu_lrn_max_pool2d, size=3, alpha=0.1, order=o)
    DERIVATIVES[f"block-{o}"] = block, [(2, 1, 19, 20), (4, 1, 11, 11), (4,)], (True, True)


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives(name):
    assert_derivatives(*DERIVATIVES[name])


def calls(device, memory_format, orders):
    """Each operator with arguments; what is differentiated requires a gradient."""
    op, (lrn, pool) = torch.ops.alexnet_cuda, ((5, 2, 1e-2, 0.75, 2.0, 1), (3, 2, 1))
    new = lambda *shape: torch.randn(shape, device=device)
    x, photo, image = (new(*s).to(memory_format=memory_format) for s in ((2, 6, 8, 9), (2, 3, 27, 31), (8, 32, 9, 9)))
    leaf = lambda *shape: new(*shape).requires_grad_()
    convolutions = (photo, leaf(5, 3, 11, 11), 4, 1, 1), (image, leaf(48, 16, 3, 3), 1, 1, 2)
    for (x_conv, weight, *sizes), ceil_mode in zip(convolutions, (True, False)):
        bias = leaf(len(weight))
        yield "conv2d", (x_conv.clone().requires_grad_(), weight, bias, *sizes, ceil_mode, True)
        y = op.conv2d(x_conv, weight.detach(), None, *sizes, ceil_mode, False)
        yield "_conv2d_weight_grad", (y, x_conv, weight.shape[-1], *sizes, True)
        yield "_conv2d_input_grad", (y, weight.detach(), *x_conv.shape[2:], *sizes)
    x_leaf, y_code = x.clone().requires_grad_(), op.max_pool2d(x, *pool, True, True)
    grad, code = torch.randn_like(y_code[0]), y_code[1]
    yield "local_response_norm", (x_leaf, *lrn, False)
    yield "_local_response_norm_backward", (torch.randn_like(x), x, *lrn, False)
    yield "max_pool2d", (x_leaf, *pool, True, True)
    yield "max_pool2d", (x, *pool, False, False)
    yield "_max_pool2d_backward", (grad, code, *x.shape[2:], *pool)
    for order in orders:
        yield "relu_lrn_max_pool2d", (x_leaf, order, *lrn, *pool, True, True)
        yield "relu_lrn_max_pool2d", (x, order, *lrn, *pool, True, False)
        yield "_relu_lrn_max_pool2d_backward", (grad, x_leaf, code, order, *lrn, *pool)
    block = 4, 0, True, 0, *lrn, *pool, False
    yield "conv2d_relu_lrn_max_pool2d", (photo.requires_grad_(), leaf(6, 3, 11, 11), leaf(6), *block, True)
    yield "conv2d_relu_lrn_max_pool2d", (photo.detach(), new(6, 3, 11, 11), None, *block, False)


@pytest.mark.parametrize(
    ("format", "orders"), [(torch.contiguous_format, (0, 2)), (torch.channels_last, (1,))], ids=["nchw", "nhwc"]
)
def test_registration(format, orders, device, kernels):
    for name, arguments in calls(device, format, orders):
        torch.library.opcheck(getattr(torch.ops.alexnet_cuda, name).default, arguments)
