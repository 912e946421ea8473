"""conv2d: three bilinear operators, each the derivative of the other two, so derivatives of any order exist."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .._library import HAS_AMX, KERNEL_DTYPES, has_kernel
from ..reference import Size, output_size
from ._registration import _op, before_relu, call, empty, needs_grad, register, save_first, save_for_relu


def conv2d_fake(x, weight, bias, stride, padding, groups, ceil_mode, relu):
    height, width = (output_size(s, weight.shape[2], stride, padding, ceil_mode, False) for s in x.shape[2:])
    return empty(x, (x.shape[0], weight.shape[0], height, width))


def conv2d_gradients(needs: tuple[bool, ...], grad: Tensor, x: Tensor, weight: Tensor, *geometry: int) -> tuple:
    """The gradients of x, weight and bias, as far as they are needed; geometry: stride, padding, groups."""
    grad_x = grad_weight = grad_bias = None
    if needs[0]:
        grad_x = _op._conv2d_input_grad(grad, weight, *x.shape[2:], *geometry)
    if needs[1]:
        grad_weight, grad_bias = _op._conv2d_weight_grad(grad, x, weight.shape[2], *geometry, needs[2])
    elif needs[2]:
        grad_bias = grad.sum((0, 2, 3))
    return grad_x, grad_weight, grad_bias if needs[2] else None


def _conv2d_backward(ctx, grad):
    stride, padding, groups, _ = ctx.args
    gradients = conv2d_gradients(ctx.needs_input_grad, *before_relu(ctx, grad), stride, padding, groups)
    return (*gradients, *[None] * 5)


def _conv2d_of_size(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: int) -> Tensor:
    """The convolution whose output has grad's size, be it rounded down or up."""
    y = _op.conv2d(x, weight, bias, *geometry, True, False)
    return y[:, :, : grad.shape[2], : grad.shape[3]]


