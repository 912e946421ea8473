"""relu_lrn_max_pool2d: the tail of AlexNet's first two blocks as one op."""

import torch
from torch import Tensor

from .. import reference
from ..reference import ORDERS, Size, lrn_has_kernel, output_size
from ._registration import _op, call, gradient_fake, needs_grad, register, second_order
from .max_pool2d import max_pool2d_fake, pool_has_kernel


def _tail_reference(x, order, size, front, alpha, beta, k, groups, kernel_size, stride, padding, ceil_mode):
    window = "torch" if front == size // 2 else "onnx"
    return reference.relu_lrn_max_pool2d(
        x, size, alpha, beta, k, order=ORDERS[order], groups=groups, divide_alpha=False, window=window,
        kernel_size=kernel_size, stride=stride, padding=padding, ceil_mode=ceil_mode,
    )  # fmt: skip


def _tail_setup(ctx, inputs, output):
    x, *ctx.args, _, _ = inputs
    ctx.save_for_backward(x, output[1])


def _tail_backward(ctx, grad, _):
    x, code = ctx.saved_tensors
    gradient = call(_op._relu_lrn_max_pool2d_backward, needs_grad(grad, x), grad, x, code, *ctx.args)
    return (gradient, *[None] * 12)


def _tail_backward_setup(ctx, inputs, output):
    grad, x, code, *ctx.args = inputs
    *_, kernel_size, stride, padding = ctx.args
    floor = (output_size(s, kernel_size, stride, padding, False, True) for s in x.shape[2:])
    ctx.ceil_mode = code.shape[2:] != torch.Size(floor)
    ctx.save_for_backward(grad, x)


def _tail_backward_backward(ctx, grad_grad):
    function = lambda x: _tail_reference(x, *ctx.args, ctx.ceil_mode)
    grad, x = second_order(function, *ctx.saved_tensors, grad_grad)
    return (grad, x, *[None] * 11)


register("relu_lrn_max_pool2d", lambda x, *args: max_pool2d_fake(x, *args[-5:]), _tail_setup, _tail_backward, (0,))
register("_relu_lrn_max_pool2d_backward", gradient_fake, _tail_backward_setup, _tail_backward_backward, (0, 1, 2))


def relu_lrn_max_pool2d(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, *, order: str = "relu-lrn-pool",
    groups: int = 1, divide_alpha: bool = True, window: str = "torch", across: str = "channels",
    kernel_size: Size = 3, stride: Size | None = 2, padding: Size = 0, ceil_mode: bool = False,
) -> Tensor:  # fmt: skip
    """What follows AlexNet's first two convolutions, in one pass: ReLU, local response normalisation, max pooling.

    Equivalent to `max_pool2d(local_response_norm(relu(x), ...), ...)` for order "relu-lrn-pool" (the paper, Caffe's
    bvlc_alexnet); "relu-pool-lrn" is CaffeNet, "lrn-pool-relu" the first block of the 2012 code. The steps between are
    kept in float32 (the pooled values of "relu-pool-lrn" on CUDA, and their gradient, in the dtype of x), and x and one
    byte per output are saved for backward.

    Args: x is (N, C, H, W) or (C, H, W); the others are those of `local_response_norm` and `max_pool2d`.

    Raises: what those raise; ValueError for an unknown order.
    """
    op = "relu_lrn_max_pool2d"
    reference.check_floating(op, x)
    reference.check_choice(op, "order", order, ORDERS)
    pairs = reference.pool_constants(op, x.shape, kernel_size, stride, padding, ceil_mode)
    batch = x[None] if x.dim() == 3 else x
    front, scale = reference.lrn_constants(op, batch.shape, size, alpha, groups, divide_alpha, window, across)
    if across == "spatial" or not pool_has_kernel(x, *pairs) or not lrn_has_kernel(alpha, beta, k):
        return reference.relu_lrn_max_pool2d(
            x, size, alpha, beta, k, order=order, groups=groups, divide_alpha=divide_alpha, window=window,
            across=across, kernel_size=kernel_size, stride=stride, padding=padding, ceil_mode=ceil_mode,
        )  # fmt: skip
    constants = (ORDERS.index(order), size, front, scale, beta, k, groups)
    save, pool = needs_grad(x), (*(pair[0] for pair in pairs), ceil_mode)
    y, _ = call(_op.relu_lrn_max_pool2d, save, batch, *constants, *pool, save)
    return y[0] if x.dim() == 3 else y
