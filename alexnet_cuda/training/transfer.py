"""Starting from trained weights: loading them, freezing, and smaller steps for earlier layers."""

from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..data import DataError
from .recipe import Recipe, RecipeError


def start_from(model: nn.Module, recipe: Recipe) -> None:
    """Gives `model` the tensors of `recipe.weights`, all but those of its last layer, which stays fresh.

    `recipe.weights` is a run folder, a file of tensors (.safetensors, or .pt, .pth, .ckpt, of which nothing but tensors
    is unpickled), a .caffemodel, or "torchvision": ImageNet weights, downloaded once, for torchvision's networks.
    Raises DataError where there is no such file or it is no weights file; RecipeError where a tensor does not fit.
    """
    assert recipe.weights is not None
    tensors = _read(recipe)
    fresh = f"{layers(model)[-1][0]}."
    for name, own in model.state_dict().items():
        if name.startswith(fresh):
            tensors.pop(name, None)
        elif name not in tensors or tensors[name].shape != own.shape:
            has = f"{tuple(tensors[name].shape)}" if name in tensors else "nothing"
            raise RecipeError(
                f"weights {recipe.weights} do not fit {recipe.variant}: for {name} {tuple(own.shape)} they have {has}"
            )
    model.load_state_dict(tensors, strict=False)


def frozen(model: nn.Module, recipe: Recipe) -> list[nn.Module]:
    """The modules with parameters that `recipe.freeze` keeps as they are; theirs no longer require a gradient."""
    named = layers(model)
    if recipe.freeze == "features":
        kept = [module for name, module in named[:-1] if name.startswith("features.")]
    else:
        kept = [module for _, module in named[:-1]] if recipe.freeze == "backbone" else []
    for module in kept:
        module.requires_grad_(False)
    return kept


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that hold parameters themselves, in the order of definition: the last one gives the class scores."""
    return [(name, module) for name, module in model.named_modules() if module._parameters]


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Trainable parameters for an optimiser: matrices with weight decay, vectors without.

    With `recipe.layer_decay` d < 1 there are two groups for each layer with weights; a layer that k others follow has
    d^k of the learning rate. Normalisation goes with the weights before it.
    """
    depth, stages = 0, []
    for name, module in layers(model):
        depth += any(p is not None and p.dim() > 1 for p in module._parameters.values())
        stages.append((depth, name, module))
    groups: dict[tuple[int, bool], dict] = {}
    for stage, name, module in stages:
        for p in module.parameters(recurse=False):
            if not p.requires_grad:
                continue
            matrix, key = p.dim() > 1, stage if recipe.layer_decay < 1 else depth
            if (key, matrix) not in groups:
                kind = "weights" if matrix else "biases"
                groups[key, matrix] = {
                    "params": [],
                    "name": f"{name}.{kind}" if recipe.layer_decay < 1 else kind,
                    "weight_decay": recipe.weight_decay if matrix else 0.0,
                    "lr": recipe.lr * recipe.layer_decay ** (depth - key),
                }
            groups[key, matrix]["params"].append(p)
    return [groups[key] for key in sorted(groups, key=lambda key: (not key[1], -key[0]))]


def _read(recipe: Recipe) -> dict[str, Tensor]:
    if recipe.weights == "torchvision":
        return _from_torchvision(recipe)
    path = Path(str(recipe.weights))
    path = path / "weights.safetensors" if path.is_dir() else path
    if not path.exists():
        raise DataError(f"{path} does not exist; weights must be a run folder, a file or torchvision")
    if path.suffix == ".caffemodel":
        from ..caffe import state_dict_from_caffe

        return state_dict_from_caffe(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        if "state_dict" in tensors:  # a checkpoint of a run
            tensors = {k.removeprefix("model."): v for k, v in tensors["state_dict"].items() if k.startswith("model.")}
        return {str(name): tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    except Exception as error:  # torch.load raises a different type for every kind of damage
        raise DataError(f"{path} is not a file of tensors: {str(error).splitlines()[0]}") from error


def _from_torchvision(recipe: Recipe) -> dict[str, Tensor]:
    from torchvision import models

    name = "alexnet" if recipe.variant == "torchvision" else recipe.variant.removeprefix("torchvision/")
    if not recipe.variant.startswith("torchvision"):
        raise RecipeError(
            f"weights torchvision are for the variants torchvision and torchvision/NAME, got {recipe.variant}"
        )
    url = models.get_model_weights(name).DEFAULT.url
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except OSError as error:
        raise DataError(f"{url} cannot be downloaded: {error}") from error
