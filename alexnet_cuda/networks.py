"""The network of a recipe."""

import torch
from torch import nn

from .errors import RecipeError, first_line
from .model import AlexNet
from .recipe import Recipe


def build(recipe: Recipe, classes: int) -> nn.Module:
    """The network `recipe.variant` with `classes` scores and fresh weights, in channels_last memory format. Raises
    RecipeError for a network of import-caffe, which is in its run folder only."""
    if recipe.variant.startswith("caffe/"):
        raise RecipeError(f"{recipe.variant} cannot be trained: it is a network of import-caffe")
    if recipe.variant.startswith("torchvision/"):
        from torchvision.models import get_model

        extra = {"aux_logits": False} if recipe.variant in ("torchvision/googlenet", "torchvision/inception_v3") else {}
        model = get_model(recipe.variant.removeprefix("torchvision/"), num_classes=classes, **extra)
    else:
        model = AlexNet(recipe.variant, classes, recipe.channels, recipe.dropout)
    return model.to(memory_format=torch.channels_last)


def count_parameters(recipe: Recipe, classes: int) -> int:
    """Of the network that `build` makes. Raises RecipeError for images that are too small for it."""
    with torch.device("meta"):
        model = build(recipe, classes).eval()
        edge = recipe.input_size
        try:
            model(torch.empty(1, recipe.channels, edge, edge))
        except (RuntimeError, ValueError) as error:
            reason = f"{recipe.variant} does not take images of {edge}x{edge} pixels"
            raise RecipeError(f"{reason}, a larger --size may do: {first_line(error)}") from error
    return sum(p.numel() for p in model.parameters())
