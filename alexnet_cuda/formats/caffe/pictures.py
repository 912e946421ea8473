"""A Caffe classifier as run folders hold it: RGB or grey pictures, preprocessed as its recipe says, to scores."""

import re
from collections.abc import Sequence
from os import fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from google.protobuf import text_format
from torch import Tensor, nn

from ...recipe import Recipe
from . import schema
from .files import Layer, Source, parse_network, read_caffemodel, read_mean, read_network
from .layers import INPUTS, LEFT_OUT
from .network import Blobs, CaffeNet, assembled, selected


class Classifier(nn.Module):
    """Pictures (N, C, S, S), RGB or grey, normalised as the recipe says, to scores (N, classes) before softmax.

    The weights of the first convolutions take RGB where Caffe's take BGR. A mean image is subtracted here, since a
    recipe has only one mean per channel.

    Args:
        prototxt: what `imported` makes of a network; it rebuilds the module.
        weights: Caffe's blobs, or None, after which `load_state_dict` has to fill the module.
    """

    mean: Tensor | None

    def __init__(self, prototxt: str, weights: Blobs | None = None, origin: str = "") -> None:
        super().__init__()
        self.prototxt = prototxt
        net, layers = parse_network(prototxt, "the run's network")
        self.net = assembled(net.name, layers, weights, "TEST", origin)
        _, channels, height, width = self.net.input_shapes[0] or (0, 0, 0, 0)
        has_mean = layers[0].message.transform_param.HasField("mean_file")
        self.register_buffer("mean", torch.zeros(channels, height, width) if has_mean else None)
        first = [layer.message for layer in layers if self.net.inputs[0] in layer.message.bottom]
        folded = all(m.type == "Convolution" and m.convolution_param.group == 1 for m in first)
        self.flipped = channels == 3 and not folded  # in each forward pass
        if channels == 3 and folded:
            convolutions: list[Any] = [self.net.layer(message.name) for message in first]
            for weight in {convolution.weight for convolution in convolutions}:  # which may be shared
                weight.data = weight.data.flip(1).contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        if self.mean is not None:
            x = x - self.mean
        return self.net(x.flip(1) if self.flipped else x).flatten(1)


