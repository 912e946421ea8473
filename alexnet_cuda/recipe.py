"""The values of a training run: each is declared once, with its type, default, explanation, limits and resume rule.

The YAML files, the options of the command line with their help, the error messages and what a resumed run may change
all follow from these declarations.
"""

import dataclasses
import functools
import math
import os
import types
import typing
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from .errors import RecipeError
from .variants import get_variant, is_variant
from .words import closest, unknown

FOLDER = resources.files("alexnet_cuda") / "recipes"  # YAML files of the values that differ from the defaults
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
PATHS = ("data_path", "weights", "output")  # in which ~ is the home folder
# What a resumed run may do with a value.
FIXED = "fixed"  # not change it: the checkpoint fits no other value, or only the start of a run reads it
ON_REQUEST = "on request"  # change it with --allow-changes
FREE = "free"  # change it
MACHINE = "machine"  # change it; results with other values still belong to the same comparison or search


def value(default: Any, help: str, limits: tuple[float, float] | None = None, **rules: Any) -> Any:
    """A field of Recipe with its help and rules: `limits` (inclusive), `choices`, `resume` (ON_REQUEST if not given)
    and `section`, the heading in --help for this field and those below it.
    """
    return dataclasses.field(default=default, metadata={"help": help, "limits": limits, "resume": ON_REQUEST, **rules})


fixed, machine = functools.partial(value, resume=FIXED), functools.partial(value, resume=MACHINE)


