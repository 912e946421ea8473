"""Convolutions and linear layers after the first, float32 on a CPU, where torch's own way is not the fastest.

3x3 and 5x5 convolutions with stride 1 go to our kernel, which takes less than half the products
(csrc/cpu/winograd_conv2d_kernel.cpp), in both directions. The other layers go to oneDNN: torch runs float32 products in
MKL, which reads the fully connected layers' weights at half the speed of memory on some CPUs, and its convolutions
leave ReLU to a pass of its own. The oneDNN that torch contains does both, through operators that torch.compile uses. In
training, the fully connected weights' gradients, 234 MB, are made in memory that the last step's have left
(`set_kept_memory`): the system needs longer to map that much anew than the products take.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ._library import KERNEL_DTYPES, build_info, transforming

_op, _onednn = torch.ops.alexnet_cuda, torch.ops.mkldnn

# oneDNN brings its right operand into blocks first: with so many images they are the cheaper one to take for that.
SWAPPED = range(8, 129)
LEAST = 2**20  # weights; smaller products are as fast in MKL


def serves(x: Tensor) -> bool:
    """Whether x can go through these operators, which know no transforms."""
    if not _plain(x) or torch.compiler.is_compiling() or torch.jit.is_tracing() or transforming():
        return False
    return "cpu" in KERNEL_DTYPES and not torch.is_autocast_enabled("cpu")


def length(chain: list[nn.Module], x: Tensor) -> int:
    """How many of the chain's first modules `run` computes at once: a layer and the ReLU after it, the layer, or 0."""
    layer, relu = chain[0], len(chain) > 1 and type(chain[1]) is nn.ReLU
    if type(layer) is nn.Linear:
        served = _has_onednn() and x.dim() == 2 and layer.weight.numel() >= LEAST
        return (1 + relu) * (served and _fits(layer, layer.in_features, x))
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and isinstance(layer.padding, tuple):
        if by_winograd(layer, x):
            return 1 + relu
        return 2 * (relu and x.dim() == 4 and _fits(layer, layer.in_channels, x) and _has_onednn())
    return 0


def _has_onednn() -> bool:
    return hasattr(_onednn, "_linear_pointwise") and bool(torch.backends.mkldnn.enabled)


@cache
def has_winograd() -> bool:
    """Only where its vectors are as wide as oneDNN's, and not where emulated CUDA kernels stand in for the CPU's."""
    name = "alexnet_cuda::_winograd_conv2d"
    wide = build_info()["CPU kernels"] in ("avx2", "avx512")
    return wide and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")


def is_winograds(layer: nn.Conv2d) -> bool:
    """Whether the kernel takes such a convolution."""
    size = layer.kernel_size[0]
    if layer.padding_mode != "zeros" or layer.padding not in [(padding, padding) for padding in range(size)]:
        return False
    plain = layer.stride == (1, 1) and layer.dilation == (1, 1) and layer.kernel_size in ((3, 3), (5, 5))
    return plain and layer.in_channels % (16 * layer.groups) == 0 and layer.out_channels % (16 * layer.groups) == 0


