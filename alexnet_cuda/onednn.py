"""Layers after the first that run best in oneDNN: float32 on a CPU.

torch runs float32 products in MKL, which reads the fully connected layers' weights at half the speed of memory on some
CPUs, and its convolutions leave ReLU to a pass of its own. The oneDNN that torch contains does both, through operators
that torch.compile uses. In training, the fully connected weights' gradients, 234 MB, are made in memory that the last
step's have left (`set_kept_memory`): the system needs longer to map that much anew than the products take.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._library import KERNEL_DTYPES, transforming

_op = torch.ops.mkldnn

# oneDNN brings its right operand into blocks first: with so many images they are the cheaper one to take for that.
SWAPPED = range(8, 129)
LEAST = 2**20  # weights; smaller products are as fast in MKL


def serves(x: Tensor) -> bool:
    """Whether x can go through oneDNN's operators, which know no transforms."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transforming():
        return False
    available = hasattr(_op, "_linear_pointwise") and bool(torch.backends.mkldnn.enabled) and "cpu" in KERNEL_DTYPES
    return available and _plain(x) and not torch.is_autocast_enabled("cpu")


def length(chain: list[nn.Module], x: Tensor) -> int:
    """How many of the chain's first modules `run` computes at once: a layer and the ReLU after it, the layer, or 0."""
    layer, relu = chain[0], len(chain) > 1 and type(chain[1]) is nn.ReLU
    if type(layer) is nn.Linear:
        return (1 + relu) * (x.dim() == 2 and layer.weight.numel() >= LEAST and _fits(layer, layer.in_features, x))
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and isinstance(layer.padding, tuple):
        return 2 * (relu and x.dim() == 4 and _fits(layer, layer.in_channels, x))
    return 0


def _fits(layer: nn.Linear | nn.Conv2d, channels: int, x: Tensor) -> bool:
    """Otherwise torch has the better message."""
    return x.shape[1] == channels and _plain(layer.weight) and (layer.bias is None or _plain(layer.bias))


def _plain(x: Tensor) -> bool:
    """Of no subclass, which may mean something else, and float32 in the CPU's memory."""
    return type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 and x.device.type == "cpu"


def run(modules: list[Any], x: Tensor) -> Tensor:
    """As many of the modules as `length` says, applied to x."""
    layer, relu = modules[0], "relu" if len(modules) > 1 else "none"
    weight, bias = layer.weight, layer.bias
    if torch.is_grad_enabled():
        y = _Linear.apply(x, weight, bias) if isinstance(layer, nn.Linear) else layer(x)
        return y.relu_() if relu == "relu" else y
    if isinstance(layer, nn.Conv2d):
        geometry = layer.padding, layer.stride, layer.dilation, layer.groups
        return _op._convolution_pointwise(x, weight, bias, *geometry, relu, [], "")
    return _linear(x, weight, bias, relu)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu: str) -> Tensor:
    if len(x) not in SWAPPED:
        return _op._linear_pointwise(x, weight, bias, relu, [], "")
    y = x.new_empty(len(x), len(weight))
    torch.add(_op._linear_pointwise(weight, x, None, "none", [], "").t(), 0 if bias is None else bias, out=y)
    return y.relu_() if relu == "relu" else y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias, "none")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, weight), needs = grads, ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled():  # to be differentiated again
            return grad @ weight, grad.t() @ x, grad.sum(0) if needs[2] else None
        grad = grad.contiguous()
        grad_x = grad_weight = None
        if needs[0]:
            few = len(grad) < 2
            grad_x = grad @ weight if few else _op._linear_pointwise(grad, weight.t(), None, "none", [], "")
        if needs[1]:
            grad_weight = torch.mm(grad.t(), x, out=torch.ops.alexnet_cuda._kept_empty_like(weight))
        return grad_x, grad_weight, grad.sum(0) if needs[2] else None
