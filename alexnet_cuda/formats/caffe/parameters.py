"""The parameters of Caffe's layers: taken from the blobs of a weights file, or drawn as the layer's fillers say."""

from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .layers import BatchNorm


def targets(module: nn.Module) -> list[str]:
    """The module's tensors in the order of Caffe's blobs."""
    if isinstance(module, BatchNorm):
        return ["running_mean", "running_var", "factor"] + ["weight", "bias"] * module.affine
    return [name for name in ("weight", "bias") if getattr(module, name, None) is not None]


@torch.no_grad()
def load(module: nn.Module, blobs: list[np.ndarray], transpose: bool = False) -> None:
    """Copies a layer's blobs into its module, the weight of a linear layer after transposing it. Raises ValueError if
    their number or a shape differs."""
    names = targets(module)
    if len(blobs) != len(names):
        raise ValueError(f"expected {len(names)} blobs ({', '.join(names)}), the weights file has {len(blobs)}")
    values = dict(zip(names, blobs))
    if isinstance(module, BatchNorm):
        factor = values.pop("factor").reshape(-1)[0]
        for name in ("running_mean", "running_var"):
            values[name] = values[name] * np.float32(0 if factor == 0 else 1 / factor)
        if module.num_batches_tracked is not None:
            module.num_batches_tracked.zero_()
        if module.running_mean is None:
            values = {name: values[name] for name in values if not name.startswith("running")}
    if transpose:
        values["weight"] = values["weight"].reshape(values["weight"].shape[-2:]).T
    for name, value in values.items():
        own = getattr(module, name)
        extra = value.ndim - own.dim()  # old files store four dimensions, such as (1, 1, 4096, 9216) for a linear layer
        shape = value.shape[extra:] if extra > 0 and prod(value.shape[:extra]) == 1 else value.shape
        if shape != own.shape and not (value.size == own.numel() == 1):
            raise ValueError(f"expected {name} to be {tuple(own.shape)}, the weights file has {value.shape}")
        own.copy_(torch.from_numpy(np.ascontiguousarray(value, np.float32)).reshape(own.shape))


def is_fixed(message: Any) -> bool:
    """Whether a layer needs no blobs, since nothing in it is learned: upsampling with bilinear weights."""
    return message.type == "Deconvolution" and message.convolution_param.weight_filler.type == "bilinear"


@torch.no_grad()
def draw(module: nn.Module, message: Any) -> None:
    """Starts a layer that has no blobs: as its fillers say, or as torch does where there are none."""
    if reset := getattr(module, "reset_parameters", None):
        reset()
    for parameters in (message.convolution_param, message.inner_product_param):
        for name in ("weight", "bias"):
            if parameters.HasField(f"{name}_filler") and getattr(module, name, None) is not None:
                fill(getattr(module, name), getattr(parameters, f"{name}_filler"))
    for parameters, name, field in (
        (message.scale_param, "weight", "filler"), (message.scale_param, "bias", "bias_filler"),
        (message.bias_param, "bias", "filler"), (message.prelu_param, "weight", "filler"),
    ):  # fmt: skip
        if parameters.HasField(field) and getattr(module, name, None) is not None:
            fill(getattr(module, name), getattr(parameters, field))


def fill(tensor: Tensor, filler: Any) -> None:
    """Caffe's fillers. Raises ValueError for one that is unknown."""
    fan_in, fan_out = tensor[0].numel(), tensor.numel() // (tensor.shape[1] if tensor.dim() > 1 else 1)
    fan = (fan_in, fan_out, (fan_in + fan_out) / 2)[filler.variance_norm]
    if filler.type == "constant":
        tensor.fill_(filler.value)
    elif filler.type == "gaussian":
        tensor.normal_(filler.mean, filler.std)
    elif filler.type == "uniform":
        tensor.uniform_(filler.min, filler.max)
    elif filler.type == "xavier":
        bound = (3 / fan) ** 0.5
        tensor.uniform_(-bound, bound)
    elif filler.type == "msra":
        tensor.normal_(0, (2 / fan) ** 0.5)
    elif filler.type == "positive_unitball":
        tensor.uniform_(0, 1)
        tensor /= tensor.flatten(1).sum(1).reshape(-1, *(1,) * (tensor.dim() - 1))
    elif filler.type == "bilinear":
        size = tensor.shape[-1]
        factor = (size + 1) // 2
        ramp = 1 - (torch.arange(size) / factor - (2 * factor - 1 - factor % 2) / (2.0 * factor)).abs()
        tensor.copy_((ramp[:, None] * ramp).expand_as(tensor))
    else:
        raise ValueError(f"unknown filler {filler.type!r}")