def by_winograd(layer: nn.Conv2d, x: Tensor, gain: float = 1.25) -> bool:
    """Whether it takes this one and makes `gain` times fewer products: for tiles of 6x6 inputs 36 of each channel and
    filter, and bringing the weights into that form takes as long as 16 tiles."""
    if not is_winograds(layer) or x.dim() != 4:
        return False
    size, (images, _, *sides) = layer.kernel_size[0], x.shape
    height, width = (side + 2 * int(layer.padding[0]) - size + 1 for side in sides)
    tiles = images * -(-height // (7 - size)) * -(-width // (7 - size))
    gains = min(height, width) > 0 and size**2 * images * height * width > gain * 36 * (tiles + 16)
    return gains and has_winograd() and _fits(layer, layer.in_channels, x)


def _fits(layer: nn.Linear | nn.Conv2d, channels: int, x: Tensor) -> bool:
    """Otherwise torch has the better message."""
    return x.shape[1] == channels and _plain(layer.weight) and (layer.bias is None or _plain(layer.bias))


def _plain(x: Tensor) -> bool:
    """Of no subclass, which may mean something else, and float32 in the CPU's memory."""
    return type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 and x.device.type == "cpu"


def run(modules: list[Any], x: Tensor) -> Tensor:
    """As many of the modules as `length` says, applied to x."""
    layer, relu = modules[0], len(modules) > 1
    weight, bias, training = layer.weight, layer.bias, torch.is_grad_enabled()
    if isinstance(layer, nn.Linear):
        y = _Linear.apply(x, weight, bias) if training else _linear(x, weight, bias, relu)
    elif by_winograd(layer, x):
        y = conv2d(layer, x, relu and not training)
    elif training:
        y = layer(x)
    else:
        geometry = layer.padding, layer.stride, layer.dilation, layer.groups
        y = _onednn._convolution_pointwise(x, weight, bias, *geometry, _NAMES[relu], [], "")
    return y.relu_() if training and relu else y


def conv2d(layer: nn.Conv2d, x: Tensor, relu: bool = False) -> Tensor:
    """The kernel itself, with gradients unless it does the ReLU."""
    apply = partial(_conv2d, relu=relu) if relu or not torch.is_grad_enabled() else _Conv2d.apply
    return apply(x, layer.weight, layer.bias, int(layer.padding[0]), layer.groups)


_NAMES = ("none", "relu")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    if len(x) not in SWAPPED:
        return _onednn._linear_pointwise(x, weight, bias, _NAMES[relu], [], "")
    y = x.new_empty(len(x), len(weight))
    torch.add(_onednn._linear_pointwise(weight, x, None, "none", [], "").t(), 0 if bias is None else bias, out=y)
    return y.relu_() if relu else y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, weight), needs = grads, ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled():  # to be differentiated again
            return grad @ weight, grad.t() @ x, grad.sum(0) if needs[2] else None
        grad = grad.contiguous()
        grad_x = grad_weight = None
        if needs[0]:
            few = len(grad) < 2
            grad_x = grad @ weight if few else _onednn._linear_pointwise(grad, weight.t(), None, "none", [], "")
        if needs[1]:
            grad_weight = torch.mm(grad.t(), x, out=_op._kept_empty_like(weight))
        return grad_x, grad_weight, grad.sum(0) if needs[2] else None


def _conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, groups: int, *, transposed: bool = False,
    relu: bool = False,
) -> Tensor:  # fmt: skip
    y, finite = _op._winograd_conv2d(x, weight, bias, padding, groups, transposed, relu)
    if finite:
        return y
    y = torch.convolution(x, weight, bias, (1, 1), (padding, padding), (1, 1), transposed, (0, 0), groups)
    return y.relu_() if relu else y


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, groups: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = padding, groups
        return _conv2d(x, weight, bias, padding, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, weight), (padding, groups) = grads, ctx.saved_tensors, ctx.geometry
        needs = ctx.needs_input_grad[:3]

        def torchs(*needs: bool) -> list[Tensor | None]:
            geometry = (1, 1), (padding, padding), (1, 1), False, (0, 0), groups
            return torch.ops.aten.convolution_backward(grad, x, weight, [len(weight)], *geometry, needs)

        if torch.is_grad_enabled():  # to be differentiated again
            return (*torchs(*needs), None, None)
        grad_x = _conv2d(grad, weight, None, padding, groups, transposed=True) if needs[0] else None
        grad_weight = None
        if needs[1]:
            size = weight.shape[2]
            grad_weight, finite = _op._winograd_conv2d_weight_grad(grad, x, size, padding, groups)
            if not finite:
                grad_weight = torchs(False, True, False)[1]
        return grad_x, grad_weight, grad.sum((0, 2, 3)) if needs[2] else None, None, None
