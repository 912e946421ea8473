"""A training run as values: their types, defaults and limits, and the YAML files and flags that set them."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..data import SOURCES


class RecipeError(ValueError):
    """A recipe, key or value that does not exist; the message lists what does."""


@dataclass(frozen=True)
class Recipe:
    """Every value of a training run. Each can be set in YAML, by a flag of the same name, or with `--set key=value`."""

    name: str = "custom"  # of the recipe
    variant: str = "cifar"  # of AlexNet, or torchvision/NAME
    size: int | None = None  # edge of the image that torchvision/NAME takes; none: 224
    weights: str | None = None  # to start from: run folder, weights file, or torchvision; with a fresh last layer
    freeze: str = "none"  # keep the start weights of: features, or all but the last layer (backbone)
    layer_decay: float = 1.0  # learning rate of a layer as a share of the next one's
    # data
    data: str = "folder"  # kind of data set
    data_path: str | None = None  # where it lies
    val_fraction: float = 0.1  # of the images that come without a validation split; 0: watch the test split
    test_fraction: float = 0.2  # of the images that come without a test split
    split_seed: int = 0  # of these splits; not moved by `seed`
    limit: int = 0  # use at most so many images of each split; 0: all
    verify: bool = True  # decode every picture of a folder once before training
    skip_corrupt: bool = False  # leave damaged images out, and list them
    workers: int = -1  # loader processes; -1: as many as the data is worth
    # input
    channels: int = 3  # of the network's input
    mean: tuple[float, ...] = (0.5,)  # of the pixels in 0..1, one or one per channel
    std: tuple[float, ...] = (0.5,)
    # augmentation
    rotate: float = 0.0  # up to so many degrees
    shift: float = 0.0  # up to this share of the edge
    zoom: float = 0.0  # up to this share, in and out
    crop: float = 0.35  # smallest share of the area of a photograph that a random crop takes
    short_side: int | None = None  # instead: resize a photograph's short side to this, then crop anywhere
    pad: int = 0  # crop an image of fixed size after reflecting so many pixels beyond its edges
    flip: bool = False  # mirror every second image
    auto_augment: str = "none"  # a policy of torchvision: trivial, rand
    jitter: float = 0.0  # brightness, contrast and saturation, up to this share
    pca_noise: float = 0.0  # deviation of the paper's colour noise; 0.1 there
    erase: float = 0.0  # share of the images that lose a rectangle
    mixup: float = 0.0  # alpha of MixUp; 0: not
    cutmix: float = 0.0  # alpha of CutMix; with both, one is drawn for each batch
    views: int = 1  # crops averaged in the test: 1 the centre, 2 mirrored, 10 with the corners, as in the paper
    # optimisation
    epochs: int = 10
    max_steps: int = 0  # stop after so many, resumable; 0: no limit
    batch_size: int = 64  # per process
    opt: str = "adamw"
    lr: float = 1e-3  # at the peak
    momentum: float = 0.9  # of sgd
    nesterov: bool = False  # of sgd
    weight_decay: float = 0.0  # of weights; biases and norms have none
    schedule: str = "cosine"
    warmup: float = 0.05  # share of all steps in which the rate rises to the peak; not with plateau
    milestones: tuple[float, ...] = (0.5, 0.75)  # shares of all steps after which `step` divides the rate by 10
    patience: int = 5  # epochs without a better val/loss after which `plateau` divides the rate by 10
    ema: float = 0.0  # decay of the moving average of the weights that is tested instead of them; 0: none
    label_smoothing: float = 0.0
    dropout: float | None = None  # none: the variant's own
    clip: float = 0.0  # norm to which gradients are cut; 0: not
    monitor: str = "val/loss"  # decides which epoch is tested; none: the last
    # machine
    seed: int = 0
    accelerator: str = "auto"
    devices: str = "auto"  # how many, or which ("0,2")
    nodes: int = 1
    precision: str = "32-true"  # auto: bf16-mixed where the hardware multiplies bfloat16
    output: str | None = None  # run folder; none: runs/NAME-TIME

    @property
    def input_size(self) -> int:
        """Edge of the image that the network takes."""
        from ..variants import VARIANTS

        return VARIANTS[self.variant].input_size if self.variant in VARIANTS else self.size or 224

    def replace(self, values: Mapping[str, Any]) -> "Recipe":
        """A copy with `values`, each turned into its field's type; RecipeError for an unknown key or bad value."""
        unknown = [key for key in values if key not in TYPES]
        if unknown:
            raise RecipeError(f"unknown key {unknown[0]!r}; the keys are {', '.join(TYPES)}")
        changed = dataclasses.replace(self, **{key: _convert(key, value) for key, value in values.items()})
        changed._check()
        return changed

    def require_one_device(self, what: str) -> None:
        """RecipeError where the recipe asks for more devices than `what` runs on."""
        if self.devices not in ("auto", "1") or self.nodes > 1:
            raise RecipeError(f"{what} runs on 1 device, got devices {self.devices} and nodes {self.nodes}")

    def to_yaml(self) -> str:
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return yaml.safe_dump(values, sort_keys=False)

    def _check(self) -> None:
        from ..variants import VARIANTS

        peer = self.variant.startswith("torchvision/")
        for key, allowed in {**CHOICES, **({} if peer else {"variant": list(VARIANTS)})}.items():
            if getattr(self, key) not in allowed:
                raise RecipeError(f"unknown {key} {getattr(self, key)!r}; choose from {', '.join(map(str, allowed))}")
        if peer:
            from torchvision import models

            if self.variant.removeprefix("torchvision/") not in (known := models.list_models(module=models)):
                raise RecipeError(f"unknown variant {self.variant!r}; torchvision has {', '.join(known)}")
        for key, (low, high) in LIMITS.items():
            if (value := getattr(self, key)) is not None and not low <= value <= high:
                raise RecipeError(f"{key} must be between {low:g} and {high:g}, got {value:g}")
        for key in ("mean", "std"):
            if len(getattr(self, key)) not in (1, self.channels):
                raise RecipeError(f"{key} must have 1 or {self.channels} values, got {len(getattr(self, key))}")
        if self.val_fraction + self.test_fraction >= 1:
            raise RecipeError(f"val_fraction {self.val_fraction} and test_fraction {self.test_fraction} leave no image")
        if min(self.std) <= 0:
            raise RecipeError(f"std must be positive, got {min(self.std):g}")
        if self.size is not None and not peer:
            raise RecipeError(f"size {self.size} is for torchvision/NAME; {self.variant} has its own")
        if self.val_fraction == 0 and self.monitor != "none":
            raise RecipeError(f"val_fraction 0 needs monitor none, got {self.monitor}: the test split must not decide")
        if self.schedule == "plateau" and self.warmup:
            raise RecipeError(f"schedule plateau needs warmup 0, got {self.warmup:g}")
        if self.freeze != "none" and self.weights is None:
            raise RecipeError(f"freeze {self.freeze} needs weights")