@dataclass(frozen=True)
class Recipe:
    """Every value of a training run. Each can be set in YAML, by an option of the same name, or with `--set key=value`.
    Lengths are pixels, fractions and probabilities 0 to 1. None: not set."""

    # fmt: off
    name: str = value("custom", "Name of the recipe.", section="Network")
    variant: str = fixed("cifar", "Variant of AlexNet (see `alexnet-cuda summary`), or torchvision/NAME.")
    size: int | None = fixed(None,
        "Edge of the input image of torchvision/NAME (none: 224), torchvision or cifar_deep.", (16, 4096))
    weights: str | None = fixed(None,
        "Trained weights to start from, with a new last layer: a run folder, a weights file, "
        "torchvision, or cifar10, mnist, digits: weights of the package.")
    freeze: str = fixed("none", choices=("none", "features", "backbone"),
        help="Layers that keep the weights of --weights: the features, or all but the last layer (backbone).")
    whiten: bool = fixed(False,
        "Start the first layer with filters that whiten the patches of the images; not with --weights.")
    layer_decay: float = fixed(1.0, "Learning rate of a layer as a fraction of the next layer's.", (0.01, 1))

    data: str = fixed("folder", "Data set.", section="Data",
        choices=("digits", "mnist", "fashion-mnist", "cifar10", "flowers17", "bike-ship", "imagenet", "folder"))
    data_path: str | None = machine(None, "Folder of the data (for folder also a CSV file).")
    val_fraction: float = fixed(0.1, limits=(0, 1),
        help="Fraction of the images for validation, if the data has no such split; 0: none, with --monitor none.")
    test_fraction: float = fixed(0.2, "Fraction of the images for the test, if the data has no such split.", (0, 1))
    split_seed: int = fixed(0, "Seed of these two splits, which --seed does not change.", (0, 2**31))
    limit: int = fixed(0, "About so many images of each split, at least one of each class; 0: all.", (0, 1e12))
    verify: bool = value(True, "Decode every picture of a folder once before training, to find damaged ones.")
    skip_corrupt: bool = value(False, "Leave damaged pictures out and list them, instead of stopping.")
    workers: int = machine(-1, "Processes that load data; -1: chosen from the data and the CPU.", (-1, 1024))

    channels: int = fixed(3, "Channels of the network's input.", choices=(1, 3), section="Input")
    mean: tuple[float, ...] = value((0.5,), "Mean of the pixels in 0..1: one number, or one per channel.")
    std: tuple[float, ...] = value((0.5,), "Standard deviation of the pixels in 0..1: one number, or one per channel.")

    rotate: float = value(0.0, "Rotate by up to this many degrees.", (0, 180), section="Augmentation")
    shift: float = value(0.0, "Shift by up to this fraction of the edge.", (0, 1))
    zoom: float = value(0.0, "Zoom in or out by up to this fraction.", (0, 0.9))
    crop: float = value(0.35, "Smallest area of a random crop, as a fraction of the photograph's.", (0.01, 1))
    short_side: int | None = value(None,
        "Instead of --crop: resize a photograph's short side to this, then crop the input size anywhere.", (16, 4096))
    pad: int = value(0, "Extend an image of fixed size by this many reflected pixels, then crop its own size anywhere.",
        (0, 31))
    flip: bool = value(False, "Mirror half of the images, left to right.")
    auto_augment: str = value("none", "Augmentation policy of torchvision: TrivialAugmentWide or RandAugment.",
        choices=("none", "trivial", "rand"))
    jitter: float = value(0.0, "Change brightness, contrast and saturation by up to this fraction.", (0, 1))
    pca_noise: float = value(0.0,
        "Standard deviation of the AlexNet paper's colour noise (section 4.1); 0.1 in the paper.", (0, 10))
    erase: float = value(0.0, "Probability that a random rectangle of an image is erased.", (0, 1))
    mixup: float = value(0.0, "Alpha of MixUp; 0: none.", (0, 100))
    cutmix: float = value(0.0, "Alpha of CutMix; 0: none. With both, each batch gets one, drawn at random.", (0, 100))
    views: int = value(1, choices=(1, 2, 10),
        help="Crops averaged in the test: 1: the centre; 2: and its mirror image; 10: and the corners as in the paper.")

    epochs: int = value(10, "Passes over the training images.", (1, 1e6), resume=FREE, section="Optimisation")
    max_steps: int = value(0, "Stop after this many optimiser steps, so that --resume can continue; 0: no limit.",
        (0, 1e12), resume=FREE)
    batch_size: int = value(64, "Images per step and process.", (1, 1e6))
    opt: str = fixed("adamw", "Optimiser.", choices=("sgd", "adam", "adamw"))
    lr: float = value(1e-3, "Learning rate at its peak.", (0, 1e3))
    momentum: float = value(0.9, "Momentum of sgd.", (0, 1))
    nesterov: bool = value(False, "Nesterov's momentum with sgd.")
    bias_lr: float = value(1.0, "Learning rate of biases as a multiple of --lr.", (0, 1e3))
    weight_decay: float = value(0.0, "Weight decay of matrices and filters, not of biases and normalisation.", (0, 1e3))
    schedule: str = value("cosine", "Learning rate after the warm-up; step: see --milestones, plateau: see --patience.",
        choices=("cosine", "linear", "step", "plateau", "constant"))
    warmup: float = value(0.05, "Fraction of steps in which the learning rate rises linearly; 0 with plateau.", (0, 1))
    milestones: tuple[float, ...] = value((0.5, 0.75),
        "Fractions of all steps after which the schedule step divides the learning rate by 10.")
    patience: int = value(5,
        "Epochs without a lower val/loss after which the schedule plateau divides the learning rate by 10.", (1, 1e6))
    ema: float = value(0.0, limits=(0, 0.999999),
        help="Decay of the exponential moving average of the weights, which is tested in their place; 0: none.")
    label_smoothing: float = value(0.0, "Label smoothing of the cross-entropy.", (0, 1))
    dropout: float | None = value(None,
        "Dropout probability; none: the variant's own. Not for torchvision/NAME.", (0, 1))
    clip: float = value(0.0, "Largest norm of the gradients; 0: no clipping.", (0, 1e9))
    monitor: str = value("val/loss", "Metric that selects the epoch to test; none: the last epoch.",
        choices=("val/loss", "val/accuracy", "none"))

    seed: int = value(0, "Seed of initial weights, order, augmentation and dropout.", (0, 2**31), section="Machine")
    accelerator: str = machine("auto", "Device type.", choices=("auto", "cpu", "gpu", "cuda"))
    devices: str = machine("auto", "How many devices (2), or which (0,1); auto: all.")
    nodes: int = machine(1, "Machines.", (1, 1e6))
    precision: str = value("32-true", choices=("auto", "32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true"),
        help="Arithmetic of training; auto: bf16-mixed on GPUs and CPUs with matrix units for bfloat16, else 32-true.")
    output: str | None = machine(None, "Run folder; none: runs/RECIPE-TIME.")
    # fmt: on

    @property
    def input_size(self) -> int:
        """Edge of the image that the network takes."""
        return self.size or (get_variant(self.variant).input_size if is_variant(self.variant) else 224)

    @property
    def train_short_side(self) -> int:
        """Short side of a photograph of which no training crop is enlarged."""
        return self.short_side or math.ceil(self.input_size / math.sqrt(self.crop))

    @property
    def test_short_side(self) -> int:
        """Short side to which a photograph is resized before its centre is cropped: 8/7 of the edge unless given."""
        return self.short_side or self.input_size * 8 // 7

    def replace(self, values: Mapping[str, Any]) -> "Recipe":
        """A copy with `values`, each converted to its field's type; RecipeError for an unknown key or bad value."""
        for key in values:
            if key not in FIELDS:
                raise unknown_key(key)
        changed = dataclasses.replace(self, **{key: _convert(key, value) for key, value in values.items()})
        changed._check()
        return changed

    def changes(self, other: "Recipe") -> list[str]:
        """The keys whose values differ in `other`."""
        return [key for key in FIELDS if getattr(self, key) != getattr(other, key)]

    def require_one_device(self, what: str) -> None:
        """RecipeError where the recipe asks for more devices than `what` runs on."""
        if self.devices not in ("auto", "1") or self.nodes > 1:
            raise RecipeError(f"{what} runs on 1 device, got devices {self.devices} and nodes {self.nodes}")

    def to_yaml(self) -> str:
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return yaml.safe_dump(values, sort_keys=False)

    def _check(self) -> None:
        for key, field in FIELDS.items():
            own, choices, limits = getattr(self, key), field.metadata.get("choices"), field.metadata["limits"]
            if choices and own not in choices:
                raise RecipeError(unknown(key, own, map(str, choices)))
            if limits and own is not None and not limits[0] <= own <= limits[1]:
                raise RecipeError(f"{key} must be between {limits[0]:g} and {limits[1]:g}, got {own:g}")
        peer = self.variant.startswith("torchvision/")
        if peer:
            from torchvision import models

            if self.variant.removeprefix("torchvision/") not in (known := models.list_models(module=models)):
                peers = [f"torchvision/{name}" for name in known]
                raise RecipeError(unknown("variant", self.variant, peers))
        elif not self.variant.startswith("caffe/"):
            get_variant(self.variant)
        for key in ("mean", "std"):
            if len(getattr(self, key)) not in (1, self.channels):
                raise RecipeError(f"{key} must have 1 or {self.channels} values, got {len(getattr(self, key))}")
        val, test = self.val_fraction, self.test_fraction
        for wrong, message in (
            (val + test >= 1, f"val_fraction {val} and test_fraction {test} leave no image"),
            (min(self.std) <= 0, f"std must be positive, got {min(self.std):g}"),
            (self.size and not takes_sizes(self.variant),
             f"size {self.size} is for torchvision/NAME, torchvision and cifar_deep, not {self.variant}"),
            (peer and self.channels != 3, f"{self.variant} takes 3 channels, got channels {self.channels}"),
            (val == 0 and self.monitor != "none",
             f"val_fraction 0 needs monitor none, got {self.monitor}: the test split must not decide"),
            (val == 0 and self.schedule == "plateau",
             "val_fraction 0 needs another schedule than plateau: the test split must not decide"),
            (self.schedule == "plateau" and self.warmup, f"schedule plateau needs warmup 0, got {self.warmup:g}"),
            (not all(0 < share < 1 for share in self.milestones),
             f"milestones must be fractions of all steps, between 0 and 1, got {self.milestones}"),
            (self.opt == "sgd" and self.nesterov and not self.momentum, "nesterov needs a momentum above 0"),
            (self.pca_noise and self.channels == 1, f"pca_noise {self.pca_noise:g} is for colours, got channels 1"),
            ((self.short_side or 4096) < self.input_size,
             f"short_side must be at least the {self.input_size} pixels of {self.variant}, got {self.short_side}"),
            (self.freeze != "none" and self.weights is None, f"freeze {self.freeze} needs weights"),
        ):  # fmt: skip
            if wrong:
                raise RecipeError(message)


FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}
TYPES: dict[str, Any] = typing.get_type_hints(Recipe)
OTHER_NAMES = {"learning_rate": "lr", "optimizer": "opt", "optimiser": "opt",
               "scheduler": "schedule", "model": "variant",
               "dataset": "data", "wd": "weight_decay", "bs": "batch_size", "device": "accelerator"}  # fmt: skip


def unknown_key(key: str) -> RecipeError:
    meant = OTHER_NAMES.get(key) or closest(key, FIELDS)
    remedy = f"did you mean {meant}?" if meant else "`alexnet-cuda recipes RECIPE` shows all keys"
    return RecipeError(f"unknown key {key!r}; {remedy}")


def resume_rule(key: str) -> str:
    """FIXED, ON_REQUEST, FREE or MACHINE."""
    return FIELDS[key].metadata["resume"]


def command(recipe: Recipe) -> str:
    """What to type for the same run on another machine: the recipe's name, and what differs from it."""
    words = ["alexnet-cuda train", recipe.name, *(["--data-path DIR"] if recipe.data != "digits" else [])]
    for key in load_recipe(recipe.name).changes(recipe):
        if resume_rule(key) != MACHINE:
            own = getattr(recipe, key)
            text = ",".join(map(str, own)) if isinstance(own, tuple) else str(own)
            words.append(f"--{key.replace('_', '-')} {text.lower() if isinstance(own, bool) else text}")
    return " ".join(words)


