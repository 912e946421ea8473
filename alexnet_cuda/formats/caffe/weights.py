"""Weights trained with Caffe (bvlc_alexnet, bvlc_reference_caffenet) for the variants `caffe` and `caffenet`."""

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ...model import AlexNet
from ...summary import layer_names
from .files import read_caffemodel

# The input of Caffe's networks: BGR images, pixels 0..255 minus this mean.
MEAN_BGR = (104.0, 117.0, 123.0)

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")

Blobs = Mapping[str, Sequence[Any]]


def load_caffe(model: AlexNet, source: Blobs | str | PathLike[str]) -> AlexNet:
    """Copies Caffe's weights into `model` and returns it.

    The model takes RGB where Caffe's network takes BGR. The input that reproduces Caffe's scores: pixels 0..255 minus
    `MEAN_BGR` reversed, for AlexNet(..., input="pixels"). With input="normalized", images normalised with ImageNet's
    mean and standard deviation reach the first layer within 2 % of that scale.

    Args:
        model: a network of the variant "caffe" or "caffenet" (the shapes of "paper" are the same).
        source: see `state_dict_from_caffe`.

    Raises: what `state_dict_from_caffe` raises; ValueError if a shape differs from the model's.
    """
    modules = {layer: name for name, layer in layer_names(model).items()}
    layers = [layer for layer in modules if layer.startswith(("conv", "fc"))]
    if layers != list(LAYERS):
        raise ValueError(f"load_caffe: expected five convolutions and three linear layers in the model, got {layers}")
    state = state_dict_from_caffe(source, [modules[layer] for layer in LAYERS])
    own = model.state_dict()
    for name, tensor in state.items():
        if own[name].shape != tensor.shape:
            expected = f"expected {name} to be {tuple(own[name].shape)} as in the model"
            raise ValueError(f"load_caffe: {expected}, got {tuple(tensor.shape)}")
    model.load_state_dict(state)
    return model


def state_dict_from_caffe(source: Blobs | str | PathLike[str], names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Caffe's weights under the parameter names of the variants "caffe" and "caffenet".

    The input channels of conv1 are reversed from BGR to RGB. Everything else is unchanged: the two groups are the same,
    and the input of fc6 is (C, H, W) in the order of torch.flatten.

    Args:
        source: {layer name: [weight, bias]} with numpy arrays (or what numpy takes), or the path of a .caffemodel.
        names: the modules for conv1..conv5, fc6, fc7 and fc8; None: those of the variant "caffe".

    Returns: {name.weight: tensor, name.bias: tensor} in float32. For a model with another number of classes, remove the
        last two entries and call `model.load_state_dict(state, strict=False)`. fc8 may have another name.

    Raises: OSError if the file cannot be read; ValueError, with the path, if it is incomplete or no Caffe model, or if
        a layer is missing or has the wrong number of dimensions.
    """
    if names is None:
        with torch.device("meta"):
            names = [name for name, layer in layer_names(AlexNet("caffe")).items() if layer in LAYERS]
    if isinstance(source, str | PathLike):
        origin, blobs = fspath(source), cast(Blobs, read_caffemodel(source))
    else:
        origin, blobs = "the blobs", source
    blobs = _with_last_layer(blobs)
    state = {}
    for layer, name in zip(LAYERS, names):
        if len(blobs.get(layer, ())) != 2:
            found = ", ".join(layer for layer in blobs if len(blobs[layer])) or "none"
            raise ValueError(f"state_dict_from_caffe: {origin}: no weight and bias for {layer}; layers found: {found}")
        weight = _without_leading_ones(blobs[layer][0], 4 if layer.startswith("conv") else 2)
        bias = _without_leading_ones(blobs[layer][1], 1)
        if weight is None or bias is None or len(weight) != len(bias):
            shapes = " and ".join(str(np.shape(blob)) for blob in blobs[layer])
            raise ValueError(f"state_dict_from_caffe: {origin}: {layer} has blobs of shapes {shapes}")
        state[f"{name}.weight"] = weight.flip(1) if layer == "conv1" else weight
        state[f"{name}.bias"] = bias
    return state


def _with_last_layer(blobs: Blobs) -> Blobs:
    """The blobs with the last layer as fc8, which fine-tuned networks call fc8_flickr or anything else."""
    others = [name for name in blobs if name not in LAYERS and len(blobs[name]) == 2]
    return blobs if "fc8" in blobs or len(others) != 1 else {**blobs, "fc8": blobs[others[0]]}


def _without_leading_ones(blob: Any, dims: int) -> Tensor | None:
    """The blob with `dims` dimensions: old files store 4-D ones, such as (1, 1, 4096, 9216) for a linear layer."""
    array = np.array(blob, np.float32)
    while array.ndim > dims and array.shape[0] == 1:
        array = array[0]
    return torch.from_numpy(array) if array.ndim == dims else None
