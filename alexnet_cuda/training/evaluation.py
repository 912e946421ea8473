"""What a trained network says about images, the figures that follow, and the weights file that others may load."""

import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
import torchmetrics.functional.classification as tm
import yaml
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ..data import DataError, ImageSet, atomic_path, source
from ..data.module import ImageData, Normalise, plain
from .classifier import build
from .recipe import Recipe


@dataclass
class Predictions:
    """Class scores before softmax (N, classes) and labels (N,), on the CPU."""

    logits: Tensor
    labels: Tensor

    @property
    def probabilities(self) -> Tensor:
        return self.logits.softmax(1)


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def predict(model: torch.nn.Module, images: ImageSet, recipe: Recipe) -> Predictions:
    """The network's scores for the whole test split, with a progress bar where it takes long."""
    data = ImageData(images, recipe)
    loader, device = data.test_dataloader(), best_device()
    model.to(device).eval()
    batches = _progress(loader, "testing", len(images.test.labels) > 1000)
    parts = [(_scores(model, data.normalise, x.to(device)), labels) for x, labels in batches]
    return Predictions(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))


@torch.inference_mode()
def predict_files(model: torch.nn.Module, recipe: Recipe, paths: list[Path]) -> Tensor:
    """Probabilities (N, classes) for picture files, read as the training images were."""
    images, device = source(recipe), best_device()
    normalise, transform = Normalise(recipe), plain(recipe, images.SIZE)
    model.to(device).eval()
    pictures = _progress(paths, "reading", len(paths) > 100)
    rows = [model(normalise(transform(images.read(recipe, path))[None].to(device))).float().cpu() for path in pictures]
    return torch.cat(rows).softmax(1)


def _scores(model: torch.nn.Module, normalise: Normalise, x: Tensor) -> Tensor:
    """Scores of images (N, C, H, W); of images with views (N, V, C, H, W) the logarithm of the mean probability."""
    scores = model(normalise(x.reshape(-1, *x.shape[-3:]))).float().cpu()
    return scores if x.dim() == 4 else scores.reshape(*x.shape[:2], -1).softmax(-1).mean(1).clamp(min=1e-38).log()


def _progress(items: Iterable, what: str, long: bool) -> Iterable:
    return track(items, what, transient=True, disable=not (long and Console().is_terminal))


def figures(predictions: Predictions) -> dict[str, float]:
    """Accuracy, top-5 where there are more classes, loss, macro F1, calibration error: all but the loss in 0..1."""
    p, labels = predictions.probabilities, predictions.labels
    classes = p.shape[1]
    values = {"accuracy": tm.multiclass_accuracy(p, labels, classes, average="micro")}
    if classes > 5:
        values["top5"] = tm.multiclass_accuracy(p, labels, classes, average="micro", top_k=5)
    values["loss"] = F.cross_entropy(predictions.logits, labels)
    values["f1"] = tm.multiclass_f1_score(p, labels, classes)
    values["calibration_error"] = tm.multiclass_calibration_error(p, labels, classes)
    return {f"test/{name}": round(value.item(), 6) for name, value in values.items()}


def save_weights(path: Path, model: torch.nn.Module, recipe: Recipe, classes: list[str]) -> None:
    """The network's tensors with, as text, the class names and the recipe: all that `load_weights` needs."""
    write_tensors(
        path, model.state_dict(), {"format": "pt", "classes": json.dumps(classes), "recipe": recipe.to_yaml()}
    )


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, metadata))


def load_weights(folder: Path) -> tuple[torch.nn.Module, Recipe, list[str]]:
    """The network, recipe and class names of a run folder (or of a weights file). DataError where it has none."""
    path = folder / "weights.safetensors" if folder.is_dir() else folder
    if not path.exists():
        raise DataError(f"{path} does not exist; expected the folder of a run that ended, or a weights.safetensors")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        recipe = Recipe().replace(yaml.safe_load(metadata["recipe"]))
        classes = json.loads(metadata["classes"])
        model = build(recipe, len(classes))
        model.load_state_dict(tensors)
    except Exception as error:  # every layer of such a file raises its own kind
        raise DataError(f"{path} is not a weights file of a run: {str(error).splitlines()[0]}") from error
    return model, recipe, classes


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    from .. import __version__

    others = ("torch", "torchvision", "lightning", "torchmetrics")
    return {
        "alexnet_cuda": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in others},
    }
