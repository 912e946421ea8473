"""conv2d: three bilinear ops, each the derivative of the other two, so derivatives of any order exist."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._library import KERNEL_DTYPES, has_kernel
from ._registration import call, empty, needs_grad, output_size, register

_op = torch.ops.alexnet_cuda


def conv2d_fake(x, weight, bias, stride, padding, ceil_mode):
    height, width = (output_size(s, weight.shape[2], stride, padding, ceil_mode, False) for s in x.shape[2:])
    return empty(x, (x.shape[0], weight.shape[0], height, width))


def _conv2d_setup(ctx, inputs, output):
    x, weight, _, ctx.stride, ctx.padding, _ = inputs
    ctx.save_for_backward(x, weight)


def conv2d_gradients(
    needs: tuple[bool, ...], grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int
) -> tuple:
    grad_x = _op._conv2d_input_grad(grad, weight, x.shape[2], x.shape[3], stride, padding) if needs[0] else None
    if not needs[1]:
        return grad_x, None, grad.sum((0, 2, 3)) if needs[2] else None
    grad_weight, grad_bias = _op._conv2d_weight_grad(grad, x, weight.shape[2], stride, padding)
    return grad_x, grad_weight, grad_bias if needs[2] else None


def _conv2d_backward(ctx, grad):
    gradients = conv2d_gradients(ctx.needs_input_grad, grad, *ctx.saved_tensors, ctx.stride, ctx.padding)
    return (*gradients, None, None, None)


def _conv2d_of_size(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """The convolution whose output has grad's size, be it rounded down or up."""
    y = _op.conv2d(x, weight, bias, stride, padding, True)
    return y[:, :, : grad.shape[2], : grad.shape[3]]


def _conv2d_weight_grad_fake(grad, x, kernel_size, stride, padding):
    return x.new_empty((grad.shape[1], x.shape[1], kernel_size, kernel_size)), x.new_empty(grad.shape[1])


def _conv2d_weight_grad_setup(ctx, inputs, output):
    grad, x, _, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(grad, x)


def _conv2d_weight_grad_backward(ctx, grad_weight, grad_bias):
    grad, x = ctx.saved_tensors
    return (
        _conv2d_of_size(grad, x, grad_weight, grad_bias, ctx.stride, ctx.padding),
        _op._conv2d_input_grad(grad, grad_weight, x.shape[2], x.shape[3], ctx.stride, ctx.padding),
        *[None] * 3,
    )


def _conv2d_input_grad_fake(grad, weight, height, width, stride, padding):
    return empty(grad, (grad.shape[0], weight.shape[1], height, width))


def _conv2d_input_grad_setup(ctx, inputs, output):
    grad, weight, _, _, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(grad, weight)


def _conv2d_input_grad_backward(ctx, grad_x):
    grad, weight = ctx.saved_tensors
    return (
        _conv2d_of_size(grad, grad_x, weight, None, ctx.stride, ctx.padding),
        _op._conv2d_weight_grad(grad, grad_x, weight.shape[2], ctx.stride, ctx.padding)[0],
        *[None] * 4,
    )


register("conv2d", conv2d_fake, _conv2d_setup, _conv2d_backward, (0,))
register("_conv2d_weight_grad", _conv2d_weight_grad_fake, _conv2d_weight_grad_setup, _conv2d_weight_grad_backward, ())
register("_conv2d_input_grad", _conv2d_input_grad_fake, _conv2d_input_grad_setup, _conv2d_input_grad_backward, (0,))


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


def conv2d_has_kernel(x: Tensor, weight: Tensor, stride: int) -> bool:
    return has_kernel(x) and weight.shape[1] in (1, 3, 4) and weight.shape[2] == weight.shape[3] == 11 and stride == 4


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 4, padding: int = 0, ceil_mode: bool = False
) -> Tensor:
    """2-D convolution; a kernel serves AlexNet's first layer: 11x11, stride 4, 1, 3 or 4 input channels.

    Equivalent to `torch.nn.functional.conv2d(x, weight, bias, stride, padding)`. With `ceil_mode` the output size is
    rounded up and the last window reads zeros beyond the right and bottom edge, as cuda-convnet (the 2012 code) does:
    equivalent to padding x there first. On CUDA, float32 is rounded to TF32, forward and backward, wherever torch does
    so for its own convolutions: `torch.backends.cudnn.conv.fp32_precision`, formerly `allow_tf32`.

    Args:
        x: (N, C, H, W) or (C, H, W); the output keeps its memory format. Under autocast, cast as torch's conv2d does.
        weight: (K, C, kernel height, kernel width). bias: (K,) or None.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or stride or padding is out of range.
    """
    x, weight, bias = autocast(x, weight, bias)
    if not conv2d_has_kernel(x, weight, stride):
        return reference.conv2d(x, weight, bias, stride, padding, ceil_mode)
    reference.check_conv2d("conv2d", x, weight, bias, stride, padding)
    if x.dim() == 3:
        return conv2d(x[None], weight, bias, stride, padding, ceil_mode)[0]
    return call(_op.conv2d, needs_grad(x, weight, bias), x, weight, bias, stride, padding, ceil_mode)
