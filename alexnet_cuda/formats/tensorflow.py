"""Weights of Keras (.h5, .weights.h5, .keras) and arrays of TensorFlow-Slim (.npz), under the names of a network here.

TensorFlow is not needed. Kernels are (height, width, in, out) there and (out, in, height, width) here; the first linear
layer reads rows, columns, channels there and channels, rows, columns here.
"""

import io
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# What a variable is here, by the last word of its name. Those of newer files of Keras have numbers instead.
WORDS = {"kernel": "weight", "weights": "weight", "bias": "bias", "biases": "bias", "gamma": "weight", "beta": "bias",
         "moving_mean": "running_mean", "moving_variance": "running_var"}  # fmt: skip
NUMBERED = {1: ("weight",), 2: ("weight", "bias"), 4: ("weight", "bias", "running_mean", "running_var")}
KINDS = (nn.Conv2d, nn.Linear, (nn.BatchNorm1d, nn.BatchNorm2d))
Layers = dict[str, dict[str, Tensor]]  # the variables of every layer, by their names here, in the order of layers


def read_keras(path: Path) -> Layers:
    """The layers of a Keras file of any kind. Raises OSError, KeyError or ValueError where it is none."""
    import h5py

    source: Any = path
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            source = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(source, "r") as file:
        root = file.get("model_weights", file)
        layers: Layers = {}
        for layer, word, array in _legacy(root) if _names(root, "layer_names") else _numbered(root):
            layers.setdefault(layer, {})[word] = array
    if not layers:
        raise ValueError("it holds no layer of Keras")
    return layers


def read_arrays(path: Path) -> Layers | dict[str, Tensor]:
    """The layers of a .npz file whose arrays are called as in TensorFlow-Slim, alexnet_v2/conv1/weights; plain tensors
    where they are called otherwise. Raises ValueError for an array without a name, and for one of Python objects, which
    would have to be unpickled."""
    layers: Layers = {}
    file = np.load(path, allow_pickle=False)
    if isinstance(file, np.ndarray):
        raise ValueError("it is one array without a name; numpy.savez writes several with their names")
    with file:
        arrays = {
            name: _tensor(file[name]) for name in sorted(file.files, key=_natural) if file[name].dtype.kind in "fiu"
        }
    for name, array in arrays.items():
        layer, _, word = name.removesuffix(":0").rpartition("/")
        if layer and word in WORDS:  # others are the optimiser's, as weights/Momentum
            if word == "weights" and layer.rpartition("/")[2].startswith("fc"):  # a convolution that sees everything
                array = array.reshape(-1, array.shape[-1])
            layers.setdefault(layer, {})[WORDS[word]] = array
    return layers or arrays


def named_as(model: nn.Module, layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of `layers` under the names of `model`: the file's first convolution is that of the model, and so on;
    likewise its linear layers and its normalisations. Where the file has more or fewer of a kind, each layer of the
    model gets the first one that fits it. What has no place keeps its name."""
    modules = list(model.named_modules())
    channels = next((m.out_channels for _, m in reversed(modules) if isinstance(m, nn.Conv2d)), 1)
    state: dict[str, Tensor] = {}
    for kind in KINDS:
        places = {name: module for name, module in modules if isinstance(module, kind)}
        first = next(iter(places), "")
        files = {layer: arrays for layer, arrays in layers.items() if _is(arrays, kind)}
        for index, (name, module) in enumerate(places.items()):
            equal = len(files) == len(places) - index  # as many as there are places left
            fits = [layer for layer in files if equal or _shape(files[layer]) == module.weight.shape]
            for layer in fits[:1]:
                tensors = _converted(files.pop(layer), channels if name == first else 1)
                state |= {f"{name}.{word}": tensor for word, tensor in tensors.items()}
                layers = {other: arrays for other, arrays in layers.items() if other != layer}
    return state | {f"{layer}/{word}": array for layer, arrays in layers.items() for word, array in arrays.items()}


def _legacy(root: Any) -> Iterator[tuple[str, str, Tensor]]:
    """Layer, variable and array of a file that lists its layers. A layer may hold layers."""
    for name in _names(root, "layer_names"):
        for variable in _names(root[name], "weight_names"):
            inner, _, word = variable.removesuffix(":0").rpartition("/")
            yield f"{name}/{inner}" if inner else name, WORDS.get(word, word), _tensor(root[name][variable])


def _numbered(root: Any) -> Iterator[tuple[str, str, Tensor]]:
    """The same of a file whose groups "vars" hold numbered arrays. The groups are called after their class and position
    in it, so that their natural order is that of the layers of each kind."""
    found: dict[str, list[Tensor]] = {}

    def visit(name: str, entry: Any) -> None:
        layer, _, number = name.rpartition("/vars/")
        if layer and number.isdigit() and not layer.startswith("optimizer") and entry.dtype.kind == "f":
            found.setdefault(layer, []).append(_tensor(entry))

    root.visititems(visit)
    for layer in sorted(found, key=_natural):
        words = NUMBERED.get(len(found[layer]), map(str, range(len(found[layer]))))
        yield from ((layer, word, array) for word, array in zip(words, found[layer]))


def _names(group: Any, key: str) -> list[str]:
    """A list of names among a group's attributes; a long one is cut into key0, key1, ..."""
    keys = (
        [key] if key in group.attrs else sorted((k for k in group.attrs if re.fullmatch(rf"{key}\d+", k)), key=_natural)
    )
    return [name.decode() if isinstance(name, bytes) else str(name) for k in keys for name in group.attrs[k]]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts dense_2 before dense_10, and dense before both."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _is(arrays: Mapping[str, Tensor], kind: Any) -> bool:
    """Whether variables are those of a layer of this kind."""
    if "weight" not in arrays:
        return False
    dimensions = {nn.Conv2d: 4, nn.Linear: 2}.get(kind, 1) if isinstance(kind, type) else 1
    return arrays["weight"].dim() == dimensions and ("running_mean" in arrays) == (dimensions == 1)


def _shape(arrays: Mapping[str, Tensor]) -> tuple[int, ...]:
    shape = arrays["weight"].shape
    return (*shape[:-3:-1], *shape[:-2])  # (height, width, in, out) to (out, in, height, width)


def _converted(arrays: Mapping[str, Tensor], channels: int) -> dict[str, Tensor]:
    """Variables in the order of torch; a linear layer reads maps of that many channels."""
    weight = arrays["weight"]
    if weight.dim() == 4:
        weight = weight.permute(3, 2, 0, 1)
    elif weight.dim() == 2:
        maps = weight.reshape(-1, channels if len(weight) % channels == 0 else 1, weight.shape[1])
        weight = maps.permute(2, 1, 0).reshape(weight.shape[1], -1)
    return {**arrays, "weight": weight.contiguous()}


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array, np.float32))
