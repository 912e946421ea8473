"""Reading and writing weights: run folders, safetensors, checkpoints, Caffe's files, torchvision's downloads.

Nothing in a file is executed: torch.load always has weights_only=True.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
import yaml
from safetensors import SafetensorError
from torch import nn

from .errors import DataError, RecipeError, first_line
from .formats.tensors import (
    Content,
    as_state,
    class_names,
    read_content,
    read_safetensors,
    require_whole,
    weights_file,
    without_values,
)
from .matching import Fit, compare, fill, parameter_layers, renamed, untrained, untrained_note
from .model import AlexNet
from .networks import build
from .pretrained import write_tensors
from .recipe import Recipe
from .variants import VARIANTS, Variant, get_variant, is_variant


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


def load_weights(source: Path | str) -> tuple[nn.Module, Recipe, list[str]]:
    """The network, recipe and class names of a run folder or a file of `save_weights`. Raises DataError if the file is
    missing or was not written by `save_weights`. Warns where layers look untrained."""
    path = weights_file(source, "expected the folder of a finished run, or its weights.safetensors")
    try:
        tensors, metadata = read_safetensors(path)
        recipe = Recipe().replace(yaml.safe_load(metadata["recipe"]))
        classes = json.loads(metadata["classes"])
        model = _imported(metadata["prototxt"]) if "prototxt" in metadata else build(recipe, len(classes))
        model.load_state_dict(tensors)
        if isinstance(model, AlexNet):
            model.metadata, model.input_scale = metadata, float(metadata.get("input_scale", model.input_scale))
    except KeyError as error:
        raise DataError(f"{path} is not a weights file of a run: its metadata has no {error}") from error
    except SafetensorError as error:
        raise DataError(
            f"{path} is not a weights file of a run, which is safetensors, or is cut ({first_line(error)})"
        ) from error
    except Exception as error:  # YAML, the recipe and torch raise different types
        raise DataError(f"{path} is not a weights file of a run: {first_line(error)}") from error
    if fresh := untrained(model, list(model.state_dict())):
        warnings.warn(f"{path}: {untrained_note(fresh)}", stacklevel=2)
    return model, recipe, classes


def _imported(prototxt: str) -> nn.Module:
    from .formats.caffe.pictures import Classifier

    return Classifier(prototxt)


def start_from(model: nn.Module, recipe: Recipe, classes: Sequence[str] = ()) -> Fit:
    """Copies what fits of the tensors of `recipe.weights` into `model`, and tells what did not.

    `recipe.weights` is a run folder, a file (see `formats.tensors`), or "torchvision": ImageNet weights for
    torchvision's networks, downloaded once. The last layer keeps its values, except in the rows of those `classes` that
    the file knows by name. Raises DataError if there is no such file or it holds no tensors, RecipeError if nothing
    fits.
    """
    source = str(recipe.weights)
    content, metadata = _torchvision_tensors(recipe) if source == "torchvision" else read_content(Path(source))
    fit = compare(model, as_state(content, model), class_names(metadata), classes)
    fit.source = f"weights {source}"
    if all(tensor.dim() < 2 for tensor in fit.loaded.values()):
        raise RecipeError(f"{fit.source} do not fit {recipe.variant}: nothing in them does\n{fit.table()}")
    return fill(model, fit)


class NetworkFile(NamedTuple):
    """The tensors of a file, and the AlexNet that they are of; `fit` says by names and shapes what fits of them."""

    source: Path | str
    content: Content
    metadata: dict[str, str]
    model: AlexNet  # on the device "meta"
    fit: Fit

    def fill(self, model: AlexNet) -> None:
        """Copies the tensors into a network of the same variant; those of the last layer if it has as many classes.
        Warns, with a table, of what does not fit, and of layers that look untrained."""
        same = model.num_classes == self.model.num_classes
        fit = compare(model, as_state(self.content, model), classes=None if same else ())
        fit.source, fit.notes = f"weights {self.source}", []
        fill(model, fit)
        if fit.misfits or fit.notes or fit.unused:
            warnings.warn(str(fit), stacklevel=3)
        model.metadata = self.metadata if same else {}
        model.input_scale = float(self.metadata.get("input_scale", model.input_scale))


def find_network(source: Path | str, variant: str | Variant | None = None) -> NetworkFile:
    """The file, and its variant: `variant`, or the one that the file names, or the one that its tensors fit. Raises as
    `AlexNet.load` does."""
    content, metadata = read_content(Path(source))
    wanted = get_variant(variant) if isinstance(variant, str) else variant
    named = metadata.get("variant")
    if named is not None and (not is_variant(named) or (wanted and wanted.name != named)):
        raise RecipeError(f"{source} holds the network {named}, not {wanted.name if wanted else 'an AlexNet'}")
    tried = [wanted] if wanted else [get_variant(named)] if named else list(VARIANTS.values())
    shapes = without_values(content)
    files = [NetworkFile(source, content, metadata, *_trial(shapes, one)) for one in tried]
    whole = [file for file in files if not file.fit.misfits]
    if len(whole) > 1:
        names = [file.model.variant.name for file in whole]
        raise RecipeError(f"{source} fits {', '.join(names)}: name the one it is, as variant={names[0]!r}")
    best = whole[0] if whole else min(files, key=lambda file: len(file.fit.misfits))
    if not whole and (wanted is None or not best.fit.loaded):
        name = best.model.variant.name
        unfit = f"do not fit {name}" if len(tried) == 1 else f"fit no variant whole; the nearest is {name}"
        raise RecipeError(f"weights {source} {unfit}:\n{best.fit.table()}")
    return best


def _trial(content: Content, variant: Variant) -> tuple[AlexNet, Fit]:
    """The network of a variant with the classes and channels of a file, without values, and what would fit it."""
    with torch.device("meta"):
        model = AlexNet(variant)
        state, layers = model.state_dict(), parameter_layers(model)
        first, last = f"{layers[0][0]}.weight", f"{layers[-1][0]}.weight"
        state |= renamed(as_state(content, model), list(state))[0]
        if state[first].dim() == 4 and state[last].dim() == 2:
            model = AlexNet(variant, state[last].shape[0], state[first].shape[1])
    return model, compare(model, as_state(content, model))


def read_checkpoint(path: Path) -> dict:
    """The tensors and numbers of a training checkpoint. Raises DataError if the file is missing or no checkpoint."""
    try:
        with path.open("rb") as file:
            require_whole(path, file.read(2))
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        checkpoint["state_dict"], checkpoint["global_step"]
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except Exception as error:  # torch.load raises a different type for each kind of damage
        raise DataError(f"{path} is not a checkpoint of a training run: {first_line(error)}") from error
    return checkpoint


def _torchvision_tensors(recipe: Recipe) -> tuple[Content, dict[str, str]]:
    from torchvision import models

    if not recipe.variant.startswith("torchvision"):
        expected = "weights torchvision are for the variants torchvision and torchvision/NAME"
        raise RecipeError(f"{expected}, got {recipe.variant}")
    name = "alexnet" if recipe.variant == "torchvision" else recipe.variant.removeprefix("torchvision/")
    weights = models.get_model_weights(name).DEFAULT
    url = weights.url
    try:
        tensors = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        return tensors, {"classes": json.dumps(weights.meta["categories"])}
    except (OSError, RuntimeError, UnpicklingError) as error:  # no network; another file than expected; a damaged one
        raise DataError(f"{url} cannot be downloaded: {first_line(error)}") from error
