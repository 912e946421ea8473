"""The layers of Caffe as modules: what each type computes, made from its LayerParameter.

A module takes the layer's bottoms and returns its top, or a tuple of its tops. Sizes and defaults are those of
github.com/BVLC/caffe, src/caffe/layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...nn import LocalResponseNorm
from . import functions as f

Shape = tuple[int, ...]


@dataclass
class Spec:
    """What a layer is made from: its LayerParameter, the shapes of its bottoms (None: not known), its blobs in the
    weights file (None: there is no file), and whether it is part of the network that trains."""

    message: Any
    shapes: Sequence[Shape | None]
    blobs: Sequence[np.ndarray] | None
    training: bool

    def channels(self) -> int:
        """Channels of the first bottom."""
        if self.shapes[0] is None:
            raise ValueError("the shape of its input is not known: the Data layer does not give it")
        return self.shapes[0][1]


class Call(nn.Module):
    """A layer without parameters: a function of its bottoms."""

    def __init__(self, function: Callable, **arguments: Any) -> None:
        super().__init__()
        self.function = partial(function, **arguments) if arguments else function

    def forward(self, *bottoms: Tensor) -> Any:
        return self.function(*bottoms)

    def extra_repr(self) -> str:
        function = getattr(self.function, "func", self.function)
        arguments = getattr(self.function, "keywords", {})
        return ", ".join([function.__name__, *(f"{name}={value}" for name, value in arguments.items())])


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Caffe's BatchNorm, whose scale and shift are a layer of their own: (N, C, ...) to the same shape."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"BatchNorm: expected an input (N, C, ...), got shape {tuple(input.shape)}")


class Scale(nn.Module):
    """x * weight + bias, where both have the sizes of x from the dimension `axis` on; weight or bias may be None. A
    second bottom takes the place of the weight."""

    def __init__(self, shape: Shape, axis: int, weight: bool, bias: bool) -> None:
        super().__init__()
        self.axis = axis
        self.weight = nn.Parameter(torch.ones(shape)) if weight else None
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None

    def reset_parameters(self) -> None:
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        weight = self.weight if weight is None else weight
        y = x if weight is None else x * f.aligned(weight, x, self.axis)
        return y if self.bias is None else y + f.aligned(self.bias, x, self.axis)


def sizes(message: Any, name: str, default: int | None = None) -> tuple[int, int]:
    """(height, width) of a kernel, stride, padding or dilation: one number, two, or the fields name_h and name_w."""
    stem = name.removesuffix("_size")
    fields = message.DESCRIPTOR.fields_by_name
    if f"{stem}_h" in fields and (message.HasField(f"{stem}_h") or message.HasField(f"{stem}_w")):
        values = [getattr(message, f"{stem}_h"), getattr(message, f"{stem}_w")]
    else:
        values = getattr(message, name)
        values = ([values] if message.HasField(name) else []) if isinstance(values, int) else list(values)
    values = values or ([] if default is None else [default])
    if len(values) not in (1, 2) or (default != 0 and 0 in values):
        raise ValueError(f"{name} must be one positive number or two, got {values or 'nothing'}")
    return values[0], values[-1]


def convolution(spec: Spec) -> nn.Module:
    p = spec.message.convolution_param
    if p.axis != 1 or not p.num_output:
        raise ValueError(f"axis must be 1 and num_output positive, got {p.axis} and {p.num_output}")
    transposed = spec.message.type == "Deconvolution"
    if spec.shapes[0] is not None:
        channels = spec.channels()
    elif spec.blobs and spec.blobs[0].ndim == 4:
        channels = spec.blobs[0].shape[0] if transposed else spec.blobs[0].shape[1] * p.group
    else:
        channels = spec.channels()  # raises
    make = nn.ConvTranspose2d if transposed else nn.Conv2d
    return make(
        channels, p.num_output, sizes(p, "kernel_size"), sizes(p, "stride", 1), sizes(p, "pad", 0),
        dilation=sizes(p, "dilation", 1), groups=p.group, bias=p.bias_term,
    )  # fmt: skip


def inner_product(spec: Spec) -> nn.Module:
    """A linear layer; the network puts `flattening` before it."""
    p = spec.message.inner_product_param
    if not p.num_output:
        raise ValueError("num_output must be positive, got 0")
    if spec.shapes[0] is None and spec.blobs:
        units = spec.blobs[0].shape[-2 if p.transpose else -1]
    else:
        spec.channels()
        units = prod(spec.shapes[0][p.axis :])  # type: ignore[index]
    return nn.Linear(units, p.num_output, bias=p.bias_term)


def flattening(spec: Spec) -> nn.Module | None:
    """What makes a bottom of InnerProduct a matrix, where it isn't one."""
    axis = spec.message.inner_product_param.axis
    shape = spec.shapes[0]
    return nn.Flatten(axis) if shape is None or axis % len(shape) != len(shape) - 1 else None


