"""Reading Caffe's files: networks (.prototxt), weights (.caffemodel) and mean images (.binaryproto) of every age."""

import re
import warnings
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format
from google.protobuf.message import DecodeError

from . import schema

Source = str | PathLike[str]
# LayerParameter's type for each type of a V0 layer, where it isn't the same word in CamelCase.
V0_TYPE = {
    "conv": "Convolution", "images": "ImageData", "innerproduct": "InnerProduct", "pool": "Pooling",
    "softmax_loss": "SoftmaxWithLoss", "relu": "ReLU", "tanh": "TanH", "lrn": "LRN", "bnll": "BNLL",
    "hdf5_data": "HDF5Data", "hdf5_output": "HDF5Output",
}  # fmt: skip
# The message that holds the values of a V0 layer, and new names of such values.
V0_MESSAGE = {
    "conv": "convolution_param", "pool": "pooling_param", "innerproduct": "inner_product_param", "lrn": "lrn_param",
    "dropout": "dropout_param", "concat": "concat_param", "data": "data_param", "images": "image_data_param",
    "hdf5_data": "hdf5_data_param", "window_data": "window_data_param", "infogain_loss": "infogain_loss_param",
}  # fmt: skip
V0_RENAMED = {
    "biasterm": "bias_term",
    "kernelsize": "kernel_size",
    "batchsize": "batch_size",
    "shuffle_images": "shuffle",
}
V0_TRANSFORM = {"scale": "scale", "meanfile": "mean_file", "cropsize": "crop_size", "mirror": "mirror"}
SOLVER_ONLY = ("blobs_lr", "weight_decay", "blob_share_mode")  # learning rates and checks of the old formats
DATA = {"Data": "data_param", "ImageData": "image_data_param", "WindowData": "window_data_param"}
RAW_TYPES = ("<f8", "<f4", "<f2", "<i4", "<u4", "?")  # of BlobProto.raw_data_type


@dataclass
class Layer:
    """A layer of a network: its LayerParameter in today's form, and where it is written."""

    message: Any
    where: str


def read_network(prototxt: Source) -> tuple[Any, list[Layer]]:
    """The NetParameter of a .prototxt and its layers. Raises: see `parse_network`; OSError if there is no such file."""
    content = Path(prototxt).read_bytes()
    if b"\0" in content:
        raise ValueError(f"{fspath(prototxt)} is not text; expected a .prototxt, the description of a network")
    return parse_network(content.decode("utf-8-sig", "replace"), fspath(prototxt))  # comments are in any encoding


def parse_network(text: str, origin: str) -> tuple[Any, list[Layer]]:
    """The NetParameter in `text` and its layers in today's form, with the inputs as a layer of the type Input. Raises
    ValueError, with the line, if the text is no network. Fields that Caffe does not have are ignored with a warning."""
    net = schema.NetParameter()
    try:
        text_format.Parse(text, net)
    except text_format.ParseError as error:
        net = schema.NetParameter()
        sentence = f"{origin}, line {error.GetLine()}: {_reason(error)}"
        try:
            text_format.Parse(text, net, allow_unknown_field=True)
        except text_format.ParseError as worse:
            raise ValueError(f"{origin}, line {worse.GetLine()}: {_reason(worse)}") from None
        if net.layer or net.layers:
            warnings.warn(f"{sentence} (ignored, as are others that Caffe does not have)", stacklevel=4)
    if bool(net.layer) == bool(net.layers):
        found = "both `layer` and `layers`, the old form" if net.layer else "no layers"
        raise ValueError(f"{origin} has {found}; expected a .prototxt, the description of a network")
    lines = _layer_lines(text)
    return net, [Layer(layer, f"line {line} of {origin}") for layer, line in _upgraded(net, lines)]


def _reason(error: Exception) -> str:
    """The text of protobuf's error without its position, the line itself and the names of our own messages."""
    reason = re.sub(r"^'.*': ", "", str(error).partition(" : ")[2].rstrip("."))
    return re.sub(rf"{schema.PACKAGE}\.(\w+s\.)?", "", reason) or str(error)


