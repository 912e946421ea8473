import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits, forward_and_gradients, in_layout, memory_format

from alexnet_cuda import ops, reference
from alexnet_cuda._library import has_kernel

# shape, (kernel_size, stride, padding, ceil_mode)
CASES = [
    ((2, 96, 13, 13), (3, 2, 0, False)),
    ((1, 5, 12, 9), (3, 2, 0, True)),
    ((2, 16, 14, 72), (3, 2, 0, True)),
    ((1, 2, 23, 55), (3, 2, 0, False)),  # planes of an odd width, which two share in NCHW
    ((2, 1, 8, 13), (3, 2, 0, True)),
    ((1, 4, 6, 10), (3, 2, 0, True)),
    ((2, 3, 14, 11), (3, 2, 1, False)),
    ((2, 3, 14, 11), (3, 2, 1, True)),
    ((1, 17, 7, 8), (2, 2, 0, False)),
    ((1, 2, 9, 10), (3, 1, 1, False)),
    ((2, 4, 23, 16), (5, 3, 2, True)),
    ((1, 1, 3, 3), (3, 2, 0, False)),
    ((1, 1, 6, 6), (2, 5, 1, True)),
    ((1, 2, 31, 29), (15, 4, 7, False)),
    ((1, 1, 16, 17), (15, 4, 7, True)),
    ((1, 4, 7, 7), (2, 3, 1, True)),
    ((2, 5, 4, 4), (3, 1, 1, False)),
]


def special(shape):
    """Few different values, so that windows have ties, with zeros of both signs, NaN, and a channel of -inf."""
    x = torch.randint(-2, 3, shape) * torch.tensor([1.0, -1.0])[torch.randint(2, shape)]
    x[:, 1:2] = -torch.inf
    for first, value in enumerate([torch.nan, -torch.inf, torch.inf]):
        x.view(-1)[first :: max(3, x.numel() // 9)] = value
    return x


@pytest.mark.parametrize(("shape", "args"), CASES, ids=str)
def test_is_torchs(shape, args, dtype, layout, device):
    for values in (torch.randn(shape), special(shape)):
        x = in_layout(values.to(device, dtype), layout)
        # the CPU's: on CUDA, torch names the plane's first pixel for a channels_last window of -inf alone
        want, indices = F.max_pool2d(values.to(dtype), *args[:3], 1, args[3], True)
        grad = torch.randn(want.shape).to(dtype)
        y, (gx,) = forward_and_gradients(lambda x: ops.max_pool2d(x, *args), [x], grad)
        got, got_indices = ops.max_pool2d(x, *args, return_indices=True)
        for result in (y, got, ops.max_pool2d(x, *args), reference.max_pool2d(x, *args)):
            assert_same_bits(result.cpu(), want)
        assert got_indices.cpu().equal(indices)
        # the sum over overlapping windows is rounded once here; float64 is exact enough for both
        stock = lambda x: F.max_pool2d(x, *args[:3], 1, args[3])
        _, (want_gx,) = forward_and_gradients(stock, [values.to(dtype).double()], grad)
        torch.testing.assert_close(gx.cpu(), want_gx.to(dtype))
        if layout in ("contiguous", "channels_last") and has_kernel(x):
            assert memory_format(y) == memory_format(gx) == memory_format(x)


@pytest.mark.devices("cpu", "cuda")
def test_indices_of_one_image_and_in_vmap(device):
    x = torch.randn(3, 2, 4, 9, 9, device=device)
    function = lambda x: ops.max_pool2d(x, return_indices=True)[1]
    assert function(x[0, 0]).equal(F.max_pool2d(x[0, 0], 3, 2, return_indices=True)[1])
    assert torch.vmap(function)(x).equal(torch.stack([function(one) for one in x]))
    assert torch.vmap(torch.vmap(function))(x).equal(torch.stack([function(one) for one in x]))


def test_what_goes_to_torch(device):
    x = torch.randn(2, 3, 20, 21, device=device)
    assert ops.max_pool2d(x, (3, 2), (2, 1), (1, 0)).equal(F.max_pool2d(x, (3, 2), (2, 1), (1, 0)))
    assert ops.max_pool2d(x, 17, 2, 8).equal(F.max_pool2d(x, 17, 2, 8))
    assert ops.max_pool2d(x, 3, None).equal(F.max_pool2d(x, 3))
    assert ops.max_pool2d(x, [3, 3], [2, 2]).equal(F.max_pool2d(x, 3, 2))
    if device == "cpu":
        assert ops.max_pool2d(x.long()).equal(F.max_pool2d(x.long(), 3, 2))
