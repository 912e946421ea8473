"""Reading and writing weights: run folders, safetensors, checkpoints, Caffe's files, torchvision's downloads.

Nothing in a file is executed: torch.load always has weights_only=True.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from .errors import DataError, RecipeError
from .model import AlexNet
from .networks import build
from .pretrained import find, write_tensors
from .recipe import Recipe

# Where a checkpoint has its tensors, in this order.
CHECKPOINT_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "state_dict", "model_state_dict", "model",
                   "net", "network")  # fmt: skip
WRAPPERS = ("module", "_orig_mod")


def save_weights(path: Path, model: nn.Module, recipe: Recipe, classes: list[str]) -> None:
    """Writes a safetensors file that `load_weights` reads: the tensors, and as metadata the recipe and class names."""
    weights = recipe.weights and Path(recipe.weights).name  # no paths of this machine
    values = recipe.replace({"data_path": None, "output": None, "weights": weights}).to_yaml()
    metadata = {"format": "pt", "variant": recipe.variant, "classes": json.dumps(classes), "recipe": values}
    write_tensors(path, model.state_dict(), metadata | network_description(model))


def network_description(model: nn.Module) -> dict[str, str]:
    """What a file must say of a network that no recipe builds: the prototxt of an imported one."""
    prototxt = getattr(model, "prototxt", None)
    return {"prototxt": prototxt} if isinstance(prototxt, str) else {}


def load_weights(source: Path) -> tuple[nn.Module, Recipe, list[str]]:
    """The network, recipe and class names of a run folder or a file of `save_weights`. Raises DataError if the file is
    missing or was not written by `save_weights`."""
    path = find(source, "expected the folder of a finished run, or its weights.safetensors")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        recipe = Recipe().replace(yaml.safe_load(metadata["recipe"]))
        classes = json.loads(metadata["classes"])
        model = _imported(metadata["prototxt"]) if "prototxt" in metadata else build(recipe, len(classes))
        model.load_state_dict(safetensors.torch.load_file(path))
        if isinstance(model, AlexNet):
            model.metadata, model.input_scale = metadata, float(metadata.get("input_scale", model.input_scale))
    except KeyError as error:
        raise DataError(f"{path} is not a weights file of a run: its metadata has no {error}") from error
    except Exception as error:  # safetensors, YAML, the recipe and torch raise different types
        raise DataError(f"{path} is not a weights file of a run: {_first_line(error)}") from error
    return model, recipe, classes


def _imported(prototxt: str) -> nn.Module:
    from .formats.caffe.pictures import Classifier

    return Classifier(prototxt)


def start_from(model: nn.Module, recipe: Recipe) -> None:
    """Copies the tensors of `recipe.weights` into `model`, except into its last layer, which keeps its values.

    `recipe.weights` is a run folder, a file (see `read_tensors`), or "torchvision": ImageNet weights for torchvision's
    networks, downloaded once. Raises DataError if there is no such file or it holds no tensors, RecipeError if a tensor
    is missing or has another shape.
    """
    source, state = recipe.weights, model.state_dict()
    tensors = _torchvision_tensors(recipe) if source == "torchvision" else read_tensors(Path(str(source)))
    tensors = _renamed(tensors, list(state))
    last_layer = f"{parameter_layers(model)[-1][0]}."
    for name, own in state.items():
        if name.startswith(last_layer):
            tensors.pop(name, None)
        elif name not in tensors or tensors[name].shape != own.shape:
            has = tuple(tensors[name].shape) if name in tensors else "nothing"
            unfit = f"weights {source} do not fit {recipe.variant}"
            raise RecipeError(f"{unfit}: for {name} {tuple(own.shape)} they have {has}")
    model.load_state_dict(tensors, strict=False)


def _renamed(tensors: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """The tensors under the names of a network, where wrappers have put words before or between them: "module." and
    "_orig_mod." of DataParallel and torch.compile anywhere, and one more, such as "model.", at the beginning."""
    plain = {".".join(part for part in name.split(".") if part not in WRAPPERS): t for name, t in tensors.items()}
    beginnings = {"", *(name.partition(".")[0] + "." for name in plain)}
    best = max(sorted(beginnings), key=lambda start: sum(start + name in plain for name in names))
    return {name.removeprefix(best): tensor for name, tensor in plain.items() if name.startswith(best)}


def _unwrapped(content: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint, however deep they lie: an average of the weights before the weights themselves.
    Raises ValueError if there are none."""
    inside = content if isinstance(content, Mapping) else {}
    while found := [key for key in CHECKPOINT_KEYS if isinstance(inside.get(key), Mapping)]:
        inside = inside[found[0]]
    state = {str(name): tensor for name, tensor in inside.items() if isinstance(tensor, Tensor)}
    if not state:
        raise ValueError("it holds no tensors by name")
    return state


def parameter_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules with parameters of their own, in the order of definition; the last computes the scores."""
    return [(name, module) for name, module in model.named_modules() if module._parameters]


def read_tensors(source: Path) -> dict[str, Tensor]:
    """The tensors of a run folder, a .safetensors, .caffemodel, or .pt, .pth or .ckpt file, by parameter name. Raises
    DataError if there is no such file or it is not a file of tensors."""
    path = find(source, "weights must be a run folder, a file or torchvision")
    try:
        if path.suffix == ".caffemodel":
            from .formats.caffe import state_dict_from_caffe

            return state_dict_from_caffe(path)
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return _unwrapped(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises a different type for each kind of damage
        raise DataError(f"{path} is not a file of tensors: {_first_line(error)}") from error


def read_checkpoint(path: Path) -> dict:
    """The tensors and numbers of a training checkpoint. Raises DataError if the file is missing or no checkpoint."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["state_dict"], checkpoint["global_step"]
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except Exception as error:  # torch.load raises a different type for each kind of damage
        raise DataError(f"{path} is not a checkpoint of a training run: {_first_line(error)}") from error
    return checkpoint


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _torchvision_tensors(recipe: Recipe) -> dict[str, Tensor]:
    from torchvision import models

    if not recipe.variant.startswith("torchvision"):
        expected = "weights torchvision are for the variants torchvision and torchvision/NAME"
        raise RecipeError(f"{expected}, got {recipe.variant}")
    name = "alexnet" if recipe.variant == "torchvision" else recipe.variant.removeprefix("torchvision/")
    url = models.get_model_weights(name).DEFAULT.url
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except OSError as error:
        raise DataError(f"{url} cannot be downloaded: {error}") from error