def _layer_lines(text: str) -> list[int]:
    """The lines on which the layers begin."""
    tokens, depth, lines = text_format.Tokenizer(text.splitlines()), 0, []
    while not tokens.AtEnd():
        if depth == 0 and tokens.token in ("layer", "layers"):
            lines.append(tokens.ParseError("").GetLine())
        depth += (tokens.token in ("{", "<")) - (tokens.token in ("}", ">"))
        tokens.NextToken()
    return lines


def _upgraded(net: Any, lines: list[int]) -> list[tuple[Any, int]]:
    """The layers in today's form, as Caffe's own tool upgrades them, each with its line."""
    layers: list[tuple[Any, int]] = []
    if net.input:
        shapes = [list(shape.dim) for shape in net.input_shape]
        dims = list(net.input_dim)
        shapes = shapes or [dims[i : i + 4] for i in range(0, len(dims), 4)]
        layer = schema.LayerParameter(name="input", type="Input", top=net.input)
        for shape in shapes:
            layer.input_param.shape.add(dim=shape)
        layers.append((layer, 1))
    if net.layer:
        return layers + list(zip(net.layer, lines))
    padding: dict[str, tuple[str, int]] = {}  # V0 pads in layers of their own: {top: (bottom, pad)}
    for old, line in zip(net.layers, lines):
        if old.HasField("layer") and old.layer.type == "padding":
            padding[old.top[0]] = old.bottom[0], old.layer.pad
            continue
        new = _from_v0(old) if old.HasField("layer") else _from_v1(old)
        if new.bottom and new.bottom[0] in padding and new.type in ("Convolution", "Pooling"):
            new.bottom[0], pad = padding[new.bottom[0]]
            if new.type == "Convolution":
                new.convolution_param.pad[:] = [pad]
            else:
                new.pooling_param.pad = pad
        layers.append((new, line))
    return layers


def _from_v1(old: Any) -> Any:
    new = schema.LayerParameter()
    for field, value in old.ListFields():
        if field.name == "type":
            new.type = schema.V1_TYPE[field.enum_type.values_by_number[value].name]
        elif field.name == "param":
            for name in value:
                new.param.add(name=name)
        elif field.name not in SOLVER_ONLY:
            _set(new, field.name, value)
    if new.type in DATA:  # transform_param was part of the data's parameters
        data = getattr(new, DATA[new.type])
        for name in ("scale", "mean_file", "crop_size", "mirror"):
            if data.HasField(name):
                setattr(new.transform_param, name, getattr(data, name))
                data.ClearField(name)
    return new


def _from_v0(old: Any) -> Any:
    v0 = old.layer
    new = schema.LayerParameter(name=v0.name, bottom=old.bottom, top=old.top)
    new.type = V0_TYPE.get(v0.type) or "".join(word.capitalize() for word in v0.type.split("_"))
    for field, value in v0.ListFields():
        name = V0_RENAMED.get(field.name, field.name).removeprefix("det_")
        if field.name in V0_TRANSFORM:
            setattr(new.transform_param, V0_TRANSFORM[field.name], value)
        elif field.name == "blobs":
            new.blobs.extend(value)
        elif v0.type in V0_MESSAGE and name in getattr(new, V0_MESSAGE[v0.type]).DESCRIPTOR.fields_by_name:
            _set(getattr(new, V0_MESSAGE[v0.type]), name, value)
    return new


def _set(message: Any, name: str, value: Any) -> None:
    """message.name = value, for a field of any kind; one value for a repeated field becomes its only one."""
    own = getattr(message, name)
    if hasattr(own, "extend"):
        own.extend([value] if isinstance(value, int | float) else value)
    elif hasattr(own, "CopyFrom"):
        own.CopyFrom(value)
    else:
        setattr(message, name, value)


