"""Tensors in the files that people have: safetensors, PyTorch's, Caffe's, Keras's and NumPy's. A file is known by its
first bytes, whatever it is called. Nothing in it is executed: torch.load always has weights_only=True."""

import json
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import DataError, first_line
from ..matching import AVERAGE
from ..pretrained import find
from .tensorflow import named_as, read_arrays, read_keras

# Tensors by name, or layers of another framework with their arrays.
Content = Mapping[str, Tensor | Mapping[str, Tensor]]

# Where a checkpoint has its tensors, in this order.
CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")
CLASS_KEYS = ("classes", "class_names", "class_to_idx", "labels")
REFUSED = "it holds pickled objects, which are not loaded, since that can run any code"
# What people have under such a name in place of weights, by its first bytes.
OTHERS = {
    b"": "it is empty",
    b"<": "it is a web page, not a file of weights; the address may need a login, or lead to a page about the file",
    b"version https://git-lfs": "it only names a file that git lfs has; `git lfs pull` gets the file",
    b"\x1f\x8b": "it is packed by gzip; unpack it first",
    b"7z\xbc\xaf\x27\x1c": "it is a 7z archive; unpack it first",
    b"Rar!": "it is a RAR archive; unpack it first",
}
WANTED = "a run folder, a file (.safetensors, .pt, .pth, .ckpt, .caffemodel, .h5, .keras, .npz) or torchvision"


