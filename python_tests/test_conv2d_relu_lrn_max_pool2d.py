import pytest
import torch
from helpers import assert_close, exact_block, forward_and_gradients, in_layout, memory_format, saved_bytes

from alexnet_cuda import ops, reference
from alexnet_cuda._library import has_kernel
from alexnet_cuda.reference import ORDERS

# (N, C, H, W), filters, options
CASES = [
    ((2, 3, 47, 51), 96, dict(size=5, k=2.0)),
    ((1, 3, 48, 45), 64, dict(size=5, k=2.0, ceil_mode=True, groups=2)),
    ((3, 1, 40, 39), 20, dict(size=4, alpha=0.1, padding=2, pool_ceil_mode=True, window="onnx")),
    ((1, 4, 37, 60), 9, dict(size=3, alpha=0.1, beta=0.5, pool_padding=1)),
    ((1, 3, 37, 40), 6, dict(size=3, alpha=0.1, across="spatial")),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("shape", "filters", "options"), CASES, ids=str)
def test_matches_float64(shape, filters, options, order, dtype, layout, device):
    x = in_layout(torch.randn(shape, device=device).to(dtype), layout)
    weight, bias = torch.randn(filters, shape[1], 11, 11, device=device) / 19, torch.randn(filters, device=device)
    inputs = [x, weight.to(dtype), bias.to(dtype)]
    want = exact_block(*inputs, **options, order=order)
    function = lambda *i: ops.conv2d_relu_lrn_max_pool2d(*i, **options, order=order)
    with torch.no_grad():
        assert_close(function(*inputs), want)
    grad = torch.randn(want.shape).to(dtype).double()
    y, gradients = forward_and_gradients(function, inputs, grad)
    assert y.dtype == dtype
    assert_close(y, want)
    assert_close(reference.conv2d_relu_lrn_max_pool2d(*inputs, **options, order=order), want)
    if dtype == torch.float64:  # elsewhere rounding may choose another maximum of a window
        _, want_gradients = forward_and_gradients(
            lambda *i: exact_block(*i, **options, order=order), [i.double().cpu() for i in inputs], grad
        )
        for got, gradient in zip(gradients, want_gradients):
            assert_close(got, gradient)
    else:  # the same as the two ops one after the other
        names = ("padding", "ceil_mode")
        conv = {name: options[name] for name in names if name in options}
        tail = {name.removeprefix("pool_"): v for name, v in options.items() if name not in names}
        _, parts = forward_and_gradients(
            lambda *i: ops.relu_lrn_max_pool2d(ops.conv2d(*i, **conv), **tail, order=order), inputs, grad
        )
        for got, gradient in zip(gradients, parts):
            assert_close(got, gradient.double())
    if layout in ("contiguous", "channels_last") and shape[1] > 1 and has_kernel(x) and "across" not in options:
        assert memory_format(y) == memory_format(x)


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("order", ORDERS)
def test_gradients(order, device):
    x = torch.randn(2, 1, 19, 20, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 1, 11, 11, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    function = lambda *i: ops.conv2d_relu_lrn_max_pool2d(*i, 3, 0.1, order=order)
    assert torch.autograd.gradcheck(function, (x, weight, bias), fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x, weight, bias), fast_mode=True)


@pytest.mark.devices("cpu", "cuda")
def test_opcheck(device, kernels):
    for format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 27, 31, device=device).contiguous(memory_format=format).requires_grad_()
        weight = torch.randn(6, 3, 11, 11, device=device, requires_grad=True)
        bias = torch.randn(6, device=device, requires_grad=True)
        constants = (4, 0, True, 0, 5, 2, 1e-2, 0.75, 2.0, 1, 3, 2, 0, False)
        op = torch.ops.alexnet_cuda.conv2d_relu_lrn_max_pool2d.default
        torch.library.opcheck(op, (x, weight, bias, *constants, True))
        torch.library.opcheck(op, (x.detach(), weight.detach(), None, *constants, False))


@pytest.mark.devices("cpu", "cuda")
def test_saved_bytes(device, kernels):
    x = torch.randn(2, 3, 67, 67, device=device)
    weight = torch.randn(96, 3, 11, 11, device=device, requires_grad=True)
    function = lambda x, weight: ops.conv2d_relu_lrn_max_pool2d(x, weight, None, 5)
    convolution, code = 2 * 96 * 15 * 15 * 4, 2 * 96 * 7 * 7
    assert saved_bytes(function, x, weight) == x.nbytes + weight.nbytes + convolution + code
    with torch.no_grad():
        assert saved_bytes(function, x, weight) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(order="lrn"), "order.*got 'lrn'"),
        (dict(size=0), "size.*got 0"),
        (dict(groups=4), "groups.*got 4"),
        (dict(padding=-1), "padding.*got -1"),
        (dict(pool_stride=0), "stride.*got 0"),
        (dict(x=torch.zeros(1, 3, 15, 60)), "x to be at least as large as kernel_size 3.*got 2x13"),
    ],
)
def test_bad_input(changes, words):
    args = {"x": torch.zeros(1, 3, 35, 35), "weight": torch.zeros(6, 3, 11, 11), "bias": None, "size": 5, **changes}
    with pytest.raises(ValueError, match=f"max_pool2d: expected {words}"):
        ops.conv2d_relu_lrn_max_pool2d(**args)


@pytest.mark.devices("cuda")
@pytest.mark.parametrize("n", [1, 3, 300])
@pytest.mark.parametrize(("size", "filters", "options"), [(227, 96, {}), (224, 96, dict(padding=2)), (99, 64, {})])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_cuda_kernels_agree(size, filters, options, n, dtype, layout, device, monkeypatch):
    """wgmma's kernel and mma.sync's: the same but for the order of sums."""
    wgmma = torch.cuda.get_device_capability()[0] == 9
    x = in_layout(torch.randn(n, 3, size, size, device="cuda").to(dtype), layout)
    weight, bias = torch.randn(filters, 3, 11, 11, device="cuda") / 19, torch.randn(filters, device="cuda")
    inputs, results = [x, weight.to(dtype).requires_grad_(), bias.to(dtype)], []
    for variable in ("0", "1"):
        monkeypatch.setenv("ALEXNET_CUDA_WGMMA", variable)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            y = ops.conv2d_relu_lrn_max_pool2d(*inputs, 5, 0.1, k=2.0, **options)
            torch.cuda.synchronize()
        assert ("block_wgmma_kernel" in str([e.name for e in profile.events()])) == (variable == "1" and wgmma)
        results.append((y, *y.grad_fn.saved_tensors[2:]))
    (expected, a_expected, code_expected), (y, a, code) = results
    assert_close(y, expected.double())
    assert_close(a, a_expected.double())
    assert (code != code_expected).double().mean() < 0.01
