"""What the operator tests share: inputs in a layout, exact results in float64, comparison, the emulated operators."""

import importlib
from contextlib import contextmanager

import torch
import torch.nn.functional as F

try:
    _emulated = importlib.import_module("alexnet_cuda._emulated")
except ModuleNotFoundError:
    _emulated = None

HAS_GPU = torch.cuda.is_available()

# Relative error allowed against float64: a few roundings of the result's dtype, since sums are in float32.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

OPERATORS = (
    "conv2d", "_conv2d_weight_grad", "_conv2d_input_grad", "local_response_norm", "_local_response_norm_backward",
    "max_pool2d", "_max_pool2d_backward", "relu_lrn_max_pool2d", "_relu_lrn_max_pool2d_backward",
    "conv2d_relu_lrn_max_pool2d",
)  # fmt: skip


# Each kernel runs once in each of them, besides the random order of threads in which all tests run.
SETTINGS = [dict(order="ascending"), dict(order="descending"), dict(offset=1), dict(offset=2)]


@contextmanager
def emulator(order="random", offset=0, multiprocessors=132, compute_capability=90, shared_memory=227):
    """The order in which CUDA threads run, the elements by which inputs miss an aligned address, and the device."""
    _emulated.set_order(order, 7)
    _emulated.set_offset(offset)
    _emulated.set_multiprocessors(multiprocessors)
    _emulated.set_compute_capability(compute_capability)
    _emulated.set_shared_memory(shared_memory)
    try:
        yield
    finally:
        _emulated.set_offset(0)


@contextmanager
def emulated_operators():
    """CPU tensors are served by the CUDA back end on the emulator."""
    library = torch.library.Library("alexnet_cuda", "IMPL")
    try:
        for name in OPERATORS:
            operator = getattr(torch.ops.alexnet_cuda_emulated, name).default
            library.impl(name, operator, "CPU", allow_override=True)
        yield
    finally:
        library._destroy()


@contextmanager
def tf32(allowed=True):
    """CUDA's convolutions may round float32 to TF32."""
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = False


# ---- inputs --------------------------------------------------------------------------------------------------------


def in_layout(x, layout):
    """The same values with other strides."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":  # every second column of a wider tensor, with an offset
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "offset":  # channels_last, but it starts one element behind an aligned address
        return x.new_empty(x.numel() + 1)[1:].view(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2).copy_(x)
    if layout == "permuted":
        return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    return x


def distinct(*shape, generator=None):
    """Float64 in [-4, 4], no two elements the same, so that rounding decides no maximum."""
    values = torch.randperm(torch.Size(shape).numel(), generator=generator).view(shape).double()
    return values / max(1, values.numel() - 1) * 8 - 4


def round_to_tf32(x):
    """10 bits of mantissa, ties away from zero."""
    bits = x.float().view(torch.int32)
    return torch.where(x.isfinite(), ((bits + 0x1000) & -0x2000).view(torch.float32), x.float()).to(x.dtype)


def memory_format(x):
    if x.is_contiguous():
        return torch.contiguous_format
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else None


# ---- exact results, in float64 on the CPU --------------------------------------------------------------------------


def exact_lrn(x, size, alpha=1e-4, beta=0.75, k=1.0, *, groups=1, divide_alpha=True, window="torch",
              across="channels"):  # fmt: skip
    """The formula of local_response_norm, over every window."""
    x = x.double().cpu()
    front = size // 2 if window == "torch" else (size - 1) // 2
    back = size - 1 - front
    if across == "channels":
        grouped = F.pad(x.square().unflatten(1, (groups, -1)), (0, 0, 0, 0, front, back))
        sums = grouped.unfold(2, size, 1).sum(-1).flatten(1, 2)
    else:
        padded = F.pad(x.square(), (front, back, front, back))
        sums = padded.unfold(2, size, 1).unfold(3, size, 1).sum((-1, -2))
    elements = size if across == "channels" else size * size
    return x / (k + alpha / (elements if divide_alpha else 1) * sums) ** beta


def exact_tail(x, size, alpha=1e-4, beta=0.75, k=1.0, *, order="relu-lrn-pool", kernel_size=3, stride=2, padding=0,
               ceil_mode=False, **lrn):  # fmt: skip
    """The steps of relu_lrn_max_pool2d, one after the other."""
    x = x.double().cpu()
    for step in order.split("-"):
        if step == "relu":
            x = F.relu(x)
        elif step == "lrn":
            x = exact_lrn(x, size, alpha, beta, k, **lrn)
        else:
            x = F.max_pool2d(x, kernel_size, stride, padding, 1, ceil_mode)
    return x


def exact_conv2d(x, weight, bias=None, stride=4, padding=0, ceil_mode=False, groups=1):
    """With ceil_mode the last window reads zeros: pad generously, convolve, keep the outputs that there should be."""
    sizes = [(x.shape[d] + 2 * padding - weight.shape[d]) / stride + 1 for d in (-2, -1)]
    height, width = (-int(-s // 1) if ceil_mode else int(s) for s in sizes)
    x, weight = x.double().cpu(), weight.double().cpu()
    y = F.conv2d(F.pad(x, (padding, padding + stride, padding, padding + stride)), weight, None, stride, groups=groups)
    y = y[..., :height, :width]
    return y if bias is None else y + bias.double().cpu()[:, None, None]


def exact_block(x, weight, bias, size, alpha=1e-4, beta=0.75, k=1.0, *, padding=0, ceil_mode=False, order, **tail):
    tail = {name.removeprefix("pool_"): value for name, value in tail.items()}
    return exact_tail(exact_conv2d(x, weight, bias, 4, padding, ceil_mode), size, alpha, beta, k, order=order, **tail)


# ---- results -------------------------------------------------------------------------------------------------------


def assert_close(actual, exact):
    """`actual` is `exact` (float64, of the same but exactly represented inputs) up to the rounding of its dtype;
    they are compared where `exact` is."""
    tolerance = TOLERANCE[actual.dtype]
    scale = exact.abs().nan_to_num(0, 0, 0).max().item() if exact.numel() else 0
    torch.testing.assert_close(
        actual.double().to(exact.device), exact, rtol=tolerance, atol=tolerance * scale, equal_nan=True
    )


def assert_same_bits(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def forward_and_gradients(function, inputs, grad=None):
    """(output, gradients of the inputs) with leaves that keep the inputs' strides. No `grad`: that is the output."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    return y, torch.autograd.grad(y, leaves, y.detach() if grad is None else grad.to(y))


