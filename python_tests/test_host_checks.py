"""What is said of bad arguments: by the public functions, and by the operators' host code (csrc/host), which exported
programs call without the public functions' checks."""

from functools import partial

import pytest
import torch
from helpers import assert_close, exact_conv2d, forward_and_gradients

from alexnet_cuda import ops, reference

X, W = torch.zeros(2, 3, 20, 23), torch.zeros(8, 3, 11, 11)
GRAD, CONV, FIRST = torch.zeros(2, 8, 3, 4), (4, 0, 1, False, False), (4, 0, False)
LRN, POOL = (5, 2, 1e-4, 0.75, 1.0, 1), (3, 2, 0, False)
OTHERS = [(3, 8, 11, 2, 0, 1, False), (3, 8, 7, 4, 1, 1, True), (4, 6, 3, 1, 2, 2, False), (2, 4, 11, 4, 3, 1, True)]
TAIL, BLOCK = "relu_lrn_max_pool2d", "conv2d_relu_lrn_max_pool2d"
POOLED, CODE = torch.zeros(2, 3, 9, 11), torch.zeros(2, 3, 9, 11, dtype=torch.uint8)


def bad(name, words, *args, error=ValueError, **options):
    return pytest.param(name, args, options, error, words, id=f"{name}: {words}")


