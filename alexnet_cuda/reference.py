"""Every op of `alexnet_cuda.ops` in plain torch: the specification, and what runs where no kernel does.

Signatures, defaults and results are those of `ops`; works on any device, is differentiable any number of times.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ArgumentError

Size = int | tuple[int, int]
ORDERS = ("relu-lrn-pool", "relu-pool-lrn", "lrn-pool-relu")


def check_choice(op: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ArgumentError(f"{op}: expected {name} to be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_tensor(op: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected x to be a Tensor, got {type(x).__name__}")


def check_floating(op: str, x: Tensor) -> None:
    check_tensor(op, x)
    if not x.is_floating_point():
        raise TypeError(f"{op}: expected x to have a floating-point dtype, got {x.dtype}")


def check_image(op: str, shape: Sequence[int]) -> None:
    if len(shape) not in (3, 4):
        raise ArgumentError(f"{op}: expected x to be 4-D (N, C, H, W) or 3-D (C, H, W), got {len(shape)}-D")


def pair(op: str, name: str, value: Any, least: int) -> tuple[int, int]:
    """(height, width) of an integer, or of a sequence of one or two."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    expected = f"{op}: expected {name} to be one or two integers of at least {least}, got {value!r}"
    try:
        integers = [v if type(v) is int else operator.index(v) for v in values]
    except TypeError:
        raise TypeError(expected) from None
    if any(isinstance(v, bool) for v in values):
        raise TypeError(expected)
    if len(integers) not in (1, 2) or min(integers) < least:
        raise ArgumentError(expected)
    return integers[0], integers[-1]


def lrn_constants(
    op: str, shape: Sequence[int], size: int, alpha: float, groups: int, divide_alpha: bool, window: str, across: str
) -> tuple[int, float]:
    """(elements before the centre, factor of the sum of squares) after checking the arguments."""
    check_choice(op, "window", window, ("torch", "onnx"))
    check_choice(op, "across", across, ("channels", "spatial"))
    if len(shape) < 3 or (across == "spatial" and len(shape) != 4):
        expected = "4-D (N, C, H, W)" if across == "spatial" else "3-D (N, C, ...) or larger"
        raise ArgumentError(f"{op}: expected x to be {expected}, got {len(shape)}-D")
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{op}: expected size to be a positive integer, got {size!r}")
    if size < 1:
        raise ArgumentError(f"{op}: expected size to be a positive integer, got {size!r}")
    if not isinstance(groups, int) or groups < 1 or shape[1] % groups:
        raise ArgumentError(f"{op}: expected groups to divide the {shape[1]} channels of x, got {groups!r}")
    front = size // 2 if window == "torch" else (size - 1) // 2
    elements = size if across == "channels" else size * size
    return front, float(alpha) / elements if divide_alpha else float(alpha)


def lrn_has_kernel(alpha: float, beta: float, k: float) -> bool:
    """The kernels' powers are of numbers that are not negative."""
    return alpha >= 0 and beta > 0 and k >= 0


def window_sums(x: Tensor, dim: int, size: int, front: int) -> Tensor:
    """Sums of `size` neighbours along `dim`, from `front` before each element; zeros beyond the ends."""
    pad = [0, 0] * (x.dim() - 1 - dim) + [front, size - 1 - front]
    padded = F.pad(x, pad)
    return sum((padded.narrow(dim, i, x.shape[dim]) for i in range(1, size)), padded.narrow(dim, 0, x.shape[dim]))


