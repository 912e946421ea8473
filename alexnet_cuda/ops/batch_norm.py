"""Batch normalisation in training on a CPU, with the ReLU that follows it in the same pass."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import has_kernel
from .._torch_private import transforms_active
from ._registration import _op, call, empty, needs_grad, register


def _plain(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, relu: bool) -> Tensor:
    y = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    return y.relu() if relu else y


def _fake(x, weight, bias, eps, relu):
    return empty(x, x.shape), torch.empty_like(weight), torch.empty_like(weight)


def _setup(ctx, inputs, output):
    x, weight, bias, *ctx.args = inputs
    _, mean, var = output
    ctx.save_for_backward(x, weight, bias, mean, var)
    ctx.mark_non_differentiable(mean, var)


def _backward(ctx, grad, *_):
    arguments = grad, *ctx.saved_tensors, *ctx.args
    return (*call(_op._batch_norm_backward, needs_grad(grad, *ctx.saved_tensors), *arguments), None, None)


def _backward_setup(ctx, inputs, output):
    *tensors, _, _, ctx.eps, ctx.relu = inputs
    ctx.save_for_backward(*tensors)


def _backward_backward(ctx, *grad_grads):
    grad, *tensors = ctx.saved_tensors
    function = partial(_plain, eps=ctx.eps, relu=ctx.relu)

    def first_order(grad, *tensors):
        return torch.func.vjp(function, *tensors)[1](grad)

    return (*torch.func.vjp(first_order, grad, *tensors)[1](grad_grads), None, None, None, None)


register("batch_norm", _fake, _setup, _backward, ())
_backward_fake = lambda grad, x, weight, *_: (empty(x, x.shape), torch.empty_like(weight), torch.empty_like(weight))
register("_batch_norm_backward", _backward_fake, _backward_setup, _backward_backward, ())


def batch_norm(
    x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor, momentum: float = 0.1,
    eps: float = 1e-5, *, relu: bool = False,
) -> Tensor:  # fmt: skip
    """Batch normalisation in training: with the mean and variance of the batch, which also move the running averages.

    Equivalent to `torch.nn.functional.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)`,
    optionally followed by ReLU. On a CPU images in channels_last with a multiple of 16 channels have a kernel; torch
    computes the others.

    Args: x is (N, C, H, W), all others are (C,).
    """
    if not _is_served(x, weight, bias):
        y = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
        return y.relu() if relu else y
    y, mean, var = call(_op.batch_norm, needs_grad(x, weight, bias), x, weight, bias, eps, relu)
    count = x.numel() // x.shape[1]
    with torch.no_grad():
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (count / (count - 1)), momentum)
    return y


def _is_served(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    if not x.is_cpu or x.dim() != 4 or x.dtype == torch.float64 or not has_kernel(x) or transforms_active():
        return False
    if x.shape[1] % 16 or x.numel() <= x.shape[1] or weight.dtype != torch.float32 or bias.dtype != torch.float32:
        return False
    return x.is_contiguous(memory_format=torch.channels_last)