@pytest.mark.parametrize(
    ("name", "args", "options", "error", "words"),
    [
        bad("conv2d", "x to be 4-D.*got 2-D", X[0, 0], W),
        bad("conv2d", "weight to be torch.int64.*got torch.float32", X.long(), W),
        bad("conv2d", r"weight.*got shape \(3, 11, 11\)", X, W[0]),
        bad("conv2d", r"weight to be \(filters, 3, .*got shape \(8, 2, 11, 11\)", X, W[:, :2]),
        bad("conv2d", "weight to be torch.float32.*got torch.float64", X, W.double()),
        bad("conv2d", r"bias.*\(8,\), got \(5,\)", X, W, torch.zeros(5)),
        bad("conv2d", "bias.*got torch.float16", X, W, torch.zeros(8).half()),
        bad("conv2d", "stride.*got 0", X, W, stride=0),
        bad("conv2d", "padding.*got -1", X, W, padding=-1),
        bad("conv2d", "groups to divide the 3 channels of x, got 2", X, W, groups=2),
        bad("conv2d", "x to be at least as large as the 11x11 weight.*got 10x23", X[:, :, :10], W),
        bad("local_response_norm", "x.*3-D.*got 2-D", X[0, 0], 5),
        bad("local_response_norm", "x.*4-D.*got 3-D", X[0], 5, across="spatial"),
        bad("local_response_norm", "size.*got 0", X, 0),
        bad("local_response_norm", "size.*got 2.5", X, 2.5, error=TypeError),
        bad("local_response_norm", "groups.*3 channels.*got 2", X, 5, groups=2),
        bad("local_response_norm", "window.*got 'left'", X, 5, window="left"),
        bad("local_response_norm", "across.*got 'rows'", X, 5, across="rows"),
        bad("local_response_norm", "x.*floating.*got torch.int64", X.long(), 5, window="onnx", error=TypeError),
        bad("local_response_norm", "x.*Tensor.*got list", [1.0], 5, error=TypeError),
        bad("max_pool2d", "x to be 4-D.*got 2-D", X[0, 0]),
        bad("max_pool2d", r"x to have channels.*got shape \(2, 0, 20, 23\)", X[:, :0]),
        bad("max_pool2d", "x to be at least as large as kernel_size 3.*got 2x23", X[:, :, :2]),
        bad("max_pool2d", "kernel_size.*got 0", X, 0),
        bad("max_pool2d", r"kernel_size.*got \(3, 3, 3\)", X, (3, 3, 3)),
        bad("max_pool2d", "stride.*got 0", X, 3, 0),
        bad("max_pool2d", "stride.*got '2'", X, 3, "2", error=TypeError),
        bad("max_pool2d", "padding.*got -1", X, 3, 2, -1),
        bad("max_pool2d", "padding to be at most half of kernel_size 3, got 2", X, 3, 2, 2),
        bad(TAIL, "x to be 4-D.*got 2-D", X[0, 0], 5),
        bad(TAIL, "order.*got 'pool-relu-lrn'", X, 5, order="pool-relu-lrn"),
        bad(TAIL, "size.*got -1", X, -1),
        bad(TAIL, "groups.*got 2", X, 5, groups=2),
        bad(TAIL, "padding.*got 2", X, 5, padding=2),
        bad(TAIL, "x to be at least as large as kernel_size 3.*got 2x23", X[:, :, :2], 5),
        bad(BLOCK, "order.*got 'lrn'", X, W, None, 5, order="lrn"),
        bad(BLOCK, "size.*got 0", X, W, None, 0),
        bad(BLOCK, "groups.*got 3", X, W, None, 5, groups=3),
        bad(BLOCK, "padding.*got -1", X, W, None, 5, padding=-1),
        bad(BLOCK, "stride.*got 0", X, W, None, 5, pool_stride=0),
        bad(BLOCK, "x.*as large as kernel_size 3.*got 2x4", X[:, :, :16], W, None, 5),
    ],
)
@pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])
def test_bad_input(name, args, options, error, words, module):
    prefix = "(conv2d|max_pool2d)" if name == BLOCK else f"^{name}"
    with pytest.raises(error, match=f"{prefix}: expected {words}"):
        getattr(module, name)(*args, **options)


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("conv2d", (X[0], W, None, *CONV), "expected x to be 4-D .* got 3-D"),
        ("conv2d", (X, W[0], None, *CONV), "expected weight to be 4-D"),
        ("conv2d", (X.long(), W.long(), None, *CONV), "expected x to be float32"),
        ("conv2d", (X, W.half(), None, *CONV), "expected weight to have the same dtype as x"),
        ("conv2d", (X, W[:, :2], None, *CONV), "weight"),
        ("conv2d", (X, W[..., 1:], None, *CONV), "expected weight to be 4-D with square filters"),
        ("conv2d", (X, W, None, 4, 0, 2, False, False), "8 filters of 3 channels, which 2 groups .* 3 channels"),
        ("conv2d", (X, W, None, 4, 0, 0, False, False), "expected groups to be at least 1"),
        ("conv2d", (X, W, torch.zeros(7), *CONV), "bias does not have the size"),
        ("conv2d", (X, W, torch.zeros(8).half(), *CONV), "expected bias to have the same dtype"),
        ("conv2d", (X, W, None, 0, 0, 1, False, False), r"expected stride to be at least 1 and less than 2\^31, got 0"),
        ("conv2d", (X, W, None, 4, -1, 1, False, False), r"expected padding to be at least 0 and .* 2\^31, got -1"),
        ("conv2d", (X, W, None, 4, 2**31, 1, False, False), r"expected padding .* less than 2\^31, got 2147483648"),
        ("conv2d", (X[:, :, :9], W, None, *CONV), "an input of 9x23 is too small for kernel_size 11"),
        ("_conv2d_weight_grad", (GRAD[0], X, 11, 4, 0, 1, True), "expected grad to be 4-D"),
        ("_conv2d_weight_grad", (GRAD[1:], X, 11, 4, 0, 1, True), "grad"),
        ("_conv2d_weight_grad", (GRAD[:, :, 1:], X, 11, 4, 0, 1, True), "grad"),
        ("_conv2d_weight_grad", (GRAD.half(), X, 11, 4, 0, 1, True), "expected grad to have the same dtype"),
        ("_conv2d_weight_grad", (GRAD, X, -1, 4, 0, 1, True), "expected kernel_size to be at least 1"),
        ("_conv2d_input_grad", (GRAD[:, 1:], W, 20, 23, 4, 0, 1), "weight|grad"),
        ("_conv2d_input_grad", (GRAD, W[..., 1:], 20, 23, 4, 0, 1), "square filters"),
        ("_conv2d_input_grad", (GRAD, W, 20, 40, 4, 0, 1), "grad"),
        ("_conv2d_input_grad", (GRAD, W, 5, 23, 4, 0, 1), "too small"),
        ("local_response_norm", (X[0], *LRN, False), "expected x to be 4-D"),
        ("local_response_norm", (X, 0, *LRN[1:], False), r"expected size to be at least 1 and less than 2\^31, got 0"),
        ("local_response_norm", (X, 2**32, *LRN[1:], False), "expected size .* got 4294967296"),
        ("local_response_norm", (X, 5, 5, *LRN[2:], False), r"expected front to be in \[0, size\), got 5"),
        ("local_response_norm", (X, *LRN[:-1], 2, False), "expected groups to divide the 3 channels of x, got 2"),
        ("_local_response_norm_backward", (X[1:], X, *LRN, False), "grad does not have the size"),
        ("_local_response_norm_backward", (X.half(), X, *LRN, False), "expected grad to have the same dtype"),
        ("max_pool2d", (X[0], *POOL, True), "expected x to be 4-D"),
        ("max_pool2d", (X, 16, *POOL[1:], True), r"expected kernel_size to be in \[1, 15\], got 16"),
        ("max_pool2d", (X, 3, 0, 0, False, True), r"expected stride to be at least 1 and less than 2\^31, got 0"),
        ("max_pool2d", (X, 3, 2**32, 0, False, True), "expected stride .* got 4294967296"),
        ("max_pool2d", (X, 3, 2, 2, False, True), "expected padding to be between 0 and half of kernel_size, got 2"),
        ("max_pool2d", (X[..., :2], *POOL, True), "an input of 20x2 is too small"),
        ("_max_pool2d_backward", (POOLED[1:], CODE, 20, 23, 3, 2, 0), "does not have the size"),
        ("_max_pool2d_backward", (POOLED, CODE.int(), 20, 23, 3, 2, 0), "expected code to be uint8"),
        ("_max_pool2d_backward", (POOLED, CODE, 20, 40, 3, 2, 0), "code has 9x11 windows, which pooling 20x40"),
        (TAIL, (X, 3, *LRN, *POOL, True), "expected order to be 0, 1 or 2, got 3"),
        (TAIL, (X[:0], -1, *LRN, *POOL, True), "expected order to be 0, 1 or 2, got -1"),
        (f"_{TAIL}_backward", (POOLED, X, CODE[:, 1:], 0, *LRN, 3, 2, 0), "code does not have the size"),
        (f"_{TAIL}_backward", (POOLED[1:], X, CODE, 0, *LRN, 3, 2, 0), "grad does not have the size"),
        (f"_{TAIL}_backward", (POOLED, X, CODE, 3, *LRN, 3, 2, 0), "expected order"),
        (BLOCK, (X, W, None, *FIRST, 3, *LRN, *POOL, True), "expected order"),
        (BLOCK, (X, W[0], None, *FIRST, 0, *LRN, *POOL, True), "expected weight to be 4-D"),
        (BLOCK, (X, W, None, *FIRST, 0, *LRN[:-1], 3, *POOL, True), "expected groups to divide"),
        (BLOCK, (X, W, None, *FIRST, 0, *LRN, 5, 2, 0, False, True), "too small"),
    ],
)
def test_bad_arguments(name, args, words, device, kernels):
    args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    with pytest.raises(RuntimeError, match=f"{name}: .*{words}|^conv2d: .*{words}|^relu_lrn_max_pool2d: .*{words}"):
        getattr(torch.ops.alexnet_cuda, name)(*args)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_torch_computes_what_no_kernel_does(case, format, device, kernels):
    """Inside the operators; the public function does not call them for such a convolution."""
    channels, filters, size, stride, padding, groups, ceil_mode = case
    op, sizes = torch.ops.alexnet_cuda, (stride, padding, groups)
    x = torch.randn(2, channels, 20, 23, device=device).to(memory_format=format)
    weight, bias = torch.randn(filters, channels // groups, size, size, device=device), torch.randn(filters).to(device)
    y, rectified = (op.conv2d(x, weight, bias, *sizes, ceil_mode, relu) for relu in (False, True))
    grad = torch.randn_like(y)
    grad_x = op._conv2d_input_grad(grad, weight, 20, 23, *sizes)
    parameters = op._conv2d_weight_grad(grad, x, size, *sizes, True)
    exact = partial(exact_conv2d, stride=stride, padding=padding, ceil_mode=ceil_mode, groups=groups)
    want, gradients = forward_and_gradients(exact, [t.double().cpu() for t in (x, weight, bias)], grad)
    for result, expected in zip((y, rectified, grad_x, *parameters), (want, want.relu(), *gradients), strict=True):
        assert_close(result, expected.detach())
    assert all(t.is_contiguous(memory_format=format) for t in (y, rectified, grad_x))
    assert op._conv2d_weight_grad(grad, x, size, *sizes, False)[1].numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_of_no_filters_and_of_an_image_smaller_than_a_window(dtype, device, kernels):
    op = torch.ops.alexnet_cuda
    grad, weight = GRAD[:, :0].to(device, dtype), W[:0].to(device, dtype)
    assert op._conv2d_input_grad(grad, weight, 20, 23, 4, 0, 1).eq(0).all()
    x, weight = torch.randn(1, 3, 10, 10).to(device, dtype), torch.randn(8, 3, 11, 11).to(device, dtype)
    y = op.conv2d(x, weight, None, 4, 0, 1, True, False)
    assert y.shape == (1, 8, 1, 1)
    gradients = op._conv2d_weight_grad(torch.ones_like(y), x, 11, 4, 0, 1, False)[0]
    assert_close(gradients[0, :, :10, :10], x[0].double())
    assert op._conv2d_input_grad(torch.ones_like(y), weight, 10, 10, 4, 0, 1).shape == x.shape


MILLION = 2**20
WIDE, MANY = torch.zeros(0, 1, 1, 2**30), W[:1, :1].expand(MILLION, 1, 11, 11)  # without images nothing takes memory
ROW, PARTS = torch.zeros(0, 1, 11, 4099), torch.zeros(0, 1, 2, 2**30 + 1)
LARGE, IMAGES = torch.zeros(0, MILLION, 46, 46), torch.zeros(0, 1, 191, 191)


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("max_pool2d", (WIDE, 2, 1, 1, False, False), "one image of the output .* got 2147483650"),
        (TAIL, (WIDE, 0, *LRN, 2, 1, 1, False, False), "one image of the output .* got 2147483650"),
        (BLOCK, (ROW, MANY, None, *FIRST, 0, *LRN, 2, 1, 1, False, False), "one image of the output .* got 2147483648"),
        ("_max_pool2d_backward", (PARTS, PARTS.byte(), 1, 2**30, 2, 1, 1), "one image of code .* got 2147483650"),
        (f"_{TAIL}_backward", (PARTS, WIDE, PARTS.byte(), 0, *LRN, 2, 1, 1), "one image of code .* got 2147483650"),
        ("_conv2d_weight_grad", (LARGE, IMAGES, 11, 4, 0, 1, True), "one image of grad .* got 2218786816"),
        ("_conv2d_input_grad", (LARGE, MANY, 191, 191, 4, 0, 1), "one image of grad .* got 2218786816"),
    ],
)
@pytest.mark.devices("emulated", "cuda")
def test_what_is_too_large_for_cuda_kernels(name, args, words, device, kernels):
    args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    with pytest.raises(RuntimeError, match=f"{name.removeprefix('conv2d_')}: expected {words}"):
        getattr(torch.ops.alexnet_cuda, name)(*args)
