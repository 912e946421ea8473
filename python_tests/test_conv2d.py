import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, assert_matches, exact_conv2d, forward_and_gradients, in_layout, memory_format, tf32

from alexnet_cuda import _library, ops, reference
from alexnet_cuda._library import has_kernel
from alexnet_cuda.nn import Conv2d

# (N, C, H, W), filters, bias, padding, ceil_mode
CASES = [
    ((2, 3, 35, 47), 96, True, 0, False),
    ((1, 3, 32, 33), 64, False, 2, False),
    ((2, 3, 24, 21), 64, True, 0, True),
    ((1, 1, 28, 29), 96, True, 0, False),
    ((1, 1, 28, 29), 96, False, 0, True),
    ((3, 4, 23, 30), 7, True, 3, True),
    ((1, 3, 11, 11), 1, True, 0, False),
    ((2, 3, 12, 14), 50, False, 1, True),
    ((2, 3, 13, 79), 200, True, 0, True),  # in bfloat16 by the matrix unit, in blocks of 96, 96 and 32 filters
]


@pytest.mark.parametrize(("shape", "filters", "bias", "padding", "ceil_mode"), CASES, ids=str)
def test_matches_float64(shape, filters, bias, padding, ceil_mode, dtype, layout, device):
    x = in_layout(torch.randn(shape, device=device).to(dtype), layout)
    weight = torch.randn(filters, shape[1], 11, 11, device=device).div(19).to(dtype)
    inputs = [x, weight] + [torch.randn(filters, device=device).to(dtype)] * bias
    function, stock, exact = (
        partial(f, padding=padding, ceil_mode=ceil_mode) for f in (ops.conv2d, reference.conv2d, exact_conv2d)
    )
    y, _ = assert_matches(function, exact, inputs, also=[stock])
    if layout in ("contiguous", "channels_last") and shape[1] > 1 and filters > 1 and has_kernel(x):
        assert memory_format(y) == memory_format(x)


@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize(("size", "padding", "ceil_mode"), [(227, 0, False), (224, 2, False), (224, 0, True)])
def test_alexnets_sizes(size, padding, ceil_mode, device):
    x, weight = torch.randn(2, 3, size, size, device=device), torch.randn(96, 3, 11, 11, device=device) / 19
    y = ops.conv2d(x, weight, padding=padding, ceil_mode=ceil_mode)
    assert y.shape == (2, 96, 55, 55)
    assert_close(y, exact_conv2d(x, weight, padding=padding, ceil_mode=ceil_mode))


@pytest.mark.parametrize(("channels", "kernel", "stride"), [(3, 5, 1), (3, 11, 2), (2, 11, 4), (48, 5, 1)])
def test_what_goes_to_torch(channels, kernel, stride, device):
    x = torch.randn(1, channels, 20, 20, device=device)
    weight = torch.randn(4, channels, kernel, kernel, device=device)
    assert ops.conv2d(x, weight, stride=stride).equal(F.conv2d(x, weight, stride=stride))


@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize(
    ("shape", "kernel", "padding", "ceil_mode"),
    [
        ((8, 32, 3, 3), 3, 0, False),
        ((8, 32, 1, 1), 3, 1, False),
        ((4, 3, 2, 3), 5, 2, False),
        ((2, 5, 3, 3), 3, 0, True),
    ],
    ids=str,
)
def test_an_output_of_one_pixel(shape, kernel, padding, ceil_mode, dtype, layout, device):
    """oneDNN in torch 2.14 reads uninitialised memory for the bfloat16 gradients of such weights, on CPUs with AMX."""
    x = in_layout(torch.randn(shape, device=device).to(dtype), layout)
    weight = torch.randn(16, shape[-3], kernel, kernel, device=device).div(9).to(dtype)
    inputs = [x, weight, torch.randn(16, device=device).to(dtype)]
    function, exact = (partial(f, stride=4, padding=padding, ceil_mode=ceil_mode) for f in (ops.conv2d, exact_conv2d))
    freed = [torch.full((2**n,), torch.nan, dtype=dtype, device=device) for n in range(8, 20, 2)]
    del freed
    assert_matches(function, exact, inputs)


def test_vmap(device):
    loose = dict(rtol=1e-4, atol=1e-4)  # float32 sums of hundreds of products, in another order
    x = torch.randn(3, 2, 3, 20, 23, device=device)
    weight = torch.randn(3, 4, 3, 11, 11, device=device)
    both = torch.stack([ops.conv2d(*pair) for pair in zip(x, weight)])
    torch.testing.assert_close(torch.vmap(ops.conv2d)(x, weight), both, **loose)
    gradient = torch.func.grad(lambda weight, x: ops.conv2d(x, weight).square().sum())
    per_sample = torch.vmap(gradient, (None, 0))(weight[0], x)
    torch.testing.assert_close(per_sample, torch.stack([gradient(weight[0], one) for one in x]), **loose)


