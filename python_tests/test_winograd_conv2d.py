"""3x3 and 5x5 convolutions with stride 1 on the CPU, their gradients and second derivatives, against float64. On a CPU
with AMX, a kernel of ours computes the weight gradients in bfloat16, elsewhere torch."""

from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_derivatives, in_layout, memory_format

from alexnet_cuda import ops

pytestmark = pytest.mark.usefixtures("kernels")
_op = torch.ops.alexnet_cuda
# channels, filters, groups, kernel size, padding, height, width: blocks of filters and tiles filled in part
SIZES = [
    (96, 256, 2, 5, 2, 27, 27),
    (32, 48, 1, 3, 1, 13, 13),
    (48, 16, 1, 3, 0, 5, 11),
    (160, 96, 2, 3, 2, 6, 7),
    (16, 80, 1, 5, 4, 1, 1),
    (96, 96, 3, 5, 0, 9, 6),
]


def tensors(images, channels, filters, groups, size, padding, height, width):
    """x, weight, bias and the gradient of the output, small enough for every sum to be of one order."""
    generator = torch.Generator().manual_seed(images * height + filters)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    out = height + 2 * padding - size + 1, width + 2 * padding - size + 1
    return (
        draw(images, channels, height, width).relu(),
        draw(filters, channels // groups, size, size) / size / (channels // groups) ** 0.5,
        draw(filters),
        draw(images, filters, *out),
    )


def close(result, exact):
    """The largest error, not every element's: the results of a tile share one."""
    assert result.shape == exact.shape
    if exact.numel():
        error, scale = (t.abs().max().item() for t in (result - exact, exact))
        assert error <= 5e-6 * scale, f"{error:.2g} of {scale:.2g}"


def check(images, sizes, layout="channels_last"):
    _, _, groups, size, padding, height, width = sizes
    x, weight, bias, grad = tensors(images, *sizes)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    exact = F.conv2d(*leaves, padding=padding, groups=groups)
    grad_x, grad_weight, grad_bias = torch.autograd.grad(exact, leaves, grad.double())
    exact = exact.detach()
    x, grad = in_layout(x, layout), in_layout(grad, layout)
    got = _op.conv2d(x, weight, bias, 1, padding, groups, False, False)
    close(got, exact)
    close(_op.conv2d(x, weight, bias, 1, padding, groups, False, True), exact.relu())
    close(_op.conv2d(x, weight, None, 1, padding, groups, False, False), exact - bias.double()[:, None, None])
    close(_op._conv2d_input_grad(grad, weight, height, width, 1, padding, groups), grad_x)
    weights = _op._conv2d_weight_grad(grad, x, size, 1, padding, groups, True)
    close(weights[0], grad_weight)
    close(weights[1], grad_bias)
    assert torch.equal(_op._conv2d_weight_grad(grad, x, size, 1, padding, groups, False)[0], weights[0])
    return got


def check_sizes():
    """At every instruction-set level: test_cpu_kernels.py."""
    for sizes in SIZES:
        check(9, sizes)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("images", [0, 1, 3, 33])
def test_against_float64(images, sizes):
    check(images, sizes)


@pytest.mark.parametrize("sizes", SIZES[:2])
def test_layouts(sizes, layout):
    y = check(2, sizes, layout)
    channels_last = layout in ("channels_last", "offset")
    assert memory_format(y) == (torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e25, -3e38])
def test_values_beyond_the_range_of_the_algorithm(value):
    """Wherever in a tile they are, nothing but the windows that contain them is affected, as in torch."""
    sizes = 16, 16, 1, 3, 1, 7, 7
    x, weight, bias, grad = tensors(17, *sizes)
    loose = dict(rtol=1e-4, atol=1e-4, equal_nan=True)

    def results():
        """Those of the kernels, and torch's: the output, and the gradients of x and the weight."""
        aten = torch.ops.aten.convolution_backward
        stock = aten(grad, x, weight, [16], (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (True, True, False))
        yield _op.conv2d(x, weight, bias, 1, 1, 1, False, False), F.conv2d(x, weight, bias, padding=1)
        yield _op._conv2d_input_grad(grad, weight, 7, 7, 1, 1, 1), stock[0]
        yield _op._conv2d_weight_grad(grad, x, 3, 1, 1, 1, True)[0], stock[1]

    for changed, place in [*product((x[1, 5], grad[1, 5]), range(0, 49, 2)), (weight[3, 2], 3)]:
        place = divmod(place, changed.shape[1])
        before = changed[place].clone()
        changed[place] = value
        for got, expected in results():
            torch.testing.assert_close(got, expected, **loose)
        changed[place] = before


@pytest.mark.parametrize("relu", [False, True])
def test_derivatives(relu):
    def stock(*inputs):
        y = F.conv2d(*inputs, padding=2, groups=2)
        return y.relu() if relu else y

    inputs = tensors(9, 32, 64, 2, 5, 2, 12, 12)[:3]
    assert_same_derivatives(partial(ops.conv2d, stride=1, padding=2, groups=2, relu=relu), stock, inputs)


# As in SIZES: single tiles of 16 channels or filters, images that end inside a block of 32 positions, many images.
@pytest.mark.parametrize("images", [1, 3, 70])
@pytest.mark.parametrize(
    "sizes",
    [
        (16, 16, 1, 3, 0, 3, 3),
        (32, 48, 1, 3, 1, 13, 13),
        (48, 16, 1, 3, 2, 5, 11),
        (192, 96, 2, 3, 1, 9, 7),
        (160, 160, 1, 3, 1, 8, 8),
    ],
)
def test_weight_gradient_in_bfloat16(images, sizes):
    _, filters, groups, size, padding, _, _ = sizes
    x, weight, _, grad = (t.bfloat16() for t in tensors(images, *sizes))
    exact = torch.ops.aten.convolution_backward(
        grad.double(), x.double(), weight.double(), [filters], [1, 1], [padding] * 2, [1, 1], False, [0, 0], groups,
        [False, True, True],
    )  # fmt: skip
    x, grad = in_layout(x, "channels_last"), in_layout(grad, "channels_last")
    results = _op._conv2d_weight_grad(grad, x, size, 1, padding, groups, True)
    for result, double in zip(results, exact[1:]):
        assert result.shape == double.shape
        assert result.dtype == torch.bfloat16
        assert (result - double).abs().max() <= double.abs().max() / 256  # one rounding, as of torch's own
    without_bias = _op._conv2d_weight_grad(grad, x, size, 1, padding, groups, False)
    assert torch.equal(without_bias[0], results[0])


def test_infinity_in_bfloat16_reaches_what_it_does_in_torch():
    sizes = (32, 32, 1, 3, 1, 5, 5)
    x, weight, _, grad = (t.bfloat16() for t in tensors(2, *sizes))
    x[1, 3, 0, 0] = torch.inf
    leaf = weight.requires_grad_()
    (expected,) = torch.autograd.grad(F.conv2d(x, leaf, padding=1), leaf, grad)
    (result,) = torch.autograd.grad(ops.conv2d(x, leaf, stride=1, padding=1), leaf, grad)
    assert not result.isfinite().all()
    torch.testing.assert_close(result, expected, equal_nan=True)