def read_caffemodel(path: Source) -> dict[str, list[np.ndarray]]:
    """{layer name: its blobs} of a .caffemodel, in the formats V0, V1 and today's, binary, text or HDF5, with data as
    float, double, half or NVCaffe's raw bytes. Raises: OSError if the file cannot be read; ValueError, with the path,
    if it is incomplete or no Caffe model."""
    net = schema.NetParameter()
    with open(path, "rb") as file:
        if file.read(4) == b"\x89HDF":
            return _read_hdf5(path)
    _parse(net, path, "Caffe model")
    layers = net.layer or net.layers
    if not layers:
        raise ValueError(f"{fspath(path)} is incomplete or no Caffe model: it has no layers")
    found = {}
    for layer in layers:
        message = layer.layer if layer.DESCRIPTOR.name == "V1LayerParameter" and layer.HasField("layer") else layer
        try:
            found[message.name] = [blob_array(blob) for blob in message.blobs]
        except ValueError as error:
            reason = f"layer {message.name}: {error}"
            raise ValueError(f"{fspath(path)} is incomplete or no Caffe model: {reason}") from None
    return found


def _read_hdf5(path: Source) -> dict[str, list[np.ndarray]]:
    """The blobs that Caffe writes with `snapshot_format: HDF5`: datasets /data/LAYER/NUMBER."""
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{fspath(path)} is HDF5 and needs h5py: `pip install h5py` installs it") from error
    found: dict[str, dict[int, np.ndarray]] = {}

    def add(name: str, item: Any) -> None:
        layer, _, number = name.rpartition("/")
        if isinstance(item, h5py.Dataset) and number.isdigit():
            found.setdefault(layer, {})[int(number)] = item[()]

    try:
        with h5py.File(path, "r") as file:
            file["data"].visititems(add)
    except (OSError, KeyError) as error:
        raise ValueError(f"{fspath(path)} is incomplete or no Caffe model: {error}") from None
    return {layer: [blobs[i] for i in sorted(blobs)] for layer, blobs in found.items()}


def read_mean(path: Source) -> np.ndarray:
    """The mean image (channels, height, width) in a .binaryproto: BGR, pixels 0..255. Raises: OSError if the file
    cannot be read; ValueError, with the path, if it is incomplete or no mean image."""
    blob = schema.BlobProto()
    _parse(blob, path, "mean image")
    try:
        mean = blob_array(blob).astype(np.float32)
        return mean.reshape(mean.shape[-3:]) if mean.ndim != 1 else mean.reshape(-1, 1, 1)
    except ValueError as error:
        raise ValueError(f"{fspath(path)} is incomplete or no mean image: {error}") from None


def _parse(message: Any, path: Source, what: str) -> None:
    """Reads a message in protobuf's binary form or in its text form."""
    content = Path(path).read_bytes()
    try:
        message.ParseFromString(content)
        return
    except DecodeError:
        message.Clear()
        reason = "its messages are damaged or cut off"
    try:
        text_format.Parse(content.decode(), message, allow_unknown_field=True)
        if b"data:" in content:
            return
        reason = "it is text without numbers"
    except text_format.ParseError as error:
        reason = f"line {error.GetLine()}: {_reason(error)}"
    except UnicodeDecodeError:
        pass
    raise ValueError(f"{fspath(path)} is incomplete or no {what}: {reason}") from None


def blob_array(blob: Any) -> np.ndarray:
    """The numbers of a BlobProto in its shape, as float32, or float64 if it has them so. Raises ValueError if there
    are fewer or more than its shape needs, or none."""
    legacy = [blob.num, blob.channels, blob.height, blob.width]
    shape = list(blob.shape.dim) if blob.HasField("shape") else legacy
    if blob.raw_data:
        values = np.frombuffer(blob.raw_data, RAW_TYPES[blob.raw_data_type])
        values = values.astype(np.float64 if values.itemsize == 8 else np.float32)
    else:
        values = np.array(blob.double_data, np.float64) if blob.double_data else np.array(blob.data, np.float32)
    if not blob.HasField("shape") and not any(legacy):
        shape = [len(values)]
    if len(values) == 0 or len(values) != np.prod(shape):
        raise ValueError(f"{len(values):,} numbers for a blob of the shape {tuple(shape)}")
    return values.reshape(shape)
