"""Every op of `alexnet_cuda.ops` in plain torch: the specification, and what runs where no kernel does.

Signatures, defaults and results are those of `ops`; works on any device, is differentiable any number of times.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

Size = int | tuple[int, int]
ORDERS = ("relu-lrn-pool", "relu-pool-lrn", "lrn-pool-relu")


def check_choice(op: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: expected {name} to be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_floating(op: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected x to be a Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: expected x to have a floating-point dtype, got {x.dtype}")


def check_image(op: str, shape: Sequence[int]) -> None:
    if len(shape) not in (3, 4):
        raise ValueError(f"{op}: expected x to be 4-D (N, C, H, W) or 3-D (C, H, W), got {len(shape)}-D")
    if 0 in shape[-3:]:
        raise ValueError(f"{op}: expected x to have channels, height and width, got shape {tuple(shape)}")


def lrn_constants(
    op: str, shape: Sequence[int], size: int, alpha: float, groups: int, divide_alpha: bool, window: str, across: str
) -> tuple[int, float]:
    """(elements before the centre, factor of the sum of squares) after checking the arguments."""
    check_choice(op, "window", window, ("torch", "onnx"))
    check_choice(op, "across", across, ("channels", "spatial"))
    if len(shape) < 3 or (across == "spatial" and len(shape) != 4):
        expected = "4-D (N, C, H, W)" if across == "spatial" else "3-D (N, C, ...) or larger"
        raise ValueError(f"{op}: expected x to be {expected}, got {len(shape)}-D")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{op}: expected size to be a positive integer, got {size!r}")
    if not isinstance(groups, int) or groups < 1 or shape[1] % groups:
        raise ValueError(f"{op}: expected groups to divide the {shape[1]} channels of x, got {groups!r}")
    front = size // 2 if window == "torch" else (size - 1) // 2
    elements = size if across == "channels" else size * size
    return front, float(alpha) / elements if divide_alpha else float(alpha)


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
    check_floating("local_response_norm", x)
    front, scale = lrn_constants("local_response_norm", x.shape, size, alpha, groups, divide_alpha, window, across)
    wide = x if x.dtype == torch.float64 else x.float()
    squares = wide * wide
    if across == "channels":
        n, c = x.shape[:2]
        split = squares.reshape(n, groups, c // groups, math.prod(x.shape[2:]))
        total = window_sums(split, 2, size, front).reshape(x.shape)
    else:
        total = window_sums(window_sums(squares, 2, size, front), 3, size, front)
    return (wide / (k + scale * total) ** beta).to(x.dtype)


def pool_constants(
    op: str, shape: Sequence[int], kernel_size: Size, stride: Size | None, padding: Size
) -> list[tuple[int, int]]:
    """(height, width) of kernel, stride and padding after checking them."""
    check_image(op, shape)
    pairs = []
    for name, value in (("kernel_size", kernel_size), ("stride", stride), ("padding", padding)):
        if name == "stride" and value is None:
            value = kernel_size
        pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
        least = 0 if name == "padding" else 1
        if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
            raise ValueError(f"{op}: expected {name} to be one or two integers of at least {least}, got {value!r}")
        pairs.append(pair)
    for d in (0, 1):
        kernel, pad = pairs[0][d], pairs[2][d]
        if 2 * pad > kernel:
            raise ValueError(f"{op}: expected padding to be at most half of kernel_size {kernel_size}, got {padding}")
        if shape[d - 2] + 2 * pad < kernel:
            window = f"kernel_size {kernel_size} after padding {padding}"
            raise ValueError(f"{op}: expected x to be at least as large as {window}, got {shape[-2]}x{shape[-1]}")
    return pairs


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
    kernel, step, pad = pool_constants("max_pool2d", x.shape, kernel_size, stride, padding)
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
    kernel, step_size, pad = pool_constants(op, x.shape, kernel_size, stride, padding)
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


def check_conv2d(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, groups: int
) -> None:
    check_floating(op, x)
    check_image(op, x.shape)
    channels = x.shape[-3]
    if not isinstance(groups, int) or groups < 1 or channels % groups:
        raise ValueError(f"{op}: expected groups to divide the {channels} channels of x, got {groups!r}")
    if weight.dim() != 4 or weight.shape[1] != channels // groups or weight.shape[0] % groups:
        filters = "filters" if groups == 1 else f"a multiple of {groups} filters"
        expected = f"({filters}, {channels // groups}, height, width)"
        raise ValueError(f"{op}: expected weight to be {expected}, got shape {tuple(weight.shape)}")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and (other.dtype != x.dtype or other.device != x.device):
            expected = f"{x.dtype} on {x.device} as x is"
            raise ValueError(f"{op}: expected {name} to be {expected}, got {other.dtype} on {other.device}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: expected bias to have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if not isinstance(stride, int) or stride < 1:
        raise ValueError(f"{op}: expected stride to be a positive integer, got {stride!r}")
    if not isinstance(padding, int) or padding < 0:
        raise ValueError(f"{op}: expected padding to be a non-negative integer, got {padding!r}")
    if any(x.shape[d] + 2 * padding < weight.shape[d] for d in (-2, -1)):
        window = f"the {weight.shape[-2]}x{weight.shape[-1]} weight after padding {padding}"
        raise ValueError(f"{op}: expected x to be at least as large as {window}, got {x.shape[-2]}x{x.shape[-1]}")


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 4, padding: int = 0, ceil_mode: bool = False,
    *, groups: int = 1, relu: bool = False,
) -> Tensor:  # fmt: skip
    """`ops.conv2d` in plain torch."""
    check_conv2d("conv2d", x, weight, bias, stride, padding, groups)
    if ceil_mode:  # zeros that let the last window hang over the right and bottom edge
        over = [-(size + 2 * padding - kernel) % stride for size, kernel in zip(x.shape[-2:], weight.shape[-2:])]
        x = F.pad(x, (0, over[1], 0, over[0]))
    y = F.conv2d(x, weight, bias, stride, padding, groups=groups)
    return y.relu_() if relu else y


def conv2d_relu_lrn_max_pool2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0,
    *, stride: int = 4, padding: int = 0, ceil_mode: bool = False, order: str = "relu-lrn-pool",
    groups: int = 1, divide_alpha: bool = True, window: str = "torch", across: str = "channels",
    pool_kernel_size: Size = 3, pool_stride: Size | None = 2, pool_padding: Size = 0, pool_ceil_mode: bool = False,
) -> Tensor:  # fmt: skip
    """`ops.conv2d_relu_lrn_max_pool2d` in plain torch."""
    y = conv2d(x, weight, bias, stride, padding, ceil_mode)
    return relu_lrn_max_pool2d(
        y, size, alpha, beta, k, order=order, groups=groups, divide_alpha=divide_alpha, window=window, across=across,
        kernel_size=pool_kernel_size, stride=pool_stride, padding=pool_padding, ceil_mode=pool_ceil_mode,
    )  # fmt: skip
