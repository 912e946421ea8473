import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, forward_and_gradients, in_layout, memory_format, saved_bytes

from alexnet_cuda import ops, reference
from alexnet_cuda._library import has_kernel
from alexnet_cuda.nn import Conv2d


def exact(x, weight, bias=None, stride=4, padding=0, ceil_mode=False):
    """Rounded up, the last window reads zeros: pad generously, convolve, keep the outputs that there should be."""
    sizes = [(x.shape[d] + 2 * padding - weight.shape[d]) / stride + 1 for d in (-2, -1)]
    height, width = (-int(-s // 1) if ceil_mode else int(s) for s in sizes)
    x, weight = x.double().cpu(), weight.double().cpu()
    y = F.conv2d(F.pad(x, (padding, padding + stride, padding, padding + stride)), weight, None, stride)
    y = y[..., :height, :width]
    return y if bias is None else y + bias.double().cpu()[:, None, None]


# (N, C, H, W), filters, padding, ceil_mode
CASES = [
    ((2, 3, 35, 47), 96, 0, False),
    ((1, 3, 32, 33), 64, 2, False),
    ((2, 3, 24, 21), 64, 0, True),
    ((1, 1, 28, 29), 96, 0, False),
    ((3, 4, 23, 30), 7, 3, True),
    ((1, 3, 11, 11), 1, 0, False),
    ((2, 3, 12, 14), 50, 1, True),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("shape", "filters", "padding", "ceil_mode"), CASES, ids=str)
def test_matches_float64(shape, filters, padding, ceil_mode, bias, dtype, layout, device):
    x = in_layout(torch.randn(shape, device=device).to(dtype), layout)
    weight = torch.randn(filters, shape[1], 11, 11, device=device).div(19).to(dtype)
    inputs = [x, weight] + [torch.randn(filters, device=device).to(dtype)] * bias
    options = dict(padding=padding, ceil_mode=ceil_mode)
    want = exact(*inputs, **options)
    grad = torch.randn(want.shape).to(dtype).double()
    y, gradients = forward_and_gradients(lambda *i: ops.conv2d(*i, **options), inputs, grad)
    want, want_gradients = forward_and_gradients(
        lambda *i: exact(*i, **options), [i.double().cpu() for i in inputs], grad
    )
    assert y.dtype == dtype
    assert_close(y, want)
    for got, gradient in zip(gradients, want_gradients):
        assert_close(got, gradient)
    assert_close(reference.conv2d(*inputs, **options), want)
    if layout in ("contiguous", "channels_last") and shape[1] > 1 and filters > 1 and has_kernel(x):
        assert memory_format(y) == memory_format(x)


@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize(("size", "padding", "ceil_mode"), [(227, 0, False), (224, 2, False), (224, 0, True)])
def test_alexnets_sizes(size, padding, ceil_mode, device):
    x, weight = torch.randn(2, 3, size, size, device=device), torch.randn(96, 3, 11, 11, device=device) / 19
    y = ops.conv2d(x, weight, padding=padding, ceil_mode=ceil_mode)
    assert y.shape == (2, 96, 55, 55)
    assert_close(y, exact(x, weight, padding=padding, ceil_mode=ceil_mode))


def test_unbatched_and_empty(device):
    weight = torch.randn(8, 3, 11, 11, device=device, requires_grad=True)
    x = torch.randn(3, 30, 31, device=device)
    torch.testing.assert_close(ops.conv2d(x, weight), F.conv2d(x, weight, stride=4), rtol=1e-4, atol=1e-4)
    y = ops.conv2d(torch.zeros(0, 3, 30, 31, device=device), weight)
    assert y.shape == (0, 8, 5, 6)
    y.sum().backward()
    assert (weight.grad == 0).all()


@pytest.mark.parametrize(("channels", "kernel", "stride"), [(3, 5, 1), (3, 11, 2), (2, 11, 4), (48, 5, 1)])
def test_what_goes_to_torch(channels, kernel, stride, device):
    x = torch.randn(1, channels, 20, 20, device=device)
    weight = torch.randn(4, channels, kernel, kernel, device=device)
    assert ops.conv2d(x, weight, stride=stride).equal(F.conv2d(x, weight, stride=stride))


@pytest.mark.devices("cpu")
def test_gradients(device):
    for size, padding, ceil_mode in [((15, 16), 0, False), ((12, 14), 1, True)]:
        x = torch.randn(2, 1, *size, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(2, 1, 11, 11, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
        function = lambda *i, p=padding, c=ceil_mode: ops.conv2d(*i, padding=p, ceil_mode=c)
        assert torch.autograd.gradcheck(function, (x, weight, bias), fast_mode=True, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, (x, weight, bias), fast_mode=True)


def test_opcheck(device, kernels):
    for format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 20, 23, device=device).contiguous(memory_format=format).requires_grad_()
        weight = torch.randn(5, 3, 11, 11, device=device, requires_grad=True)
        bias = torch.randn(5, device=device, requires_grad=True)
        torch.library.opcheck(torch.ops.alexnet_cuda.conv2d.default, (x, weight, bias, 4, 1, 1, True, True))
        y = torch.ops.alexnet_cuda.conv2d(x, weight, None, 4, 1, 1, True, False).detach()
        torch.library.opcheck(torch.ops.alexnet_cuda._conv2d_weight_grad.default, (y, x.detach(), 11, 4, 1, 1, True))
        torch.library.opcheck(torch.ops.alexnet_cuda._conv2d_input_grad.default, (y, weight.detach(), 20, 23, 4, 1, 1))


def test_compile(device):
    x = torch.randn(2, 3, 31, 27, device=device)
    weight = torch.randn(8, 3, 11, 11, device=device, requires_grad=True)
    function = lambda x, weight: ops.conv2d(x, weight).square().sum()
    (got,) = torch.autograd.grad(torch.compile(function, fullgraph=True)(x, weight), weight)
    (want,) = torch.autograd.grad(function(x, weight), weight)
    torch.testing.assert_close(got, want)


def test_vmap(device):
    loose = dict(rtol=1e-4, atol=1e-4)  # float32 sums of hundreds of products, in another order
    x = torch.randn(3, 2, 3, 20, 23, device=device)
    weight = torch.randn(3, 4, 3, 11, 11, device=device)
    both = torch.stack([ops.conv2d(*pair) for pair in zip(x, weight)])
    torch.testing.assert_close(torch.vmap(ops.conv2d)(x, weight), both, **loose)
    torch.testing.assert_close(torch.vmap(ops.conv2d, (0, None))(x, weight[0])[0], both[0], **loose)
    gradient = torch.func.grad(lambda weight, x: ops.conv2d(x, weight).square().sum())
    per_sample = torch.vmap(gradient, (None, 0))(weight[0], x)
    torch.testing.assert_close(per_sample, torch.stack([gradient(weight[0], one) for one in x]), **loose)


def test_autocast(device):
    x, weight = torch.randn(1, 3, 20, 20, device=device), torch.randn(4, 3, 11, 11, device=device)
    with torch.autocast(x.device.type, torch.bfloat16):
        y = ops.conv2d(x, weight, torch.zeros(4, device=device))
    assert y.dtype == torch.bfloat16
    assert_close(y, exact(x.bfloat16(), weight.bfloat16()))


@pytest.mark.devices("cpu", "cuda")
def test_saves_its_inputs(device, kernels):
    x = torch.randn(2, 3, 227, 227, device=device)
    weight = torch.randn(96, 3, 11, 11, device=device, requires_grad=True)
    assert saved_bytes(ops.conv2d, x, weight) == x.nbytes + weight.nbytes


def test_relu_in_the_same_pass(dtype, layout, device):
    x = in_layout(torch.randn(2, 3, 24, 31, device=device).to(dtype), layout)
    weight, bias = torch.randn(40, 3, 11, 11, device=device).div(19).to(dtype), torch.randn(40, device=device).to(dtype)
    y, gradients = forward_and_gradients(
        lambda *i: ops.conv2d(*i, relu=True), [x, weight, bias], torch.ones(2, 40, 4, 6)
    )
    separate = ops.conv2d(x, weight, bias)
    torch.testing.assert_close(y, separate.relu(), rtol=0, atol=0)
    inputs = [i.double().cpu() for i in (x, weight, bias)]
    mask = (separate > 0).double().cpu()  # a sum near 0 may be on the other side of it in float64
    for got, gradient in zip(gradients, forward_and_gradients(exact, inputs, mask)[1]):
        assert_close(got, gradient)


def test_deterministic(device):
    x = torch.randn(5, 3, 67, 67, device=device)
    weight = torch.randn(96, 3, 11, 11, device=device, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [torch.autograd.grad(ops.conv2d(x, weight).square().sum(), weight)[0] for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert runs[0].equal(runs[1])
    assert runs[0].equal(runs[2])


X, W = torch.zeros(1, 3, 20, 20), torch.zeros(4, 3, 11, 11)


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ((X[0, 0], W), ValueError, "x to be 4-D.*got 2-D"),
        ((X.long(), W), TypeError, "x.*floating.*got torch.int64"),
        ((X, W[0]), ValueError, r"weight.*got shape \(3, 11, 11\)"),
        ((X, W[:, :2]), ValueError, r"weight to be \(filters, 3, .*got shape \(4, 2, 11, 11\)"),
        ((X, W.double()), ValueError, "weight to be torch.float32.*got torch.float64"),
        ((X, W, torch.zeros(5)), ValueError, r"bias.*\(4,\), got \(5,\)"),
        ((X, W, torch.zeros(4).half()), ValueError, "bias.*got torch.float16"),
        ((X, W, None, 0), ValueError, "stride.*got 0"),
        ((X, W, None, 4, -1), ValueError, "padding.*got -1"),
        ((X, W, None, 4, 0, False, 2), ValueError, "groups to divide the 3 channels of x, got 2"),
        ((X[:, :, :10], W), ValueError, "x to be at least as large as the 11x11 weight.*got 10x20"),
    ],
)
@pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])
def test_bad_input(args, error, words, module):
    with pytest.raises(error, match=f"conv2d: expected {words}"):
        module.conv2d(*args[:6], **({"groups": args[6]} if len(args) > 6 else {}))


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


def test_tf32_follows_torch(kernels):
    """What the CUDA kernels ask at each call."""
    conv, before = torch.backends.cudnn.conv, torch.backends.cudnn.conv.fp32_precision
    try:
        for precision in ("tf32", "ieee"):
            conv.fp32_precision = precision
            assert torch.ops.alexnet_cuda._allows_tf32() is (precision == "tf32")
        conv.fp32_precision = before
        for allow in (True, False):
            torch.backends.cudnn.allow_tf32 = allow
            assert torch.ops.alexnet_cuda._allows_tf32() is allow
    finally:
        torch.backends.cudnn.allow_tf32 = False
        conv.fp32_precision = before


@pytest.mark.devices("cuda")
def test_tf32_on_a_gpu(device):
    """Allowed, results change and stay close; in compiled code too, where it may be switched off again."""
    x = torch.randn(2, 3, 47, 43, device="cuda", requires_grad=True)
    weight = torch.randn(96, 3, 11, 11, device="cuda", requires_grad=True)
    compiled = torch.compile(ops.conv2d, fullgraph=True)

    def run(function, allow):
        torch.backends.cudnn.allow_tf32 = allow
        try:
            y = function(x, weight)
            return y, *torch.autograd.grad(y, (x, weight), torch.ones_like(y))
        finally:
            torch.backends.cudnn.allow_tf32 = False

    for allow in (False, True, False):
        for eager, graph in zip(run(ops.conv2d, allow), run(compiled, allow)):
            assert torch.equal(eager, graph)
    for a, b in zip(run(ops.conv2d, True), run(ops.conv2d, False)):
        assert 2**-16 < (a - b).abs().max() / b.abs().max() < 2**-9


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38, -1e30])
@pytest.mark.parametrize("where", ["pixel", "unread pixel", "weight", "gradient"])
def test_special_values(value, where, device):
    """Nothing but the windows that see a value may feel it, however the products are arranged."""
    x, weight = torch.randn(2, 3, 49, 109, device=device), torch.randn(40, 3, 11, 11, device=device) / 100
    grad = torch.randn(2, 40, 10, 25, device=device)
    if where == "weight":
        weight[5, 1, 3, 4] = value
    elif where == "gradient":
        grad[1, 7, 9, 13] = value
    else:
        x[1, 2, 20 if where == "pixel" else 48, 60] = value  # the last windows end with row 46
    loose = dict(rtol=1e-4, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(ops.conv2d(x, weight), F.conv2d(x, weight, stride=4), **loose)
    got, bias = torch.ops.alexnet_cuda._conv2d_weight_grad(grad, x, 11, 4, 0, 1, True)
    expected = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), stride=4).float()
    torch.testing.assert_close(got, expected, **loose)
    torch.testing.assert_close(bias, grad.sum((0, 2, 3)), **loose)


@pytest.mark.parametrize("scale", [1e-18, 9e14, 1.1e15])
def test_scale(scale, device):
    """Neither the products nor the sums on the way to them overflow or vanish."""
    x, weight = (torch.rand(shape, device=device) * 2 - 1 for shape in ((2, 3, 67, 71), (40, 3, 11, 11)))
    x, weight, grad = x * scale, weight * scale, torch.randn(2, 40, 15, 16, device=device) * scale
    assert_close(ops.conv2d(x, weight), exact(x, weight))
    expected = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), stride=4)
    got, bias = torch.ops.alexnet_cuda._conv2d_weight_grad(grad, x, 11, 4, 0, 1, True)
    assert_close(got, expected)
    assert_close(bias, grad.double().sum((0, 2, 3)))
