"""max_pool2d: one byte per output, the position of the maximum in its window, is all that backward needs."""

from typing import Literal, overload

import torch
from torch import Tensor

from .. import reference
from .._library import has_kernel
from ..reference import Size, output_size
from ._registration import _op, call, empty, needs_grad, register


def max_pool2d_fake(x, kernel_size, stride, padding, ceil_mode, save_code):
    height, width = (output_size(s, kernel_size, stride, padding, ceil_mode, True) for s in x.shape[2:])
    y = empty(x, (*x.shape[:2], height, width))
    return y, empty(y, y.shape, torch.uint8) if save_code else y.new_empty(0, dtype=torch.uint8)


def _max_pool2d_setup(ctx, inputs, output):
    x, *ctx.args, _, _ = inputs
    ctx.size = x.shape[2:]
    ctx.save_for_backward(output[1])


def _max_pool2d_backward(ctx, grad, _):
    arguments = grad, *ctx.saved_tensors, *ctx.size, *ctx.args
    return (call(_op._max_pool2d_backward, needs_grad(grad), *arguments), *[None] * 5)


def _indices(code: Tensor, width: int, kernel_size: int, stride: int, padding: int) -> Tensor:
    """torch's int64 positions in the (H, W) plane from window codes."""
    code = code.long()
    rows = torch.arange(code.shape[2], device=code.device).mul(stride).sub(padding)[:, None]
    columns = torch.arange(code.shape[3], device=code.device).mul(stride).sub(padding)
    return (rows + code // kernel_size) * width + columns + code % kernel_size


def _max_pool2d_backward_setup(ctx, inputs, output):
    _, code, _, *ctx.args = inputs
    ctx.save_for_backward(code)


def _max_pool2d_backward_backward(ctx, grad_grad):
    (code,) = ctx.saved_tensors
    indices = _indices(code, *ctx.args)
    return (grad_grad.flatten(2).gather(2, indices.flatten(2)).view(code.shape), *[None] * 6)


register("max_pool2d", max_pool2d_fake, _max_pool2d_setup, _max_pool2d_backward, (0,))
_backward_fake = lambda grad, code, height, width, *_: empty(code, (*code.shape[:2], height, width), grad.dtype)
register("_max_pool2d_backward", _backward_fake, _max_pool2d_backward_setup, _max_pool2d_backward_backward, (0, 1))


def pool_has_kernel(x: Tensor, kernel: tuple, stride: tuple, padding: tuple) -> bool:
    return has_kernel(x) and kernel[0] <= 15 and all(pair[0] == pair[1] for pair in (kernel, stride, padding))


@overload
def max_pool2d(
    x: Tensor, kernel_size: Size = ..., stride: Size | None = ..., padding: Size = ..., ceil_mode: bool = ...,
    return_indices: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def max_pool2d(
    x: Tensor, kernel_size: Size = ..., stride: Size | None = ..., padding: Size = ..., ceil_mode: bool = ...,
    *, return_indices: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def max_pool2d(
    x: Tensor, kernel_size: Size, stride: Size | None, padding: Size, ceil_mode: bool, return_indices: bool
) -> Tensor | tuple[Tensor, Tensor]: ...
def max_pool2d(
    x: Tensor, kernel_size: Size = 3, stride: Size | None = 2, padding: Size = 0, ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Max pooling, by default AlexNet's overlapping one.

    Equivalent to `torch.nn.functional.max_pool2d(x, kernel_size, stride, padding, 1, ceil_mode, return_indices)`,
    but one byte per output is saved for backward, where torch saves x and eight. The first maximum in scan order wins
    and NaN propagates, as in torch.

    Args:
        x: (N, C, H, W) or (C, H, W); the output keeps its memory format.
        return_indices: also return int64 positions in the (H, W) plane.

    Returns: the pooled tensor, or with `return_indices` (pooled tensor, positions).

    Raises:
        errors.ArgumentError (a ValueError and RuntimeError): x is not 3-D or 4-D or is smaller than the window, or
            an argument is out of range. TypeError: x is not a tensor, or an argument is not an integer.
    """
    reference.check_tensor("max_pool2d", x)
    pairs = reference.pool_constants("max_pool2d", x.shape, kernel_size, stride, padding, ceil_mode)
    if not pool_has_kernel(x, *pairs):
        return reference.max_pool2d(x, kernel_size, stride, padding, ceil_mode, return_indices)
    k, s, p = (pair[0] for pair in pairs)
    batch = x[None] if x.dim() == 3 else x
    save = needs_grad(x)
    y, code = call(_op.max_pool2d, save, batch, k, s, p, ceil_mode, return_indices or save)
    y = y[0] if x.dim() == 3 else y
    if not return_indices:
        return y
    return y, _indices(code, x.shape[-1], k, s, p).view(y.shape)
