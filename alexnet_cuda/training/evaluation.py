"""Predictions of a trained network, and the metrics computed from them."""

import platform
import sys
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
import torchmetrics.functional.classification as tm
from torch import Tensor

from .._version import VERSION
from ..classify import best_device
from ..data import ImageSet
from ..data.augmentation import Normalise
from ..data.imageset import progress
from ..data.module import ImageData
from ..recipe import Recipe


@dataclass
class Predictions:
    """Class scores before softmax (N, classes) and labels (N,), on the CPU."""

    logits: Tensor
    labels: Tensor

    @property
    def probabilities(self) -> Tensor:
        return self.logits.softmax(1)


@torch.inference_mode()
def predict(model: torch.nn.Module, images: ImageSet, recipe: Recipe) -> Predictions:
    """The network's scores for the test split, with a progress bar for more than 1000 images."""
    data = ImageData(images, recipe)
    loader, device = data.test_dataloader(), best_device()
    model.to(device).eval()
    batches = progress(loader, "testing", len(loader), len(images.test.labels) > 1000)
    parts = [(_scores(model, data.normalise, x.to(device)), labels) for x, labels in batches]
    return Predictions(*(torch.cat(tensors) for tensors in zip(*parts)))


def _scores(model: torch.nn.Module, normalise: Normalise, x: Tensor) -> Tensor:
    """Scores (N, classes) of images (N, C, H, W); of images with V views each (N, V, C, H, W), the logarithm of the
    mean probability. The views take no more memory than one of each image would."""
    parts = x.reshape(-1, *x.shape[-3:]).split(max(len(x), 1))
    scores = torch.cat([model(normalise(part)).float().cpu() for part in parts])
    return scores if x.dim() == 4 else scores.reshape(*x.shape[:2], -1).softmax(-1).mean(1).clamp(min=1e-38).log()


def figures(predictions: Predictions) -> dict[str, float]:
    """Accuracy, top-5 accuracy (of more than 5 classes), cross-entropy, macro F1 and calibration error, by name."""
    p, labels = predictions.probabilities, predictions.labels
    classes = p.shape[1]
    values = {"accuracy": tm.multiclass_accuracy(p, labels, classes, average="micro")}
    if classes > 5:
        values["top5"] = tm.multiclass_accuracy(p, labels, classes, average="micro", top_k=5)
    values["loss"] = F.cross_entropy(predictions.logits, labels)
    values["f1"] = tm.multiclass_f1_score(p, labels, classes)
    values["calibration_error"] = tm.multiclass_calibration_error(p, labels, classes)
    return {f"test/{name}": round(value.item(), 6) for name, value in values.items()}


def run_facts(model: torch.nn.Module, recipe: Recipe, images: ImageSet, predictions: Predictions) -> dict[str, Any]:
    """What metrics.json says of a trained network: its recipe and size, its `figures`, and the size of each split."""
    return {
        "recipe": recipe.name,
        "variant": recipe.variant,
        "parameters": sum(p.numel() for p in model.parameters()),
        **figures(predictions),
        "images": {name: sum(counts) for name, counts in images.counts().items()},
    }


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def peak_memory() -> int | None:
    """The most memory that this process has held, in MiB: on the GPU if there is one, else in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit >> 20


def versions() -> dict[str, str]:
    others = {name: version(name) for name in ("torch", "torchvision", "lightning", "torchmetrics")}
    return {"alexnet_cuda": VERSION, "python": platform.python_version(), **others}
