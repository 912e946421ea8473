"""Linear layers in float32 on a CPU. torch runs them in MKL, which reads the weights of fully connected layers at half
the speed of memory on some CPUs; here they run in the oneDNN that torch contains."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import KERNEL_DTYPES, has_kernel
from .._torch_private import has_onednn_linear, onednn_linear, transforms_active
from ._registration import _op, before_relu, call, needs_grad, register, save_first, save_for_relu

# oneDNN reorders its right operand into blocks first. For these numbers of images it is faster to exchange the
# operands, so that the images are reordered instead of the weights.
_SWAPPED = range(8, 129)
_SMALLEST = 2**20  # weights; smaller products are as fast in MKL


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    if not has_onednn_linear() or len(x) == 0:  # oneDNN takes no empty batch
        y = F.linear(x, weight, bias)
        return y.relu_() if relu else y
    if len(x) not in _SWAPPED:
        return onednn_linear(x, weight, bias, relu)
    y = x.new_empty(len(x), len(weight))
    torch.add(onednn_linear(weight, x, None, False).t(), 0 if bias is None else bias, out=y)
    return y.relu_() if relu else y


@functools.cache
def _on_intel() -> bool:
    """Where MKL multiplies by weights as they lie two to four times as fast as oneDNN, which copies them first."""
    return "Intel" in torch.cpu.get_capabilities().get("cpu_name", "")


def _linear_backward(ctx, grad):
    grad, x, weight = before_relu(ctx, grad)
    grad = grad.contiguous()  # expanded, behind a sum
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ weight if len(grad) == 1 or _on_intel() else _op.linear(grad, weight.t(), None, False)
    if ctx.needs_input_grad[1]:
        grad_weight = _op._linear_weight_grad(grad, x)
    return grad_x, grad_weight, grad.sum(0) if ctx.needs_input_grad[2] else None, None


def _weight_grad_backward(ctx, grad_weight):
    grad, x = ctx.saved_tensors
    return x @ grad_weight.t(), grad @ grad_weight


_linear_fake = lambda x, weight, bias, relu: x.new_empty(x.shape[0], weight.shape[0])
_weight_grad_fake = lambda grad, x: x.new_empty(grad.shape[1], x.shape[1])
register("linear", _linear_fake, save_for_relu, _linear_backward, (0,))
register("_linear_weight_grad", _weight_grad_fake, save_first(2), _weight_grad_backward, ())
if KERNEL_DTYPES:
    torch.library.impl("alexnet_cuda::linear", "default", _linear)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """Equivalent to `torch.nn.functional.linear(x, weight, bias)`, optionally followed by ReLU.

    Args: x is (N, in_features), weight (out_features, in_features), bias (out_features,) or None.
    """
    if _is_served(x, weight, bias):
        return call(_op.linear, needs_grad(x, weight, bias), x, weight, bias, relu)
    y = F.linear(x, weight, bias)
    return y.relu_() if relu else y


def _is_served(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Large products of float32 on a CPU. Exported programs keep torch's operator, which every runtime knows."""
    if not x.is_cpu or x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        return False
    if weight.numel() < _SMALLEST or any(t is not None and t.dtype != torch.float32 for t in (x, weight, bias)):
        return False
    if torch.compiler.is_exporting() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    return has_kernel(x) and has_onednn_linear() and not transforms_active()