def imported(prototxt: Source, caffemodel: Source, mean: str | None = None) -> tuple[Classifier, Recipe, list[str]]:
    """The classifier in Caffe's two files, a recipe with its preprocessing, and notes for the user.

    The preprocessing is that of the Data layer (mean_value, mean_file, scale, crop_size, mirror) where the network has
    one. Of several outputs the last is taken, and of a Softmax its input.

    Args:
        mean: the mean to subtract instead: a .binaryproto, or numbers such as "104,117,123" in the order BGR.

    Raises: what `load` raises; ValueError for a network that is no classifier of square pictures.
    """
    net, layers = read_network(prototxt)
    layers = selected(net, layers, "TEST")
    weights = read_caffemodel(caffemodel)
    whole = CaffeNet(net.name, layers, weights)
    output, notes = whole.outputs[-1], []
    if len(whole.outputs) > 1:
        notes.append(f"of the outputs {', '.join(whole.outputs)} the last is used")
    last = next(layer.message for layer in reversed(layers) if output in layer.message.top)
    if last.type == "Softmax":
        layers, output = [layer for layer in layers if layer.message is not last], last.bottom[0]
    shape, scores = whole.input_shapes[0] if len(whole.inputs) == 1 else None, whole.output_shapes[-1]
    if shape is None or len(shape) != 4 or shape[1] not in (1, 3) or shape[2] != shape[3]:
        given = zip(whole.inputs, whole.input_shapes)
        inputs = ", ".join(f"{name} {size or 'of unknown size'}" for name, size in given)
        raise ValueError(f"{fspath(prototxt)}: expected one input of square pictures (N, 3 or 1, S, S), got {inputs}")
    if scores is None or len(scores) < 2 or np.prod(scores[2:]) != 1:
        raise ValueError(f"{fspath(prototxt)}: expected scores (N, classes), its output {output} is {scores}")
    source = next(layer.message for layer in layers if whole.inputs[0] in layer.message.top)
    values, found = _mean(mean, source.transform_param, Path(prototxt), notes)
    recipe = _recipe(whole, shape, source.transform_param, values, found, Path(caffemodel).name)
    text = _deploy(net.name, layers, source, shape, whole.inputs[0], output, values)
    model = Classifier(text, weights, fspath(caffemodel))
    if values is not None and values.size > shape[1]:
        top, left = ((size - shape[2]) // 2 for size in values.shape[1:])
        image = values[::-1, top : top + shape[2], left : left + shape[2]]  # RGB
        scale = source.transform_param.scale
        model.mean = torch.from_numpy(np.ascontiguousarray(image * scale, np.float32))
    return model, recipe, notes


def _mean(given: str | None, transform: Any, prototxt: Path, notes: list[str]) -> tuple[np.ndarray | None, str]:
    """The mean (C, 1, 1) or (C, H, W) in the order of Caffe's channels, and where it comes from."""
    if given is not None and not given.endswith(".binaryproto"):
        try:
            numbers = np.array([float(value) for value in given.split(",")])
            if not np.isfinite(numbers).all():
                raise ValueError
            return numbers.reshape(-1, 1, 1), "--mean"
        except ValueError:
            raise ValueError(f"the mean must be a .binaryproto or numbers such as 104,117,123, got {given!r}") from None
    if given is not None:
        return read_mean(given), given
    if transform.mean_value:
        return np.array(transform.mean_value).reshape(-1, 1, 1), "mean_value"
    if transform.mean_file:
        places = [Path(transform.mean_file), prototxt.parent / transform.mean_file,
                  prototxt.parent / Path(transform.mean_file).name]  # fmt: skip
        for path in places:
            if path.is_file():
                return read_mean(path), str(path)
        missing = f"{prototxt} subtracts the mean image {transform.mean_file}"
        raise ValueError(f"{missing}, which is not there; name it with --mean")
    notes.append("no mean is subtracted: the network's file has none; --mean gives one")
    return None, ""


def _recipe(
    net: CaffeNet, shape: Sequence[int], transform: Any, mean: np.ndarray | None, found: str, name: str
) -> Recipe:
    channels, size = shape[1], shape[2]
    values: tuple[float, ...] = (0.0,)
    short_side = size if size < 100 and not transform.crop_size else None  # small pictures are not cropped
    if mean is not None:
        if len(mean) not in (1, channels):
            raise ValueError(f"the mean of {found} has {len(mean)} channels, the network takes {channels}")
        if mean.shape[1:] == (1, 1):
            values = tuple(float(value) / 255 for value in mean[::-1].flatten())
        elif min(mean.shape[1:]) < size:
            found = f"{found} is {mean.shape[1]}x{mean.shape[2]}"
            raise ValueError(f"the mean image {found}, smaller than the network's {size}x{size} pictures")
        else:
            short_side = mean.shape[1]
    slug = re.sub(r"[^\w.-]+", "-", net.name).strip("-") or "network"
    recipe = {
        "name": name, "variant": f"caffe/{slug}", "size": size, "data": "folder", "channels": channels,
        "mean": values, "std": (1 / 255 / transform.scale,), "short_side": short_side, "flip": transform.mirror,
    }  # fmt: skip
    return Recipe().replace(recipe)


def _deploy(
    name: str, layers: Sequence[Layer], source: Any, shape: Sequence[int], data: str, output: str,
    mean: np.ndarray | None,
) -> str:  # fmt: skip
    """The text of the network from `data` to `output`, with an Input layer of this shape."""
    first = schema.LayerParameter(name=source.name, type="Input", top=[data], transform_param=source.transform_param)
    first.input_param.shape.add(dim=[1, *shape[1:]])
    first.transform_param.ClearField("mean_file")
    if mean is not None and mean.shape[1:] != (1, 1):
        first.transform_param.mean_file = "in the weights"
    needed, kept = {output}, []
    for layer in reversed(layers):
        message = layer.message
        if message.type not in (*INPUTS, *LEFT_OUT) and not needed.isdisjoint(message.top):
            needed |= set(message.bottom)
            kept.append(schema.LayerParameter.FromString(message.SerializeToString()))
            for field in ("blobs", "include", "exclude"):
                kept[-1].ClearField(field)
    return text_format.MessageToString(schema.NetParameter(name=name, layer=[first, *reversed(kept)]))