def pooling(spec: Spec) -> nn.Module:
    p = spec.message.pooling_param
    method = ("max", "average", "stochastic")[p.pool]
    if len(spec.message.top) > 1:
        raise ValueError(f"expected one top, got {len(spec.message.top)}: positions of the maxima are not supported")
    if p.global_pooling:
        return Call(f.global_pool, method=method)
    kernel, stride, pad = sizes(p, "kernel_size"), sizes(p, "stride", 1), sizes(p, "pad", 0)
    if any(a >= b for a, b in zip(pad, kernel)):
        raise ValueError(f"the padding {pad} must be smaller than the kernel {kernel}")
    ceil = p.round_mode == 0
    # torch's rule for the last window is Caffe's, unless there is no padding and a stride beyond the kernel.
    same = any(pad) or not ceil or all(s <= k for s, k in zip(stride, kernel))
    if same and method != "stochastic" and all(2 * a <= b for a, b in zip(pad, kernel)):
        make = nn.MaxPool2d if method == "max" else nn.AvgPool2d
        return make(_one(kernel), _one(stride), _one(pad), ceil_mode=ceil)
    return Call(f.pool, method=method, kernel=kernel, stride=stride, pad=pad, ceil=ceil)


def _one(values: tuple[int, int]) -> Any:
    return values[0] if values[0] == values[1] else values


def lrn(spec: Spec) -> nn.Module:
    p = spec.message.lrn_param
    region = ("ACROSS_CHANNELS", "WITHIN_CHANNEL")[p.norm_region]
    alpha, beta, k = (_decimal(value) for value in (p.alpha, p.beta, p.k))
    return LocalResponseNorm.from_caffe(p.local_size, alpha, beta, region, k)


def _decimal(value: float) -> float:
    """The shortest decimal of a float32: 0.0001 where protobuf gives 9.999999747378752e-05."""
    return float(str(np.float32(value)))


def batch_norm(spec: Spec) -> nn.Module:
    p = spec.message.batch_norm_param
    channels = len(spec.blobs[0]) if spec.shapes[0] is None and spec.blobs else spec.channels()
    of_batch = p.HasField("use_global_stats") and not p.use_global_stats and not spec.training
    momentum = 1 - _decimal(p.moving_average_fraction)
    return BatchNorm(channels, _decimal(p.eps), momentum, affine=p.scale_bias, track_running_stats=not of_batch)


def scale(spec: Spec) -> nn.Module:
    bias_only = spec.message.type == "Bias"
    p = spec.message.bias_param if bias_only else spec.message.scale_param
    two = len(spec.message.bottom) > 1
    if two and (bias_only or not p.bias_term):
        return Call(f.add if bias_only else f.multiply, axis=p.axis)
    if spec.shapes[0] is None and spec.blobs:
        shape: Shape = spec.blobs[0].shape
    elif two and spec.shapes[1] is not None:
        shape = spec.shapes[1]
    else:
        spec.channels()
        full: Shape = spec.shapes[0]  # type: ignore[assignment]
        start = p.axis % len(full)
        shape = full[start:] if p.num_axes == -1 else full[start : start + p.num_axes]
    return Scale(shape, p.axis, weight=not bias_only and not two, bias=bias_only or p.bias_term)


def relu(spec: Spec) -> nn.Module:
    slope = spec.message.relu_param.negative_slope
    return nn.LeakyReLU(_decimal(slope)) if slope else nn.ReLU()


def prelu(spec: Spec) -> nn.Module:
    if spec.message.prelu_param.channel_shared:
        return nn.PReLU(1)
    return nn.PReLU(spec.blobs[0].size if spec.shapes[0] is None and spec.blobs else spec.channels())


def concat(spec: Spec) -> nn.Module:
    p = spec.message.concat_param
    return Call(f.concat, axis=p.concat_dim if p.HasField("concat_dim") else p.axis)


def slice_(spec: Spec) -> nn.Module:
    p = spec.message.slice_param
    axis = p.slice_dim if p.HasField("slice_dim") else p.axis
    return Call(f.slices, axis=axis, points=tuple(p.slice_point), count=len(spec.message.top))


def eltwise(spec: Spec) -> nn.Module:
    p = spec.message.eltwise_param
    if len(shapes := dict.fromkeys(shape for shape in spec.shapes if shape is not None)) > 1:
        raise ValueError(f"expected bottoms of one shape, got {' and '.join(map(str, shapes))}")
    coefficients = tuple(_decimal(c) for c in p.coeff)
    if coefficients and (p.operation != 1 or len(coefficients) != len(spec.message.bottom)):
        raise ValueError(f"coeff needs the operation SUM and one number for each bottom, got {coefficients}")
    return Call(
        (f.product, f.total, f.maximum)[p.operation], **({"coefficients": coefficients} if coefficients else {})
    )