def _weight_grad_fake(grad, x, kernel_size, stride, padding, groups, with_bias):
    weight = x.new_empty((grad.shape[1], x.shape[1] // groups, kernel_size, kernel_size))
    return weight, x.new_empty(grad.shape[1] if with_bias else 0)


def _weight_grad_backward(ctx, grad_weight, grad_bias):
    grad, x = ctx.saved_tensors
    _, *geometry, with_bias = ctx.args
    grad_grad = _conv2d_of_size(grad, x, grad_weight, grad_bias if with_bias else None, *geometry)
    return grad_grad, _op._conv2d_input_grad(grad, grad_weight, *x.shape[2:], *geometry), *[None] * 5


def _input_grad_fake(grad, weight, height, width, stride, padding, groups):
    return empty(grad, (grad.shape[0], weight.shape[1] * groups, height, width))


def _input_grad_backward(ctx, grad_x):
    grad, weight = ctx.saved_tensors
    _, _, *geometry = ctx.args
    grad_weight, _ = _op._conv2d_weight_grad(grad, grad_x, weight.shape[2], *geometry, False)
    return _conv2d_of_size(grad, grad_x, weight, None, *geometry), grad_weight, *[None] * 5


register("conv2d", conv2d_fake, save_for_relu, _conv2d_backward, (0,))
register("_conv2d_weight_grad", _weight_grad_fake, save_first(2), _weight_grad_backward, ())
register("_conv2d_input_grad", _input_grad_fake, save_first(2), _input_grad_backward, (0,))


def _allows_tf32() -> bool:
    """Whether torch may round float32 convolutions to TF32: CUDA kernels ask at every call, also of compiled graphs."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


if KERNEL_DTYPES:
    torch.library.impl("alexnet_cuda::_allows_tf32", "default", _allows_tf32)


def autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments in the autocast dtype, as torch casts those of its convolutions."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)


def is_first_layer(weight_shape: Any, stride: int, groups: int) -> bool:
    """11x11 filters, stride 4, 1, 3 or 4 channels: AlexNet's first layer, for which every device has a kernel."""
    return tuple(weight_shape[2:]) == (11, 11) and stride == 4 and groups == 1 and weight_shape[1] in (1, 3, 4)


def _is_winograd_layer(weight_shape: Any, stride: int, padding: int, groups: int) -> bool:
    """3x3 or 5x5 filters, stride 1, groups of a multiple of 16 channels: for float32 on a CPU there is a kernel."""
    filters, channels, height, width = weight_shape
    whole = filters % (16 * groups) == 0 and channels % 16 == 0
    return height == width and height in (3, 5) and stride == 1 and 0 <= padding < height and whole


def has_uniform_geometry(conv: torch.nn.Conv2d) -> bool:
    """Whether `conv2d` takes such a convolution: one stride, one padding with zeros, no dilation."""
    simple = conv.dilation == (1, 1) and conv.padding_mode == "zeros" and isinstance(conv.padding, tuple)
    return simple and conv.stride[0] == conv.stride[1] and conv.padding[0] == conv.padding[1]


def is_supported(conv: torch.nn.Conv2d) -> bool:
    """Whether a kernel computes such a convolution on some device."""
    shape, stride, groups = conv.weight.shape, conv.stride[0], conv.groups
    return has_uniform_geometry(conv) and (
        is_first_layer(shape, stride, groups) or _is_winograd_layer(shape, stride, int(conv.padding[0]), groups)
    )


def _is_served(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> bool:
    if weight.dim() != 4 or 0 in x.shape[-2:] or not has_kernel(x):
        return False
    if is_first_layer(weight.shape, stride, groups):
        return True
    if not x.is_cpu or groups <= 0 or not _is_winograd_layer(weight.shape, stride, padding, groups):
        return False
    is_bfloat16 = x.dtype == torch.bfloat16 and weight.shape[2] == 3 and HAS_AMX and needs_grad(weight)
    return x.dtype == torch.float32 or is_bfloat16


def _has_one_window(x: Tensor, weight: Tensor, stride: Any, padding: Any, groups: int, ceil_mode: bool) -> bool:
    """Whether the output is one pixel: a matrix product. As a convolution of torch's it takes 3 to 9 times as long on a
    CPU, and with AMX in bfloat16 oneDNN reads uninitialised memory for its weight gradient. An export keeps it."""
    if weight.dim() != 4 or padding == "same" or groups != 1 or not x.is_floating_point():
        return False
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False
    sizes = zip(x.shape[-2:], weight.shape[-2:], stride, padding)
    return all(output_size(s, k, step, pad, ceil_mode, False) == 1 for s, k, step, pad in sizes)


def _one_window(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Any, relu: bool) -> Tensor:
    """The convolution with one output pixel: pixels and weights that lie on each other, multiplied."""
    top, left = padding
    pixels = x[..., : weight.shape[2] - top, : weight.shape[3] - left]
    weights = weight[:, :, top : top + x.shape[-2], left : left + x.shape[-1]]
    y = F.linear(pixels.flatten(-3), weights.flatten(1), bias)[..., None, None]
    return y.relu() if relu else y


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 4, padding: Size | str = 0,
    ceil_mode: bool = False, *, groups: int = 1, relu: bool = False,
) -> Tensor:  # fmt: skip
    """2-D convolution, optionally followed by ReLU.

    Equivalent to `torch.nn.functional.conv2d(x, weight, bias, stride, padding, groups=groups)`. Kernels of ours compute
    AlexNet's first layer (11x11 filters, stride 4, 1, 3 or 4 input channels) and, in float32 on a CPU, 3x3 and 5x5
    convolutions with stride 1 between multiples of 16 channels where that takes less time (Winograd's algorithm); of
    the 3x3 ones in bfloat16 also the weight gradient, on CPUs with AMX. An output of one pixel is a matrix product. All
    else, and results beyond that algorithm's range, torch computes.

    With `ceil_mode` the output size is rounded up and the last window reads zeros beyond the right and bottom edge, as
    in cuda-convnet (the 2012 code): equivalent to padding x there first. On CUDA, float32 is rounded to TF32, forward
    and backward, wherever torch does so for its own convolutions: `torch.backends.cudnn.conv.fp32_precision`.

    Args:
        x: (N, C, H, W) or (C, H, W); the output keeps its memory format. Under autocast, cast as torch's conv2d does.
        weight: (K, C / groups, kernel height, kernel width). bias: (K,) or None.
        stride, padding: one integer or (height, width); a padding of "same" or "valid" as in torch.
        relu: return max(0, result). Saved for backward are then x, weight and the result.

    Raises:
        errors.ArgumentError (a ValueError and RuntimeError): shapes, dtypes or devices do not fit together, or stride,
            padding or groups is out of range. TypeError: x is not a tensor, or stride or padding not of integers.
    """
    x, weight, bias = autocast(x, weight, bias)
    step, pad = reference.conv_geometry("conv2d", stride, padding)
    uniform = step[0] == step[1] and not isinstance(pad, str) and pad[0] == pad[1]
    served = uniform and _is_served(x, weight, step[0], int(pad[0]), groups)
    if not served and not _has_one_window(x, weight, step, pad, groups, ceil_mode):
        return reference.conv2d(x, weight, bias, step, pad, ceil_mode, groups=groups, relu=relu)
    reference.check_conv2d("conv2d", x, weight, bias, pad, groups)
    if not served:
        return _one_window(x, weight, bias, pad, relu)
    if x.dim() == 3:
        return conv2d(x[None], weight, bias, step, pad, ceil_mode, groups=groups, relu=relu)[0]
    args = x, weight, bias, step[0], int(pad[0]), groups, ceil_mode, relu
    return call(_op.conv2d, needs_grad(x, weight, bias), *args)
