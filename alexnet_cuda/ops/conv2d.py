"""conv2d: three bilinear operators, each the derivative of the other two, so derivatives of any order exist."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._library import KERNEL_DTYPES, has_kernel
from ._registration import call, empty, needs_grad, output_size, register

_op = torch.ops.alexnet_cuda


def conv2d_fake(x, weight, bias, stride, padding, groups, ceil_mode, relu):
    height, width = (output_size(s, weight.shape[2], stride, padding, ceil_mode, False) for s in x.shape[2:])
    return empty(x, (x.shape[0], weight.shape[0], height, width))


def _conv2d_setup(ctx, inputs, output):
    x, weight, _, ctx.stride, ctx.padding, ctx.groups, _, ctx.relu = inputs
    ctx.save_for_backward(x, weight, *([output] if ctx.relu else []))


def conv2d_gradients(
    needs: tuple[bool, ...], grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, groups: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias, as far as they are needed."""
    grad_x = grad_weight = grad_bias = None
    if needs[0]:
        grad_x = _op._conv2d_input_grad(grad, weight, x.shape[2], x.shape[3], stride, padding, groups)
    if needs[1]:
        sizes = weight.shape[2], stride, padding, groups
        grad_weight, grad_bias = _op._conv2d_weight_grad(grad, x, *sizes, needs[2])
    elif needs[2]:
        grad_bias = grad.sum((0, 2, 3))
    return grad_x, grad_weight, grad_bias if needs[2] else None


def _conv2d_backward(ctx, grad):
    x, weight, *output = ctx.saved_tensors
    if output:
        grad = torch.ops.aten.threshold_backward(grad, output[0], 0)
    gradients = conv2d_gradients(ctx.needs_input_grad, grad, x, weight, ctx.stride, ctx.padding, ctx.groups)
    return (*gradients, *[None] * 5)


def _conv2d_of_size(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, groups: int
) -> Tensor:
    """The convolution whose output has grad's size, be it rounded down or up."""
    y = _op.conv2d(x, weight, bias, stride, padding, groups, True, False)
    return y[:, :, : grad.shape[2], : grad.shape[3]]


def _weight_grad_fake(grad, x, kernel_size, stride, padding, groups, with_bias):
    weight = x.new_empty((grad.shape[1], x.shape[1] // groups, kernel_size, kernel_size))
    return weight, x.new_empty(grad.shape[1] if with_bias else 0)


def _weight_grad_setup(ctx, inputs, output):
    grad, x, _, ctx.stride, ctx.padding, ctx.groups, ctx.with_bias = inputs
    ctx.save_for_backward(grad, x)


def _weight_grad_backward(ctx, grad_weight, grad_bias):
    grad, x = ctx.saved_tensors
    sizes = ctx.stride, ctx.padding, ctx.groups
    return (
        _conv2d_of_size(grad, x, grad_weight, grad_bias if ctx.with_bias else None, *sizes),
        _op._conv2d_input_grad(grad, grad_weight, x.shape[2], x.shape[3], *sizes),
        *[None] * 5,
    )


def _input_grad_fake(grad, weight, height, width, stride, padding, groups):
    return empty(grad, (grad.shape[0], weight.shape[1] * groups, height, width))


def _input_grad_setup(ctx, inputs, output):
    grad, weight, _, _, ctx.stride, ctx.padding, ctx.groups = inputs
    ctx.save_for_backward(grad, weight)


def _input_grad_backward(ctx, grad_x):
    grad, weight = ctx.saved_tensors
    sizes = ctx.stride, ctx.padding, ctx.groups
    return (
        _conv2d_of_size(grad, grad_x, weight, None, *sizes),
        _op._conv2d_weight_grad(grad, grad_x, weight.shape[2], *sizes, False)[0],
        *[None] * 5,
    )


register("conv2d", conv2d_fake, _conv2d_setup, _conv2d_backward, (0,))
register("_conv2d_weight_grad", _weight_grad_fake, _weight_grad_setup, _weight_grad_backward, ())
register("_conv2d_input_grad", _input_grad_fake, _input_grad_setup, _input_grad_backward, (0,))


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


def is_supported(
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: Any,
    dilation: tuple[int, ...],
    groups: int,
    in_channels: int,
    out_channels: int,
    padding_mode: str,
) -> bool:
    """Whether a kernel computes such a convolution, given as torch.nn.Conv2d's attributes, on some device."""
    uniform = stride[0] == stride[1] and isinstance(padding, tuple) and padding[0] == padding[1]
    if not uniform or dilation != (1, 1) or padding_mode != "zeros":
        return False
    shape = out_channels, in_channels // groups, *kernel_size
    return is_first_layer(shape, stride[0], groups) or _is_winograd_layer(shape, stride[0], padding[0], groups)


def _is_served(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> bool:
    if weight.dim() != 4 or not has_kernel(x):
        return False
    if is_first_layer(weight.shape, stride, groups):
        return True
    float32_on_cpu = x.is_cpu and x.dtype == torch.float32
    return float32_on_cpu and groups > 0 and _is_winograd_layer(weight.shape, stride, padding, groups)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 4,
    padding: int = 0,
    ceil_mode: bool = False,
    *,
    groups: int = 1,
    relu: bool = False,
) -> Tensor:
    """2-D convolution, optionally followed by ReLU.

    Equivalent to `torch.nn.functional.conv2d(x, weight, bias, stride, padding, groups=groups)`. Kernels of ours compute
    AlexNet's first layer (11x11 filters, stride 4, 1, 3 or 4 input channels) and, in float32 on a CPU, 3x3 and 5x5
    convolutions with stride 1 between multiples of 16 channels where that takes less time (Winograd's algorithm). What
    else there is, and results beyond the range of that algorithm, torch computes.

    With `ceil_mode` the output size is rounded up and the last window reads zeros beyond the right and bottom edge, as
    in cuda-convnet (the 2012 code): equivalent to padding x there first. On CUDA, float32 is rounded to TF32, forward
    and backward, wherever torch does so for its own convolutions: `torch.backends.cudnn.conv.fp32_precision`.

    Args:
        x: (N, C, H, W) or (C, H, W); the output keeps its memory format. Under autocast, cast as torch's conv2d does.
        weight: (K, C / groups, kernel height, kernel width). bias: (K,) or None.
        relu: return max(0, result). Saved for backward are then x, weight and the result.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or stride, padding or groups is out of range.
    """
    x, weight, bias = autocast(x, weight, bias)
    if not _is_served(x, weight, stride, padding, groups):
        return reference.conv2d(x, weight, bias, stride, padding, ceil_mode, groups=groups, relu=relu)
    reference.check_conv2d("conv2d", x, weight, bias, stride, padding, groups)
    if x.dim() == 3:
        return conv2d(x[None], weight, bias, stride, padding, ceil_mode, groups=groups, relu=relu)[0]
    args = x, weight, bias, stride, padding, groups, ceil_mode, relu
    return call(_op.conv2d, needs_grad(x, weight, bias), *args)
