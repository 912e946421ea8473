"""Our operators as ONNX's, for `torch.onnx.export(..., custom_translation_table=onnx_translations.table())`.

docs/export.md shows what each becomes. The arguments are those of csrc/ops.cpp. No translation needs to know batch,
height or width, so all of them may be dynamic. Even windows are written out, as ONNX Runtime's LRN takes odd ones only.
"""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18
from onnxscript.ir import DataType

from ._library import KERNEL_DTYPES
from .reference import ORDERS

onnx: Any = opset18


def table() -> dict[Any, Callable]:
    """Translations by operator.

    Without the compiled library there are no such operators and the table is empty: networks then consist of the plain
    torch operations in their place.
    """
    if not KERNEL_DTYPES:
        return {}
    op = torch.ops.alexnet_cuda
    return {
        op.conv2d.default: conv2d,
        op.local_response_norm.default: local_response_norm,
        op.max_pool2d.default: max_pool2d,
        op.relu_lrn_max_pool2d.default: relu_lrn_max_pool2d,
        op.conv2d_relu_lrn_max_pool2d.default: conv2d_relu_lrn_max_pool2d,
    }


def conv2d(x, weight, bias, stride: int, padding: int, ceil_mode: bool):
    end = padding + (stride - 1 if ceil_mode else 0)  # more zeros turn rounding down into rounding up
    return onnx.Conv(x, weight, bias, strides=[stride, stride], pads=[padding, padding, end, end])


def local_response_norm(x, size: int, front: int, alpha: float, beta: float, k: float, groups: int, spatial: bool):
    return _lrn(x, x, x.shape[1], (size, front, alpha, beta, k, groups), spatial)


def max_pool2d(x, kernel_size: int, stride: int, padding: int, ceil_mode: bool, save_code: bool):
    return _pool(x, kernel_size, stride, padding, ceil_mode), onnx.Identity(x)  # backward needs the code, ONNX has none


def relu_lrn_max_pool2d(
    x, order: int, size: int, front: int, alpha: float, beta: float, k: float, groups: int,
    kernel_size: int, stride: int, padding: int, ceil_mode: bool, save_code: bool,
):  # fmt: skip
    lrn, window = (size, front, alpha, beta, k, groups), (kernel_size, stride, padding, ceil_mode)
    return _tail(x, x, x.shape[1], order, lrn, window), onnx.Identity(x)


def conv2d_relu_lrn_max_pool2d(
    x, weight, bias, conv_stride: int, conv_padding: int, conv_ceil_mode: bool, order: int, size: int, front: int,
    alpha: float, beta: float, k: float, groups: int, kernel_size: int, stride: int, padding: int, ceil_mode: bool,
    save: bool, wgmma: bool,
):  # fmt: skip
    lrn, window = (size, front, alpha, beta, k, groups), (kernel_size, stride, padding, ceil_mode)
    a = conv2d(x, weight, bias, conv_stride, conv_padding, conv_ceil_mode)
    return _tail(a, x, weight.shape[0], order, lrn, window), onnx.Identity(a), onnx.Identity(a)


def _tail(y, x, channels: int, order: int, lrn: tuple, window: tuple):
    for step in ORDERS[order].split("-"):
        if step == "relu":
            y = onnx.Relu(y)
        elif step == "lrn":
            y = _lrn(y, x, channels, lrn, False)
        else:
            y = _pool(y, *window)
    return y


def _lrn(y, x, channels: int, constants: tuple, spatial: bool):
    """Normalises y, a step on the way from x, whose dtype is known."""
    size, front, alpha, beta, k, groups = constants
    half = x.dtype in (DataType.FLOAT16, DataType.BFLOAT16)
    if half:  # our sums are in float32
        y = onnx.Cast(y, to=DataType.FLOAT)
    back = size - 1 - front
    if groups > 1:  # they become one more factor of the batch
        y = onnx.Reshape(y, onnx.Constant(value_ints=[-1, channels // groups, 0, 0]))
    if spatial:
        mean = _mean(onnx.Mul(y, y), (size, size), (front, front, back, back))
        y = _divide(y, mean, alpha * size**2, beta, k)
    elif size % 2:
        y = onnx.LRN(y, size=size, alpha=alpha * size, beta=beta, bias=k)
    else:  # the channels become the height of one plane, with the pixels as its columns
        plane = onnx.Reshape(onnx.Mul(y, y), onnx.Constant(value_ints=[0, 1, channels // groups, -1]))
        mean = onnx.Reshape(_mean(plane, (size, 1), (front, 0, back, 0)), onnx.Shape(y))
        y = _divide(y, mean, alpha * size, beta, k)
    if groups > 1:
        y = onnx.Reshape(y, onnx.Constant(value_ints=[-1, channels, 0, 0]))
    return onnx.Cast(y, to=x.dtype) if half else y


def _mean(x, window: tuple[int, int], pads: tuple[int, int, int, int]):
    return onnx.AveragePool(x, kernel_shape=window, pads=pads, count_include_pad=1)


def _divide(x, mean, alpha: float, beta: float, k: float):
    return onnx.Div(x, onnx.Pow(onnx.Add(onnx.Mul(mean, alpha), k), beta))


def _pool(x, kernel_size: int, stride: int, padding: int, ceil_mode: bool):
    end = padding
    if ceil_mode and padding + stride <= kernel_size:  # as in conv2d: here no window would start beyond the edge
        end, ceil_mode = padding + stride - 1, False
    pooled, _ = onnx.MaxPool(
        x, kernel_shape=(kernel_size,) * 2, strides=(stride,) * 2, pads=(padding, padding, end, end),
        ceil_mode=int(ceil_mode),
    )  # fmt: skip
    return pooled