def list_recipes() -> dict[str, str]:
    """The recipes of the package, with the first comment line of each file."""
    files = sorted((f for f in FOLDER.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {f.name[:-5]: f.read_text("utf-8").splitlines()[0].lstrip("# ") for f in files}


def takes_sizes(variant: str) -> bool:
    """Whether the network takes images of any size: it pools what is left of them to one."""
    return not is_variant(variant) or get_variant(variant).average_pool is not None


def load_recipe(name: str, config: Path | str | None = None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe `name`, then the values of the YAML file `config`, then `overrides`. Raises RecipeError for an unknown
    recipe, key or value, and for a file that is not a YAML mapping."""
    if name not in (recipes := list_recipes()):
        raise RecipeError(unknown("recipe", name, recipes))
    values = read_yaml(FOLDER / f"{name}.yaml")
    own = read_yaml(Path(config)) if config else {}
    return Recipe().replace({**values, "name": name, **own, **(overrides or {})})


def read_recipe(path: Path) -> Recipe:
    """The recipe in the config.yaml of a run; RecipeError, naming the file, where it has a wrong key or value."""
    values = read_yaml(path)
    try:
        return Recipe().replace(values)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


class OnceLoader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, of which YAML would take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := next((key for key, number in keys.items() if number > 1), None):
            raise yaml.YAMLError(f"it has the key {twice!r} twice")
        return super().construct_mapping(node, deep)


def read_yaml(path) -> dict[str, Any]:
    """The mapping that a YAML file holds; RecipeError, naming the file, where there is none."""
    try:
        values = OnceLoader(path.read_text("utf-8")).get_single_data()
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
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
            numbers = tuple(float(part) for part in (parts if isinstance(parts, list | tuple) else [parts]))
            if not all(map(math.isfinite, numbers)):
                raise ValueError
            return numbers
        if kind is bool:
            return BOOLEANS[str(value).lower()]
        if kind is int:
            if float(value) != int(float(value)):
                raise ValueError
            return int(float(value))
        if value is None or isinstance(value, list | dict):
            raise ValueError
        if key in PATHS and str(value).startswith("~/"):
            return os.path.expanduser(str(value))
        return str(value) if kind is str else float(value)
    except (ValueError, KeyError, TypeError, OverflowError):
        name = "a list of numbers" if typing.get_origin(kind) is tuple else kind.__name__
        raise RecipeError(f"{key} must be {name}, got {value!r}") from None
