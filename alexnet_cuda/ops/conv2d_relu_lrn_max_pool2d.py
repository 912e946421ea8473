"""conv2d_relu_lrn_max_pool2d: AlexNet's whole first block as one op."""

from typing import Any

from torch import Tensor

from .. import reference
from .._library import has_kernel
from ..reference import ORDERS, Size, lrn_has_kernel, output_size
from ._registration import _op, call, needs_grad, register
from .conv2d import autocast, conv2d, conv2d_fake, conv2d_gradients, is_first_layer
from .max_pool2d import max_pool2d_fake, pool_has_kernel
from .relu_lrn_max_pool2d import relu_lrn_max_pool2d


def _block_fake(x, weight, bias, stride, padding, ceil_mode, *tail):
    *_, save = tail
    a = conv2d_fake(x, weight, bias, stride, padding, 1, ceil_mode, False)
    y, code = max_pool2d_fake(a, *tail[-5:])
    return y, a if save else x.new_empty(0), code


def _block_setup(ctx, inputs, output):
    x, weight, _, ctx.stride, ctx.padding, _, *ctx.tail, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, *output[1:])


def _block_backward(ctx, grad, grad_a, _):
    x, weight, a, code = ctx.saved_tensors
    if grad is not None:  # a is an output of this node: second derivatives arrive through grad_a
        through = _op._relu_lrn_max_pool2d_backward(grad, a, code, *ctx.tail)
        grad_a = through if grad_a is None else through + grad_a
    gradients = (None,) * 3
    if grad_a is not None:
        gradients = conv2d_gradients(ctx.needs_input_grad, grad_a, x, weight, ctx.stride, ctx.padding, 1)
    return (*gradients, *[None] * 15)


register("conv2d_relu_lrn_max_pool2d", _block_fake, _block_setup, _block_backward, (0,))


def conv2d_relu_lrn_max_pool2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0,
    *, stride: Size = 4, padding: Size | str = 0, ceil_mode: bool = False, order: str = "relu-lrn-pool",
    groups: int = 1, divide_alpha: bool = True, window: str = "torch", across: str = "channels",
    pool_kernel_size: Size = 3, pool_stride: Size | None = 2, pool_padding: Size = 0, pool_ceil_mode: bool = False,
) -> Tensor:  # fmt: skip
    """AlexNet's whole first block: 11x11 stride-4 convolution, ReLU, local response normalisation, max pooling.

    Equivalent to `relu_lrn_max_pool2d(conv2d(x, weight, bias, stride, padding, ceil_mode), size, alpha, beta, k, ...)`;
    the arguments of the pooling have the prefix `pool_`. Without gradients nothing but the pooled output is kept; with
    them, x, the convolution output and one byte per pooled output are saved.

    Args, Raises: those of `conv2d` and `relu_lrn_max_pool2d`.
    """
    tail: dict[str, Any] = dict(
        order=order, groups=groups, divide_alpha=divide_alpha, window=window, across=across,
        kernel_size=pool_kernel_size, stride=pool_stride, padding=pool_padding, ceil_mode=pool_ceil_mode,
    )  # fmt: skip
    x, weight, bias = autocast(x, weight, bias)
    op = "conv2d_relu_lrn_max_pool2d"
    reference.check_floating(op, x)
    step, pad = reference.conv_geometry(op, stride, padding)
    reference.check_conv2d(op, x, weight, bias, pad, 1)
    uniform = step[0] == step[1] and pad[0] == pad[1]
    if x.dim() == 3 or not (uniform and has_kernel(x) and is_first_layer(weight.shape, step[0], 1)):
        return relu_lrn_max_pool2d(conv2d(x, weight, bias, stride, padding, ceil_mode), size, alpha, beta, k, **tail)
    reference.check_choice(op, "order", order, ORDERS)
    stride, padding = step[0], int(pad[0])
    sizes = (output_size(s, weight.shape[2], stride, padding, ceil_mode, False) for s in x.shape[2:])
    shape = (x.shape[0], weight.shape[0], *sizes)
    pairs = reference.pool_constants(op, shape, pool_kernel_size, pool_stride, pool_padding, pool_ceil_mode)
    front, scale = reference.lrn_constants(op, shape, size, alpha, groups, divide_alpha, window, across)
    if across == "spatial" or not pool_has_kernel(x, *pairs) or not lrn_has_kernel(alpha, beta, k):
        return relu_lrn_max_pool2d(conv2d(x, weight, bias, stride, padding, ceil_mode), size, alpha, beta, k, **tail)
    conv, pool = (x, weight, bias, stride, padding, ceil_mode), (*(pair[0] for pair in pairs), pool_ceil_mode)
    constants = (ORDERS.index(order), size, front, scale, beta, k, groups)
    save = needs_grad(x, weight, bias)
    return call(_op.conv2d_relu_lrn_max_pool2d, save, *conv, *constants, *pool, save)[0]