def local_response_norm(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, *,
    groups: int = 1, divide_alpha: bool = True, window: str = "torch", across: str = "channels",
) -> Tensor:  # fmt: skip
    """`ops.local_response_norm` in plain torch."""
    check_tensor("local_response_norm", x)
    front, scale = lrn_constants("local_response_norm", x.shape, size, alpha, groups, divide_alpha, window, across)
    if not x.is_floating_point() and (groups, divide_alpha, window, across) == (1, True, "torch", "channels"):
        return F.local_response_norm(x, size, alpha, beta, k)  # in integers, or torch's error
    check_floating("local_response_norm", x)
    wide = x if x.dtype == torch.float64 else x.float()
    squares = wide * wide
    if across == "channels":
        n, c = x.shape[:2]
        split = squares.reshape(n, groups, c // groups, math.prod(x.shape[2:]))
        total = window_sums(split, 2, size, front).reshape(x.shape)
    else:
        total = window_sums(window_sums(squares, 2, size, front), 3, size, front)
    return (wide / (k + scale * total) ** beta).to(x.dtype)


def output_size(size: int, kernel_size: int, stride: int, padding: int, ceil_mode: bool, pool: bool) -> int:
    """Of a pooling, whose last window starts inside x or its left padding, or of a convolution."""
    out = (size + 2 * padding - kernel_size + (stride - 1 if ceil_mode else 0)) // stride + 1
    return out - 1 if pool and ceil_mode and (out - 1) * stride >= size + padding else out


def pool_constants(
    op: str, shape: Sequence[int], kernel_size: Size, stride: Size | None, padding: Size, ceil_mode: bool
) -> tuple[tuple[int, int], ...]:
    """(height, width) of kernel, stride and padding after checking them."""
    check_image(op, shape)
    if 0 in shape[-3:]:
        raise ArgumentError(f"{op}: expected x to have channels, height and width, got shape {tuple(shape)}")
    kernel = pair(op, "kernel_size", kernel_size, 1)
    step = kernel if stride is None or stride == () or stride == [] else pair(op, "stride", stride, 1)
    pad = pair(op, "padding", padding, 0)
    if any(2 * p > k for p, k in zip(pad, kernel)):
        raise ArgumentError(f"{op}: expected padding to be at most half of kernel_size {kernel_size}, got {padding}")
    if any(output_size(*sizes, ceil_mode, True) < 1 for sizes in zip(shape[-2:], kernel, step, pad)):
        window = f"kernel_size {kernel_size} after padding {padding}"
        raise ArgumentError(f"{op}: expected x to be at least as large as {window}, got {shape[-2]}x{shape[-1]}")
    return kernel, step, pad


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
    """`ops.max_pool2d` in plain torch."""
    check_tensor("max_pool2d", x)
    kernel, step, pad = pool_constants("max_pool2d", x.shape, kernel_size, stride, padding, ceil_mode)
    pool: Any = F.max_pool2d
    return pool(x, kernel, step, pad, 1, ceil_mode, return_indices)


def relu_lrn_max_pool2d(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, *, order: str = "relu-lrn-pool",
    groups: int = 1, divide_alpha: bool = True, window: str = "torch", across: str = "channels",
    kernel_size: Size = 3, stride: Size | None = 2, padding: Size = 0, ceil_mode: bool = False,
) -> Tensor:  # fmt: skip
    """`ops.relu_lrn_max_pool2d` in plain torch: in half precision the steps between are kept in float32."""
    op = "relu_lrn_max_pool2d"
    check_floating(op, x)
    check_choice(op, "order", order, ORDERS)
    kernel, step_size, pad = pool_constants(op, x.shape, kernel_size, stride, padding, ceil_mode)
    y = x[None] if x.dim() == 3 else x
    lrn_constants(op, y.shape, size, alpha, groups, divide_alpha, window, across)
    y = y.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    for step in order.split("-"):
        if step == "relu":
            y = F.relu(y)
        elif step == "lrn":
            y = local_response_norm(
                y, size, alpha, beta, k, groups=groups, divide_alpha=divide_alpha, window=window, across=across
            )
        else:
            y = F.max_pool2d(y, kernel, step_size, pad, 1, ceil_mode)
    return (y[0] if x.dim() == 3 else y).to(x.dtype)


def conv_geometry(op: str, stride: Size, padding: Size | str) -> tuple[tuple[int, int], tuple[int, int] | str]:
    """(height, width) of stride and padding after checking them; a padding of "same" stays what it is."""
    if isinstance(padding, str):
        check_choice(op, "padding", padding, ("same", "valid"))
    pad = padding if padding == "same" else pair(op, "padding", 0 if padding == "valid" else padding, 0)
    return pair(op, "stride", stride, 1), pad


def check_conv2d(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int] | str, groups: int
) -> None:
    check_tensor(op, x)
    check_image(op, x.shape)
    if 0 in x.shape[-2:] and all(x.shape[:-3]):
        raise ArgumentError(f"{op}: expected x to have height and width, got shape {tuple(x.shape)}")
    channels = x.shape[-3]
    if not isinstance(groups, int) or groups < 1 or channels % groups:
        raise ArgumentError(f"{op}: expected groups to divide the {channels} channels of x, got {groups!r}")
    if weight.dim() != 4 or weight.shape[1] != channels // groups or weight.shape[0] % groups:
        filters = "filters" if groups == 1 else f"a multiple of {groups} filters"
        expected = f"({filters}, {channels // groups}, height, width)"
        raise ArgumentError(f"{op}: expected weight to be {expected}, got shape {tuple(weight.shape)}")
    for name, other in (("weight", weight), ("bias", bias)) if x.dtype != torch.bool else ():  # torch refuses bool
        if other is not None and (other.dtype != x.dtype or other.device != x.device):
            expected = f"{x.dtype} on {x.device} as x is"
            raise ArgumentError(f"{op}: expected {name} to be {expected}, got {other.dtype} on {other.device}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ArgumentError(f"{op}: expected bias to have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if padding != "same" and any(x.shape[d] + 2 * int(padding[d]) < weight.shape[d] for d in (-2, -1)):
        window = f"the {weight.shape[-2]}x{weight.shape[-1]} weight after padding {padding}"
        raise ArgumentError(f"{op}: expected x to be at least as large as {window}, got {x.shape[-2]}x{x.shape[-1]}")


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 4, padding: Size | str = 0,
    ceil_mode: bool = False, *, groups: int = 1, relu: bool = False,
) -> Tensor:  # fmt: skip
    """`ops.conv2d` in plain torch."""
    step, pad = conv_geometry("conv2d", stride, padding)
    check_conv2d("conv2d", x, weight, bias, pad, groups)
    if ceil_mode and not isinstance(pad, str):  # zeros that let the last window hang over the right and bottom edge
        over = [-(x.shape[d] + 2 * pad[d] - weight.shape[d]) % step[d] for d in (-2, -1)]
        x = F.pad(x, (0, over[1], 0, over[0]))
    y = F.conv2d(x, weight, bias, step, pad, groups=groups)
    return y.relu_() if relu else y


def conv2d_relu_lrn_max_pool2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0,
    *, stride: Size = 4, padding: Size | str = 0, ceil_mode: bool = False, order: str = "relu-lrn-pool",
    groups: int = 1, divide_alpha: bool = True, window: str = "torch", across: str = "channels",
    pool_kernel_size: Size = 3, pool_stride: Size | None = 2, pool_padding: Size = 0, pool_ceil_mode: bool = False,
) -> Tensor:  # fmt: skip
    """`ops.conv2d_relu_lrn_max_pool2d` in plain torch."""
    y = conv2d(x, weight, bias, stride, padding, ceil_mode)
    return relu_lrn_max_pool2d(
        y, size, alpha, beta, k, order=order, groups=groups, divide_alpha=divide_alpha, window=window, across=across,
        kernel_size=pool_kernel_size, stride=pool_stride, padding=pool_padding, ceil_mode=pool_ceil_mode,
    )  # fmt: skip