def assert_all_close(found, expected, rtol, atol):
    """atol relative to the largest expected value of each tensor."""
    for ours, exact in zip(found, expected, strict=True):
        scale = exact.abs().max().item() if exact.numel() else 0
        torch.testing.assert_close(ours, exact, rtol=rtol, atol=atol * scale)


def assert_matches(function, exact, inputs, gradients=True, also=(), grad=None):
    """Output and gradients of `function` against those of `exact` in float64, and the outputs of the functions `also`,
    of which nothing is differentiated; `grad`: none: random. Returns the output and the gradients."""
    leaves = [x.detach().double().cpu().requires_grad_() for x in inputs]
    want = exact(*leaves)
    grad = (torch.randn(want.shape).to(inputs[0].dtype) if grad is None else grad).double().cpu()
    y, found = forward_and_gradients(function, inputs, grad)
    assert y.dtype == inputs[0].dtype
    for result in (y, *(other(*inputs) for other in also)):
        assert_close(result, want)
    if gradients:
        for got, wanted in zip(found, torch.autograd.grad(want, leaves, grad)):
            assert_close(got, wanted)
    return y, found


def assert_derivatives(function, shapes, fast=(False, False)):
    """First and second derivatives of `function` in float64; `fast`: of each, in one random direction only."""
    first, *others = shapes
    inputs = [(distinct(*first) * 1.3 + 0.01).requires_grad_()]  # not 0, where ReLU has no derivative
    inputs += [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in others]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=fast[0], check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=fast[1])


def assert_same_derivatives(ours, stock, inputs):
    """First derivatives by each set of inputs, also of a sum, whose gradient has no memory of its own, and second."""
    for needs in [(True, True, True), (False, True, False), (True, False, False), (False, False, True)]:
        leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs)]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        for loss in (torch.sum, lambda y: y.square().sum()):
            gradients = [torch.autograd.grad(loss(f(*leaves)), wanted) for f in (ours, stock)]
            assert_all_close(*gradients, rtol=1e-3, atol=1e-5)
    leaves, seconds = [x.detach().requires_grad_() for x in inputs], []
    for function in (ours, stock):
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    assert_all_close(*seconds, rtol=1e-3, atol=1e-5)