def test_relu_in_the_same_pass(dtype, layout, device):
    x = in_layout(torch.randn(2, 3, 24, 31, device=device).to(dtype), layout)
    weight, bias = torch.randn(40, 3, 11, 11, device=device).div(19).to(dtype), torch.randn(40, device=device).to(dtype)
    y, gradients = forward_and_gradients(partial(ops.conv2d, relu=True), [x, weight, bias], torch.ones(2, 40, 4, 6))
    separate = ops.conv2d(x, weight, bias)
    torch.testing.assert_close(y, separate.relu(), rtol=0, atol=0)
    inputs = [i.double().cpu() for i in (x, weight, bias)]
    mask = (separate > 0).double().cpu()  # a sum near 0 may be on the other side of it in float64
    for got, gradient in zip(gradients, forward_and_gradients(exact_conv2d, inputs, mask)[1]):
        assert_close(got, gradient)


def test_module_is_torchs():
    x = torch.randn(2, 3, 35, 36)
    for options in (dict(padding=2), dict(stride=2), dict(padding=(1, 2)), dict(padding_mode="reflect", padding=1)):
        ours = Conv2d(3, 6, 11, **{"stride": 4, **options})
        stock = torch.nn.Conv2d(3, 6, 11, **{"stride": 4, **options})
        stock.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(x), stock(x))
    assert Conv2d(3, 6, 11, 4, ceil_mode=True)(x).shape == (2, 6, 7, 8)
    with pytest.raises(ValueError, match="ceil_mode"):
        Conv2d(3, 6, 11, 4, padding=(1, 2), ceil_mode=True)


def test_tf32_without_python(kernels):
    """Of a process that has not loaded the Python package: torch's default."""
    library = str(_library._C.path)
    code = f"import torch; torch.ops.load_library({library!r}); print(torch.ops.alexnet_cuda._allows_tf32())"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_tf32_follows_torch(kernels):
    """What the CUDA kernels ask at each call."""
    conv, before = torch.backends.cudnn.conv, torch.backends.cudnn.conv.fp32_precision
    try:
        for precision in ("tf32", "ieee"):
            conv.fp32_precision = precision
            assert torch.ops.alexnet_cuda._allows_tf32() is (precision == "tf32")
    finally:
        conv.fp32_precision = before
    for allowed in (True, False):
        with tf32(allowed):
            assert torch.ops.alexnet_cuda._allows_tf32() is allowed


@pytest.mark.devices("cuda")
def test_tf32_on_a_gpu(device):
    """Allowed, results change and stay close; in compiled code too, where it may be switched off again."""
    x = torch.randn(2, 3, 47, 43, device="cuda", requires_grad=True)
    weight = torch.randn(96, 3, 11, 11, device="cuda", requires_grad=True)
    compiled = torch.compile(ops.conv2d, fullgraph=True)

    def run(function, allow):
        with tf32(allow):
            y = function(x, weight)
            return y, *torch.autograd.grad(y, (x, weight), torch.ones_like(y))

    for allow in (False, True, False):
        for eager, graph in zip(run(ops.conv2d, allow), run(compiled, allow)):
            assert torch.equal(eager, graph)
    for a, b in zip(run(ops.conv2d, True), run(ops.conv2d, False)):
        assert 2**-16 < (a - b).abs().max() / b.abs().max() < 2**-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38, -1e30])
@pytest.mark.parametrize("where", ["pixel", "weight and unread pixel", "gradient"])
def test_special_values(value, where, dtype, device):
    """Nothing but the windows that see a value may feel it, however the products are arranged."""
    x, weight = torch.randn(2, 3, 49, 109, device=device).to(dtype), torch.randn(40, 3, 11, 11, device=device) / 100
    grad, weight = torch.randn(2, 40, 10, 25, device=device).to(dtype), weight.to(dtype)
    if where == "pixel":
        x[1, 2, 20, 60] = x[1, 0, 20, 105] = value  # the last windows end with column 106
    elif where == "gradient":
        grad[1, 7, 9, 13] = value
    else:
        weight[5, 1, 3, 4] = x[1, 2, 48, 60] = value  # the last windows end with row 46
    tolerance = 1e-4 if dtype == torch.float32 else 2**-7  # twice the last bit of a bfloat16
    loose = dict(rtol=tolerance, atol=tolerance, equal_nan=True)
    expected = F.conv2d(x.float(), weight.float(), stride=4).to(dtype)
    torch.testing.assert_close(ops.conv2d(x, weight), expected, **loose)
    got, bias = torch.ops.alexnet_cuda._conv2d_weight_grad(grad, x, 11, 4, 0, 1, True)
    expected = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), stride=4).to(dtype)
    torch.testing.assert_close(got, expected, **loose)
    torch.testing.assert_close(bias, grad.float().sum((0, 2, 3)).to(dtype), **loose)


@pytest.mark.parametrize("scale", [1e-18, 9e14, 1.1e15])
def test_scale(scale, device):
    """Neither the products nor the sums on the way to them overflow or vanish."""
    x, weight = (torch.rand(shape, device=device) * 2 - 1 for shape in ((2, 3, 67, 71), (40, 3, 11, 11)))
    x, weight, grad = x * scale, weight * scale, torch.randn(2, 40, 15, 16, device=device) * scale
    assert_matches(ops.conv2d, exact_conv2d, (x, weight, torch.zeros(40, device=device)), grad=grad)
