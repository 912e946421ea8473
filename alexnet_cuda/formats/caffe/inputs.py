"""The inputs of Caffe's networks: shapes, and how pictures become such inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

from .files import Layer
from .layers import Shape


def input_shapes(message: Any, layers: Sequence[Layer], weights: Mapping[str, list]) -> dict[str, Shape | None]:
    """{top: shape} of a layer that gives the network its input; None where neither the layer nor the weights tell."""
    tops, given = list(message.top), _given_shapes(message)
    if given:
        return {top: given[min(i, len(given) - 1)] for i, top in enumerate(tops)}
    transform, images = message.transform_param, message.image_data_param
    size = (transform.crop_size,) * 2 if transform.crop_size else (images.new_height, images.new_width)
    channels = _channels(message, layers, weights)
    batch = message.data_param.batch_size or images.batch_size
    return {
        top: (batch or 1, channels, *size) if channels and all(size) and not i else None for i, top in enumerate(tops)
    }


def _given_shapes(message: Any) -> list[Shape]:
    if message.type == "MemoryData":
        memory = message.memory_data_param
        return [(memory.batch_size, memory.channels, memory.height, memory.width), (memory.batch_size,)]
    dummy = message.dummy_data_param
    shapes = message.input_param.shape or dummy.shape
    return [tuple(shape.dim) for shape in shapes] or list(zip(dummy.num, dummy.channels, dummy.height, dummy.width))


def _channels(message: Any, layers: Sequence[Layer], weights: Mapping[str, list]) -> int | None:
    """Channels of the pictures of a Data layer: as it says, or as many as the first convolution's weights take."""
    transform = message.transform_param
    if transform.force_gray or (message.type == "ImageData" and not message.image_data_param.is_color):
        return 1
    if transform.force_color or message.type in ("ImageData", "WindowData") or len(transform.mean_value) == 3:
        return 3
    for layer in layers:
        blobs = weights.get(layer.message.name, [])
        if layer.message.type == "Convolution" and list(layer.message.bottom) == list(message.top[:1]) and blobs:
            return blobs[0].shape[1] * layer.message.convolution_param.group
    return None
