"""Picture files through a trained network. Imports nothing of training, whose libraries load for seconds."""

from pathlib import Path

import torch
from torch import Tensor

from .data import source
from .data.augmentation import Normalise, eval_transform
from .recipe import Recipe


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def read_pixels(recipe: Recipe, path: Path) -> Tensor:
    """uint8 (C, H, W) of a picture file, preprocessed as the images of the test split. Raises DataError if it cannot be
    read."""
    images = source(recipe)
    return eval_transform(recipe, images.SIZE)(images.read(recipe, path))


@torch.inference_mode()
def classify(model: torch.nn.Module, recipe: Recipe, path: Path) -> Tensor:
    """Probabilities (classes,) of a picture file. Raises DataError if it cannot be read."""
    x = Normalise(recipe)(read_pixels(recipe, path)[None].to(best_device()))
    return model.to(x.device).eval()(x)[0].float().softmax(0).cpu()
