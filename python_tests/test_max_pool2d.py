import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits, forward_and_gradients, in_layout, memory_format, saved_bytes

from alexnet_cuda import ops, reference
from alexnet_cuda._library import has_kernel

# shape, (kernel_size, stride, padding, ceil_mode)
CASES = [
    ((2, 96, 13, 13), (3, 2, 0, False)),
    ((1, 5, 12, 9), (3, 2, 0, True)),
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
    """Few different values, so that windows have ties, and some NaN and infinities."""
    x = torch.randint(-2, 3, shape).float()
    x.view(-1)[:: max(2, x.numel() // 9)] = torch.nan
    x.view(-1)[1 :: max(2, x.numel() // 7)] = -torch.inf
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
        _, (want_gx,) = forward_and_gradients(
            lambda x: F.max_pool2d(x, *args[:3], 1, args[3]), [values.to(dtype).double()], grad
        )
        torch.testing.assert_close(gx.cpu(), want_gx.to(dtype))
        if layout in ("contiguous", "channels_last") and has_kernel(x):
            assert memory_format(y) == memory_format(gx) == memory_format(x)


def test_ties_and_special_values(dtype, device):
    x = torch.randint(-1, 2, (3, 4, 15, 15), device=device).to(dtype)
    x[1, :, 3:9, 4:8] = torch.nan
    x[1, :, 12, 12] = torch.inf
    x[2, 0] = -torch.inf
    x[2, 1] = 0.0
    x[2, 1, ::2] = -0.0
    for format in (torch.contiguous_format, torch.channels_last):
        for padding in (0, 1):
            x = x.contiguous(memory_format=format)
            # the CPU's: on CUDA, torch names the plane's first pixel for a channels_last window of -inf alone
            want, indices = (t.to(device) for t in F.max_pool2d(x.cpu(), 3, 2, padding, return_indices=True))
            got, got_indices = ops.max_pool2d(x, 3, 2, padding, return_indices=True)
            assert_same_bits(got, want)
            assert got_indices.equal(indices)
            grad = torch.randn_like(want)
            _, (gx,) = forward_and_gradients(lambda x, p=padding: ops.max_pool2d(x, 3, 2, p), [x], grad)
            stock = lambda x, p=padding: F.max_pool2d(x, 3, 2, p)
            _, (want_gx,) = forward_and_gradients(stock, [x.double().cpu()], grad)
            torch.testing.assert_close(gx.cpu(), want_gx.to(dtype))


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


@pytest.mark.devices("cpu")
def test_gradients(device):
    x = torch.randperm(2 * 2 * 7 * 8).double().view(2, 2, 7, 8).requires_grad_()
    for args in [(3, 2, 0, False), (3, 2, 1, True), (2, 3, 1, False)]:
        assert torch.autograd.gradcheck(lambda x, args=args: ops.max_pool2d(x, *args), x, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(lambda x, args=args: ops.max_pool2d(x, *args), x)


@pytest.mark.devices("cpu", "cuda")
def test_opcheck(device, kernels):
    for format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 8, 9, device=device).contiguous(memory_format=format).requires_grad_()
        torch.library.opcheck(torch.ops.alexnet_cuda.max_pool2d.default, (x, 3, 2, 1, True, True))
        torch.library.opcheck(torch.ops.alexnet_cuda.max_pool2d.default, (x.detach(), 3, 2, 0, False, False))
        y, code = torch.ops.alexnet_cuda.max_pool2d(x.detach(), 3, 2, 0, False, True)
        torch.library.opcheck(
            torch.ops.alexnet_cuda._max_pool2d_backward.default, (torch.randn_like(y), code, 8, 9, 3, 2, 0)
        )


@pytest.mark.devices("cpu", "cuda")
def test_saves_one_byte_per_output(device, kernels):
    x = torch.randn(2, 96, 55, 55, device=device, requires_grad=True)
    assert saved_bytes(ops.max_pool2d, x) == ops.max_pool2d(x).numel()
    with torch.no_grad():
        assert saved_bytes(ops.max_pool2d, x) == 0


@pytest.mark.parametrize(
    ("shape", "args", "words"),
    [
        ((4, 4), (), "x to be 4-D.*got 2-D"),
        ((1, 0, 4, 4), (), r"x to have channels.*got shape \(1, 0, 4, 4\)"),
        ((1, 1, 2, 8), (), "x to be at least as large as kernel_size 3.*got 2x8"),
        ((1, 1, 8, 8), (0,), "kernel_size.*got 0"),
        ((1, 1, 8, 8), (3, 0), "stride.*got 0"),
        ((1, 1, 8, 8), (3, 2, -1), "padding.*got -1"),
        ((1, 1, 8, 8), (3, 2, 2), "padding to be at most half of kernel_size 3, got 2"),
        ((1, 1, 8, 8), ((3, 3, 3),), r"kernel_size.*got \(3, 3, 3\)"),
        ((1, 1, 8, 8), (3, "2"), "stride.*got '2'"),
    ],
)
@pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])
def test_bad_input(shape, args, words, module):
    with pytest.raises(ValueError, match=f"max_pool2d: expected {words}"):
        module.max_pool2d(torch.zeros(shape), *args)
