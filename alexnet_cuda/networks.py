"""The network of a recipe."""

import torch
from torch import nn

from .model import AlexNet
from .recipe import Recipe


def build(recipe: Recipe, classes: int) -> nn.Module:
    """The network `recipe.variant` with `classes` scores and fresh weights, in channels_last memory format."""
    if recipe.variant.startswith("torchvision/"):
        from torchvision.models import get_model

        extra = {"aux_logits": False} if recipe.variant in ("torchvision/googlenet", "torchvision/inception_v3") else {}
        model = get_model(recipe.variant.removeprefix("torchvision/"), num_classes=classes, **extra)
    else:
        model = AlexNet(recipe.variant, classes, recipe.channels, recipe.dropout)
    return model.to(memory_format=torch.channels_last)