TYPES: dict[str, Any] = typing.get_type_hints(Recipe)
CHOICES: dict[str, list] = {
    "data": list(SOURCES),
    "opt": ["sgd", "adam", "adamw"],
    "schedule": ["cosine", "step", "plateau", "constant"],
    "monitor": ["val/loss", "val/accuracy", "none"],
    "freeze": ["none", "features", "backbone"],
    "auto_augment": ["none", "trivial", "rand"],
    "views": [1, 2, 10],
    "channels": [1, 3],
    "accelerator": ["auto", "cpu", "gpu", "cuda"],
    "precision": ["auto", "32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true"],
}
LIMITS: dict[str, tuple[float, float]] = {
    "epochs": (1, 1e6), "max_steps": (0, 1e12), "batch_size": (1, 1e6), "lr": (0, 1e3), "momentum": (0, 1),
    "weight_decay": (0, 1e3), "warmup": (0, 1), "label_smoothing": (0, 1), "dropout": (0, 1), "clip": (0, 1e9),
    "val_fraction": (0, 1), "test_fraction": (0, 1), "rotate": (0, 180), "shift": (0, 1),
    "zoom": (0, 0.9), "crop": (0.01, 1), "nodes": (1, 1e6), "workers": (-1, 1024), "seed": (0, 2**31),
    "split_seed": (0, 2**31), "limit": (0, 1e12), "size": (16, 4096), "layer_decay": (0.01, 1),
    "short_side": (16, 4096),
    "pad": (0, 64), "jitter": (0, 1), "pca_noise": (0, 10), "erase": (0, 1), "mixup": (0, 100), "cutmix": (0, 100),
    "patience": (1, 1e6), "ema": (0, 0.999999),
}  # fmt: skip


def list_recipes() -> dict[str, str]:
    """The recipes of the package, with the first comment line of each file."""
    folder = resources.files("alexnet_cuda") / "recipes"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {f.name[:-5]: f.read_text("utf-8").splitlines()[0].lstrip("# ") for f in files}


def load_recipe(name: str, config: Path | str | None = None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe `name`, then the values of the YAML file `config`, then `overrides`.

    Raises RecipeError for an unknown recipe, key or value, and for a file that is not a YAML mapping.
    """
    if name not in (recipes := list_recipes()):
        raise RecipeError(f"unknown recipe {name!r}; choose from {', '.join(recipes)}")
    values = read_yaml(resources.files("alexnet_cuda") / "recipes" / f"{name}.yaml")
    return Recipe().replace(
        {**values, "name": name, **(read_yaml(Path(config)) if config else {}), **(overrides or {})}
    )


def read_yaml(path) -> dict[str, Any]:
    """The mapping that a YAML file holds; RecipeError, naming the file, where there is none."""
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecipeError(f"{path} must be a YAML mapping of keys to values")
    return values


def _convert(key: str, value: Any) -> Any:
    """`value`, a string from the command line or what YAML made of it, in the type of the field `key`."""
    kind = TYPES[key]
    optional = isinstance(kind, types.UnionType)
    if optional and value in (None, "", "none", "None"):
        return None
    kind = typing.get_args(kind)[0] if optional else kind
    try:
        if typing.get_origin(kind) is tuple:
            parts = value.strip("[]() ").split(",") if isinstance(value, str) else value
            return tuple(float(part) for part in (parts if isinstance(parts, list | tuple) else [parts]))
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[str(value).lower()]
        if kind is int:
            if float(value) != int(float(value)):
                raise ValueError
            return int(float(value))
        if value is None or isinstance(value, list | dict):
            raise ValueError
        return str(value) if kind is str else float(value)
    except (ValueError, KeyError, TypeError, OverflowError):
        name = "a list of numbers" if typing.get_origin(kind) is tuple else kind.__name__
        raise RecipeError(f"{key} must be {name}, got {value!r}") from None
