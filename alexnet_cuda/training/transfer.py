"""Training of a network that starts from trained weights: frozen layers, and learning rates by depth."""

from torch import nn

from ..recipe import Recipe
from ..weights import parameter_layers


def frozen(model: nn.Module, recipe: Recipe) -> list[nn.Module]:
    """Excludes the layers that `recipe.freeze` names from training and returns them."""
    layers = parameter_layers(model)[:-1] if recipe.freeze != "none" else []
    modules = [module for name, module in layers if recipe.freeze == "backbone" or name.startswith("features.")]
    for module in modules:
        module.requires_grad_(False)
    return modules


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Groups of trainable parameters for an optimiser: matrices with weight decay, vectors without.

    With `recipe.layer_decay` d < 1 each layer with weights has groups of its own, and a layer with k layers behind it
    has the learning rate lr * d^k. A normalisation layer counts with the layer before it.
    """
    depth, stages = 0, []
    for name, module in parameter_layers(model):
        depth += any(p is not None and p.dim() > 1 for p in module._parameters.values())
        stages.append((depth, name, module))
    groups: dict[tuple[int, bool], dict] = {}
    for stage, name, module in stages:
        for p in module.parameters(recurse=False):
            if not p.requires_grad:
                continue
            matrix, key = p.dim() > 1, stage if recipe.layer_decay < 1 else depth
            kind = "weights" if matrix else "biases"
            new = {
                "params": [],
                "name": f"{name}.{kind}" if recipe.layer_decay < 1 else kind,
                "weight_decay": recipe.weight_decay if matrix else 0.0,
                "lr": recipe.lr * recipe.layer_decay ** (depth - key),
            }
            groups.setdefault((key, matrix), new)["params"].append(p)
    return [groups[key] for key in sorted(groups, key=lambda key: (not key[1], -key[0]))]
