"""This package's operators as ONNX nodes, for `torch.onnx.export(..., custom_translation_table=table())`.

docs/export.md lists the nodes of each operator. The arguments are those of the schemas in csrc/ops.cpp. No translation
depends on batch, height or width, so all three may be dynamic. An LRN over an even number of channels is composed of
other nodes, because ONNX Runtime's LRN takes odd sizes only.
"""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18
from onnxscript.ir import DataType

from .._library import KERNEL_DTYPES
from ..reference import ORDERS

onnx: Any = opset18


def table() -> dict[Any, Callable]:
    """The translation of each operator; empty without the compiled library, which defines the operators."""
    if not KERNEL_DTYPES:
        return {}
    translations = conv2d, linear, local_response_norm, max_pool2d, relu_lrn_max_pool2d, conv2d_relu_lrn_max_pool2d
    return {getattr(torch.ops.alexnet_cuda, function.__name__).default: function for function in translations}


def conv2d(x, weight, bias, stride: int, padding: int, groups: int, ceil_mode: bool, relu: bool):
    end = padding + (stride - 1 if ceil_mode else 0)  # these zeros make rounding down give the result of rounding up
    y = onnx.Conv(x, weight, bias, group=groups, strides=[stride, stride], pads=[padding, padding, end, end])
    return onnx.Relu(y) if relu else y


def linear(x, weight, bias, relu: bool):
    y = onnx.Gemm(x, weight, bias, transB=1)
    return onnx.Relu(y) if relu else y


def local_response_norm(x, size: int, front: int, alpha: float, beta: float, k: float, groups: int, spatial: bool):
    return _lrn(x, x, x.shape[1], (size, front, alpha, beta, k, groups), spatial)


def max_pool2d(x, kernel_size: int, stride: int, padding: int, ceil_mode: bool, save_code: bool):
    return _pool(x, kernel_size, stride, padding, ceil_mode), onnx.Identity(x)  # the code serves backward only: unused


def relu_lrn_max_pool2d(
    x, order: int, size: int, front: int, alpha: float, beta: float, k: float, groups: int,
    kernel_size: int, stride: int, padding: int, ceil_mode: bool, save_code: bool,
):  # fmt: skip
    lrn, window = (size, front, alpha, beta, k, groups), (kernel_size, stride, padding, ceil_mode)
    return _tail(x, x, x.shape[1], order, lrn, window), onnx.Identity(x)


def conv2d_relu_lrn_max_pool2d(
    x, weight, bias, conv_stride: int, conv_padding: int, conv_ceil_mode: bool, order: int, size: int, front: int,
    alpha: float, beta: float, k: float, groups: int, kernel_size: int, stride: int, padding: int, ceil_mode: bool,
    save: bool,
):  # fmt: skip
    lrn, window = (size, front, alpha, beta, k, groups), (kernel_size, stride, padding, ceil_mode)
    y = conv2d(x, weight, bias, conv_stride, conv_padding, 1, conv_ceil_mode, relu=False)
    return _tail(y, x, weight.shape[0], order, lrn, window), onnx.Identity(y), onnx.Identity(y)


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
    """Local response normalisation of y, an intermediate result computed from x; only x has a known dtype."""
    size, front, alpha, beta, k, groups = constants
    half = x.dtype in (DataType.FLOAT16, DataType.BFLOAT16)
    if half:  # the operator sums in float32
        y = onnx.Cast(y, to=DataType.FLOAT)
    back = size - 1 - front
    if groups > 1:  # groups become part of the batch: (N, C, H, W) to (N * groups, C / groups, H, W)
        y = onnx.Reshape(y, onnx.Constant(value_ints=[-1, channels // groups, 0, 0]))
    if spatial:
        mean = _mean(onnx.Mul(y, y), (size, size), (front, front, back, back))
        y = _divide(y, mean, alpha * size**2, beta, k)
    elif size % 2:
        y = onnx.LRN(y, size=size, alpha=alpha * size, beta=beta, bias=k)
    else:  # average pooling over (N, 1, C, H * W), whose rows are the channels
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
    if ceil_mode and padding + stride <= kernel_size:  # no window would start beyond the edge: padding rounds up, too
        end, ceil_mode = padding + stride - 1, False
    pooled, _ = onnx.MaxPool(
        x, kernel_shape=(kernel_size,) * 2, strides=(stride,) * 2, pads=(padding, padding, end, end),
        ceil_mode=int(ceil_mode),
    )  # fmt: skip
    return pooled
