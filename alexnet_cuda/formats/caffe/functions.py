"""What Caffe's layers without parameters compute, where torch has no module for it."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOWEST = -3.4028234663852886e38  # the lowest float32, which Caffe's maxima start from
TINY = 1.1754943508222875e-38  # the smallest normal float32


def aligned(weight: Tensor, x: Tensor, axis: int) -> Tensor:
    """`weight`, whose dimensions are those of x from `axis` on, in a shape that broadcasts."""
    behind = x.dim() - axis % x.dim() - weight.dim()
    return weight.reshape(*weight.shape, *(1,) * behind)


def multiply(x: Tensor, weight: Tensor, axis: int) -> Tensor:
    return x * aligned(weight, x, axis)


def add(x: Tensor, bias: Tensor, axis: int) -> Tensor:
    return x + aligned(bias, x, axis)


def global_pool(x: Tensor, method: str) -> Tensor:
    """(N, C, H, W) to (N, C, 1, 1)."""
    if method == "max":
        return x.amax((2, 3), keepdim=True)
    if method == "average":
        return x.mean((2, 3), keepdim=True)
    return (x * x).sum((2, 3), keepdim=True) / (x.sum((2, 3), keepdim=True) + TINY)


def pool(
    x: Tensor, method: str, kernel: tuple[int, int], stride: tuple[int, int], pad: tuple[int, int], ceil: bool
) -> Tensor:
    """Caffe's pooling in the cases that torch's does not have.

    A window may begin beyond the edge, where the maximum is the lowest number. Stochastic pooling is its expected
    value, as in Caffe's tests: the mean of x, weighted by x itself.
    """
    edges: list[int] = []
    for size, k, s, p in zip(x.shape[2:], kernel, stride, pad):
        count = (size + 2 * p - k + (s - 1 if ceil else 0)) // s + 1
        if any(pad) and (count - 1) * s >= size + p:
            count -= 1
        edges = [p, (count - 1) * s + k - size - p, *edges]
    if method == "max":
        return F.max_pool2d(F.pad(x, edges, value=LOWEST), kernel, stride)
    if method == "stochastic":
        x = F.pad(x, edges)
        area = math.prod(kernel)
        squares, sums = F.avg_pool2d(x * x, kernel, stride) * area, F.avg_pool2d(x, kernel, stride) * area
        return squares / (sums + TINY)
    inside = [min(end, p) for end, p in zip(edges[1::2], reversed(pad))]  # the divisor counts the padding of `pad` only
    counted = F.pad(torch.ones_like(x[:1, :1]), [edges[0], inside[0], edges[2], inside[1]], value=1.0)
    counted = F.pad(counted, [0, edges[1] - inside[0], 0, edges[3] - inside[1]])
    return F.avg_pool2d(F.pad(x, edges), kernel, stride) / F.avg_pool2d(counted, kernel, stride)


def concat(*x: Tensor, axis: int) -> Tensor:
    return torch.cat(x, axis)


def split(x: Tensor, count: int) -> tuple[Tensor, ...] | Tensor:
    return (x,) * count if count > 1 else x


def slices(x: Tensor, axis: int, points: tuple[int, ...], count: int) -> tuple[Tensor, ...]:
    """x cut before each of `points`, or into `count` equal parts."""
    size = x.shape[axis]
    if not points and size % count:
        raise ValueError(f"{size} channels cannot be cut into {count} equal parts")
    ends = [*points, size] if points else [size // count * (i + 1) for i in range(count)]
    lengths = [end - start for start, end in zip([0, *ends], ends)]
    if len(lengths) != count or min(lengths) <= 0:
        raise ValueError(f"slice_point {points} does not cut {size} channels into {count} parts")
    return torch.split(x, lengths, axis)


def product(*x: Tensor) -> Tensor:
    return functools.reduce(torch.mul, x)


def total(*x: Tensor, coefficients: tuple[float, ...] = ()) -> Tensor:
    terms = [c * t if c != 1 else t for c, t in zip(coefficients, x)] if coefficients else list(x)
    return functools.reduce(torch.add, terms)


def maximum(*x: Tensor) -> Tensor:
    return functools.reduce(torch.maximum, x)


def reshape(x: Tensor, dims: tuple[int, ...], axis: int, num_axes: int) -> Tensor:
    """The dimensions [axis, axis + num_axes) of x become `dims`: 0 copies the dimension there, -1 is what remains."""
    start = axis if axis >= 0 else x.dim() + axis + 1
    end = x.dim() if num_axes == -1 else start + num_axes
    new = [x.shape[start + i] if dim == 0 else dim for i, dim in enumerate(dims)]
    return x.reshape(*x.shape[:start], *new, *x.shape[end:])


def crop(x: Tensor, reference: Tensor, axis: int, offsets: tuple[int, ...]) -> Tensor:
    """x cut to the sizes of `reference` from the dimension `axis` on, beginning at `offsets` (one number: all)."""
    dims = range(axis % x.dim(), x.dim())
    if len(offsets) > 1 and len(offsets) != len(dims):
        raise ValueError(f"expected one offset or {len(dims)}, got {offsets}")
    for i, dim in enumerate(dims):
        start = offsets[i if len(offsets) > 1 else 0] if offsets else 0
        if start + reference.shape[dim] > x.shape[dim]:
            size = f"{reference.shape[dim]} from {start} on"
            raise ValueError(f"cannot crop dimension {dim} of {tuple(x.shape)} to {size}")
        x = x.narrow(dim, start, reference.shape[dim])
    return x


def power(x: Tensor, exponent: float, scale: float, shift: float) -> Tensor:
    y = x * scale + shift
    return y if exponent == 1 else y**exponent


def exp(x: Tensor, base: float, scale: float, shift: float) -> Tensor:
    """base ** (shift + scale * x); a base of -1 is e."""
    y = x * scale + shift
    return y.exp() if base == -1 else base**y


def log(x: Tensor, base: float, scale: float, shift: float) -> Tensor:
    """The logarithm of shift + scale * x; a base of -1 is e."""
    y = (x * scale + shift).log()
    return y if base == -1 else y / math.log(base)


def threshold(x: Tensor, value: float) -> Tensor:
    return (x > value).to(x.dtype)


def swish(x: Tensor, beta: float) -> Tensor:
    return x * (x * beta).sigmoid()


def tile(x: Tensor, axis: int, count: int) -> Tensor:
    """`count` copies of x, one behind the other in the dimension `axis`."""
    return torch.cat([x] * count, axis)


def argmax(x: Tensor, count: int, values: bool, axis: int | None) -> Tensor:
    """Positions of the `count` largest numbers of each image as floats, (N, 1, count, 1); with `values` (N, 2, count,
    1), the numbers behind them. With an axis, positions or numbers along that dimension."""
    top = x.flatten(1).topk(count) if axis is None else x.topk(count, axis)
    if axis is not None:
        return top.values if values else top.indices.to(x.dtype)
    both = torch.stack([top.indices.to(x.dtype), top.values][: 1 + values], 1)
    return both.reshape(*both.shape, *(1,) * (x.dim() - 3))


def reduction(x: Tensor, operation: str, axis: int, coefficient: float) -> Tensor:
    """The dimensions of x from `axis` on as one number: coefficient times their sum, sum of absolute values, sum of
    squares or mean."""
    y = {"asum": x.abs, "sumsq": x.square}.get(operation, lambda: x)().flatten(axis)
    return coefficient * (y.mean(-1) if operation == "mean" else y.sum(-1))


def mvn(x: Tensor, variance: bool, across: bool, eps: float) -> Tensor:
    """x minus its mean and, with `variance`, divided by its standard deviation plus eps, for each image and channel."""
    dims = tuple(range(1 if across else 2, x.dim()))
    y = x - x.mean(dims, keepdim=True)
    return y / ((y * y).mean(dims, keepdim=True).sqrt() + eps) if variance else y
