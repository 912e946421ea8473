"""What the operators share: fake tensors in the right memory format, and registration with torch.library."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._library import KERNEL_DTYPES
from .._torch_private import below_autograd, transforms_active

_op = torch.ops.alexnet_cuda


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last if the strides of the 4-D x are ordered C, W, H, N, as `format_of` in csrc/host/checks.h."""
    smallest = 0
    for d in (1, 3, 2, 0):
        stride = x.stride(d)
        if x.shape[d] == 0 or stride < smallest or (d == 1 and stride == 0) or (d == 0 and smallest == x.stride(1)):
            return torch.contiguous_format
        smallest = stride * x.shape[d] if x.shape[d] > 1 else stride
    return torch.channels_last


def empty(like: Tensor, shape: Any, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format(like))


def gradient_fake(grad: Tensor, x: Tensor, *args: Any) -> Tensor:
    return empty(x, x.shape)


def batch_rule(name: str, batched: tuple[int, ...], info: Any, in_dims: tuple, *args: Any) -> tuple:
    """vmap: fold the new dimension into the batch of the `batched` arguments; run one by one if others have it too."""
    op, size = getattr(_op, name), info.batch_size
    if all(d is None for i, d in enumerate(in_dims) if i not in batched):
        front = [
            a if i not in batched else a.expand(size, *a.shape) if d is None else a.movedim(d, 0)
            for i, (a, d) in enumerate(zip(args, in_dims))
        ]
        n = front[batched[0]].shape[1]
        results = op(*[a.flatten(0, 1) if i in batched else a for i, a in enumerate(front)])
        split = [y.unflatten(0, (size, n)) if y.dim() > 1 else y for y in _tuple(results)]
        dims = [0 if y.dim() > 1 else None for y in split]
    else:
        steps = [_tuple(op(*[a if d is None else a.select(d, b) for a, d in zip(args, in_dims)])) for b in range(size)]
        split = [torch.stack(y) for y in zip(*steps)]
        dims = [0] * len(split)
    return (split[0], dims[0]) if len(split) == 1 else (tuple(split), tuple(dims))


def _tuple(x: Any) -> tuple:
    return x if isinstance(x, tuple) else (x,)


def register(name: str, fake: Callable, setup: Callable, backward: Callable, batched: tuple[int, ...]) -> None:
    if not KERNEL_DTYPES:  # the library that defines the schemas is not loaded
        return
    torch.library.register_fake(f"alexnet_cuda::{name}", fake)
    torch.library.register_autograd(f"alexnet_cuda::{name}", backward, setup_context=setup)
    torch.library.register_vmap(f"alexnet_cuda::{name}", partial(batch_rule, name, batched))
    op = getattr(_op, name)

    def forward(ctx: Any, *args: Any) -> Any:
        with below_autograd():
            output = op(*args)
        setup(ctx, args, output)
        return output

    functions = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    _functions[op] = type(name, (torch.autograd.Function,), functions)


_functions: dict[Callable, type[torch.autograd.Function]] = {}


def save_first(count: int) -> Callable:
    """The setup of an operator that saves its first `count` arguments for backward."""

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(*inputs[:count])
        ctx.args = inputs[count:]

    return setup


def save_for_relu(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """The setup of a layer (x, weight, bias, ..., relu), whose ReLU needs its output in backward."""
    x, weight, _, *ctx.args, relu = inputs
    ctx.save_for_backward(x, weight, *([output] if relu else []))


def before_relu(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient before the ReLU, if there is one, with x and weight, in the backward of such a layer."""
    x, weight, *output = ctx.saved_tensors
    return torch.ops.aten.threshold_backward(grad, output[0], 0) if output else grad, x, weight


def second_order(function: Callable[[Tensor], Tensor], grad: Tensor, x: Tensor, grad_grad: Tensor) -> tuple:
    """Gradients with respect to (grad, x) of the backward of `function`, composed of torch's own operators."""

    def first_order(grad: Tensor, x: Tensor) -> Tensor:
        return torch.func.vjp(function, x)[1](grad)[0]

    return torch.func.vjp(first_order, grad, x)[1](grad_grad)


def call(op: Callable, differentiable: bool, *args: Any) -> Any:
    """op(*args). In plain eager mode torch's Python layer for registered operators is bypassed, since it takes longer
    than a small operator (pooling of one image: 1.4 to 2.1 times torch's speed without it, 0.65 to 0.9 with it): by a
    torch.autograd.Function of the same formulas, or by nothing where no gradient is needed."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms_active():
        return op(*args)
    if differentiable:
        return _functions[op].apply(*args)
    with below_autograd():
        return op(*args)


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
