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
    by_layer, depth = recipe.layer_decay < 1, 0
    groups: dict[tuple[int, bool], dict] = {}
    for name, module in parameter_layers(model):
        depth += any(p is not None and p.dim() > 1 for p in module._parameters.values())
        for p in module.parameters(recurse=False):
            if p.requires_grad:
                matrix = p.dim() > 1
                kind, decay = ("weights", recipe.weight_decay) if matrix else ("biases", 0.0)
                new = {"params": [], "name": f"{name}.{kind}" if by_layer else kind, "weight_decay": decay}
                groups.setdefault((depth * by_layer, matrix), new)["params"].append(p)
    for (layer, _), group in groups.items():
        group["lr"] = recipe.lr * recipe.layer_decay ** (depth - layer)
    return [groups[key] for key in sorted(groups, key=lambda key: (not key[1], -key[0]))]