def reshape(spec: Spec) -> nn.Module:
    p = spec.message.reshape_param
    return Call(f.reshape, dims=tuple(p.shape.dim), axis=p.axis, num_axes=p.num_axes)


def crop(spec: Spec) -> nn.Module:
    p = spec.message.crop_param
    return Call(f.crop, axis=p.axis, offsets=tuple(p.offset))


def flatten(spec: Spec) -> nn.Module:
    p = spec.message.flatten_param
    return nn.Flatten(p.axis, p.end_axis)


def power(spec: Spec) -> nn.Module:
    p = spec.message.power_param
    return Call(f.power, exponent=_decimal(p.power), scale=_decimal(p.scale), shift=_decimal(p.shift))


def exponential(spec: Spec) -> nn.Module:
    is_exp = spec.message.type == "Exp"
    p = spec.message.exp_param if is_exp else spec.message.log_param
    arguments = dict(base=_decimal(p.base), scale=_decimal(p.scale), shift=_decimal(p.shift))
    return Call(f.exp if is_exp else f.log, **arguments)


def reduction(spec: Spec) -> nn.Module:
    p = spec.message.reduction_param
    operation = {1: "sum", 2: "asum", 3: "sumsq", 4: "mean"}[p.operation]
    return Call(f.reduction, operation=operation, axis=p.axis, coefficient=_decimal(p.coeff))


def argmax(spec: Spec) -> nn.Module:
    p = spec.message.argmax_param
    axis = p.axis if p.HasField("axis") else None
    return Call(f.argmax, count=p.top_k, values=p.out_max_val, axis=axis)


def tile(spec: Spec) -> nn.Module:
    p = spec.message.tile_param
    return Call(f.tile, axis=p.axis, count=p.tiles)


def mvn(spec: Spec) -> nn.Module:
    p = spec.message.mvn_param
    return Call(f.mvn, variance=p.normalize_variance, across=p.across_channels, eps=_decimal(p.eps))


# Type -> how its module is made. docs/caffe.md lists them.
LAYERS: dict[str, Callable[[Spec], nn.Module]] = {
    "AbsVal": lambda spec: Call(torch.abs),
    "ArgMax": argmax,
    "BatchNorm": batch_norm,
    "Bias": scale,
    "BNLL": lambda spec: nn.Softplus(),
    "Clip": lambda spec: nn.Hardtanh(spec.message.clip_param.min, spec.message.clip_param.max),
    "Concat": concat,
    "Convolution": convolution,
    "Crop": crop,
    "Deconvolution": convolution,
    "Dropout": lambda spec: nn.Dropout(_decimal(spec.message.dropout_param.dropout_ratio)),
    "Eltwise": eltwise,
    "ELU": lambda spec: nn.ELU(_decimal(spec.message.elu_param.alpha)),
    "Exp": exponential,
    "Flatten": flatten,
    "InnerProduct": inner_product,
    "Log": exponential,
    "LRN": lrn,
    "MVN": mvn,
    "Pooling": pooling,
    "Power": power,
    "PReLU": prelu,
    "Reduction": reduction,
    "ReLU": relu,
    "Reshape": reshape,
    "Scale": scale,
    "Sigmoid": lambda spec: nn.Sigmoid(),
    "Slice": slice_,
    "Softmax": lambda spec: nn.Softmax(spec.message.softmax_param.axis),
    "Split": lambda spec: Call(f.split, count=len(spec.message.top)),
    "Swish": lambda spec: Call(f.swish, beta=_decimal(spec.message.swish_param.beta)),
    "TanH": lambda spec: nn.Tanh(),
    "Threshold": lambda spec: Call(f.threshold, value=_decimal(spec.message.threshold_param.threshold)),
    "Tile": tile,
}
# How many bottoms the types take that do not take exactly one.
BOTTOMS = {"Bias": (1, 2), "Concat": range(1, 10**6), "Crop": (2,), "Eltwise": range(2, 10**6), "Scale": (1, 2)}
# Layers that give the network its input.
INPUTS = ("Input", "Data", "ImageData", "MemoryData", "HDF5Data", "WindowData", "DummyData")
# Layers that compare scores with labels, or write a file: they compute nothing that others take.
LEFT_OUT = (
    "Accuracy", "ContrastiveLoss", "EuclideanLoss", "HDF5Output", "HingeLoss", "InfogainLoss",
    "MultinomialLogisticLoss", "SigmoidCrossEntropyLoss", "SoftmaxWithLoss", "Silence",
)  # fmt: skip