class Inert:
    """Stands for every class and function that a checkpoint names. It takes any arguments and does nothing, so that the
    tensors beside a numpy number, an argparse.Namespace or a path can be read."""

    def __init__(self, *arguments: Any, **values: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_content(source: Path) -> tuple[Content, dict[str, str]]:
    """The tensors of a run folder or a file, for `as_state`, and what it says of them: "classes", a list in JSON, and,
    in files of this package, the rest of their metadata. Raises DataError if there is no such file or it is not a file
    of tensors."""
    path = weights_file(source)
    try:
        with path.open("rb") as file:
            start = file.read(64)
        if ".caffemodel" in path.suffixes:  # also .caffemodel.h5
            from .caffe import state_dict_from_caffe

            return state_dict_from_caffe(path), {}
        if start[8:9] == b"{":  # before OTHERS: the length that precedes it may look like anything
            return read_safetensors(path)
        for mark, what in OTHERS.items():
            if start.lstrip().startswith(mark) if mark else not start:
                raise ValueError(what)
        if path.name.endswith(".index.json"):
            return _shards(path)
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        if start.startswith(b"\x89HDF") or _holds(path, "model.weights.h5"):
            return read_keras(path), {}
        if start.startswith(b"\x93NUMPY") or _holds(path, ".npy"):
            return read_arrays(path), {}
        return _checkpoint(path, start)
    except ImportError as error:
        raise DataError(f"{path} needs {error.name}: `pip install 'alexnet_cuda[train]'` installs it") from error
    except Exception as error:  # torch.load raises a different type for each kind of damage
        raise DataError(f"{path} is not a file of tensors: {first_line(error)}") from error


def as_state(content: Content, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a file; those of another framework under the names of `model`."""
    tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    layers = {name: variables for name, variables in content.items() if isinstance(variables, Mapping)}
    return tensors | (named_as(model, layers) if layers else {})


def without_values(content: Content) -> Content:
    """The same names and shapes on the device "meta"."""
    return {name: tree.to("meta") if isinstance(tree, Tensor) else {word: t.to("meta") for word, t in tree.items()}
            for name, tree in content.items()}  # fmt: skip


def weights_file(source: Path | str, expected: str = f"weights must be {WANTED}") -> Path:
    """The file that `source` names, or the weights in the run folder. Raises DataError, with what is expected, where
    there is none."""
    if (Path(source) / "saved_model.pb").exists():
        raise DataError(
            f"{source} is a SavedModel of TensorFlow; save the model as .keras, or its weights as .weights.h5"
        )
    if Path(f"{source}.index").exists():
        remedy = "save its arrays with numpy.savez, each under its variable's name"
        raise DataError(f"{source} is a checkpoint of TensorFlow: {remedy}")
    return find(source, expected)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and the metadata of the file."""
    with safetensors.safe_open(path, "pt") as file:
        tensors = safetensors.torch.load_file(path)
        return {name: _plain(tensor) for name, tensor in tensors.items()}, file.metadata() or {}


def _shards(index: Path) -> tuple[Content, dict[str, str]]:
    """The tensors of all files that an index of the Hugging Face Hub names."""
    names = sorted({Path(name).name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    tensors: dict[str, Any] = {}
    for name in names:
        tensors |= read_content(index.parent / name)[0]
    return tensors, {}


def class_names(metadata: Mapping[str, str]) -> list[str]:
    """The classes that a file names in its metadata, as JSON; none where it is something else."""
    try:
        return _class_names({"classes": json.loads(metadata.get("classes", "[]"))})
    except ValueError:
        return []


def require_whole(path: Path, start: bytes) -> None:
    """ValueError for a zip archive, as torch writes, whose end is missing."""
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise ValueError("it is cut: its list of contents, which comes last, is missing")


def _holds(path: Path, name: str) -> bool:
    """Whether a file is a zip archive with a member whose name ends so."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(member.endswith(name) for member in archive.namelist())


def _plain(tensor: Tensor) -> Tensor:
    """A tensor with a value for each element, in a type that torch calculates with."""
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    tensor = tensor if tensor.layout == torch.strided else tensor.to_dense()
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _checkpoint(path: Path, start: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    require_whole(path, start)
    names: list[str] = []
    if zipfile.is_zipfile(path):
        if _holds(path, "/constants.pkl"):
            raise ValueError("it is a program of TorchScript; save the module's state_dict() instead")
        if _holds(path, "/archive_format"):
            raise ValueError("it is a program of torch.export; save the module's state_dict() instead")
        if not _holds(path, "data.pkl"):
            raise ValueError("it is a zip archive without weights of PyTorch, Keras or NumPy; unpack it first")
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    content = _unpickled(path, start, names)
    known = _class_names(content)
    return _unwrapped(content, names), {"classes": json.dumps(known)} if known else {}


def _unpickled(path: Path, start: bytes, names: list[str]) -> Any:
    """What torch.load reads, with an Inert for every object; `names` are those of the objects, as far as known."""
    with warnings.catch_warnings(), torch.serialization.safe_globals([(Inert, name) for name in names]):
        warnings.simplefilter("ignore")  # on a pickle's protocol
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except RuntimeError as error:  # a damaged archive
            if "legacy .tar" in str(error):  # of 2016, or zeros, which are an empty one
                raise ValueError(f"it begins with {start[:16]!r}, as no known file of weights does") from error
            raise
        except Exception as error:  # what the restricted unpickler meets in a foreign pickle
            detail = re.search(r"WeightsUnpickler error: (.*)|GLOBAL (\S+)|(invalid .*)", str(error))
            found = next(filter(None, detail.groups() if detail else ()), type(error).__name__).strip()
            allowed = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
            if not allowed or allowed[1] in names:
                if start.startswith((b"PK", b"\x80")):  # of torch and of pickle
                    raise ValueError(f"{REFUSED} ({found})") from error
                raise ValueError(f"it begins with {start[:16]!r}, as no known file of weights does") from error
    return _unpickled(path, start, [*names, allowed[1]])  # of the format before zip archives, which lists none


def _unwrapped(content: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, however deep they lie: an average of the weights before the weights themselves.
    Raises ValueError if there are none; `names` are those of its objects."""
    inside = _inside(content)
    if isinstance(inside, Inert):
        raise ValueError(f"{REFUSED} ({', '.join(names[:3])}); save the module's state_dict() instead")
    items = (inside or {}).items()
    state = {str(name): _plain(tensor) for name, tensor in items if isinstance(tensor, Tensor)}
    if not state:
        raise ValueError("it holds no tensors by name")
    return state


def _inside(content: Any) -> Mapping | Inert | None:
    """The mapping with tensors in a tree of mappings and lists, or an object in its place; None where there is none."""
    if isinstance(content, Inert):
        return content
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
    if not isinstance(content, Mapping):
        return None
    keys = [key for key in content if isinstance(key, str)]
    for key in [*filter(AVERAGE.search, keys), *(key for key in CHECKPOINT_KEYS if key in content)]:
        if (found := _inside(content[key])) is not None:
            return found
    if any(isinstance(value, Tensor) for value in content.values()):
        return content if keys else None
    inner = {key: _inside(value) for key, value in content.items() if not re.match("optim|sched|scaler", str(key))}
    inner = {key: found for key, found in inner.items() if isinstance(found, Mapping)}
    if len(inner) > 1:
        raise ValueError(f"it holds several sets of tensors ({', '.join(map(str, inner))}); save one of them alone")
    return next(iter(inner.values()), None)


def _class_names(content: Any) -> list[str]:
    """The classes that a checkpoint lists, or numbers as class_to_idx; none where it does neither."""
    for key in CLASS_KEYS:
        names = content.get(key) if isinstance(content, Mapping) else None
        if isinstance(names, Mapping) and all(isinstance(number, int) for number in names.values()):
            names = [name for name, _ in sorted(names.items(), key=lambda item: item[1])]
        if isinstance(names, list | tuple) and names:
            return [str(name) for name in names]
    return []
