"""AlexNet, built from a `Variant`: one module per layer, in the variant's order."""

import dataclasses
import json
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import fusion, pretrained, variants
from . import nn as layers
from ._torch_private import transforms_active
from .errors import DataError
from .variants import Variant, get_variant, is_variant

# Pixels 0..255 minus their mean are this many times as large as images normalised with ImageNet's mean and standard
# deviation (0.229, 0.224, 0.225 of the range 0..1).
PIXELS_PER_UNIT = 255 * 0.226
# The kinds of layers that each part of a variant may have.
PLACES = {
    "features": (variants.Conv, variants.LRN, variants.ReLU, variants.Tanh, variants.MaxPool, variants.BatchNorm),
    "classifier": (variants.Linear, variants.ReLU, variants.Tanh, variants.BatchNorm, variants.Dropout),
}


class AlexNet(nn.Module):
    """An AlexNet: images (N, C, H, W) or (C, H, W) to class scores (N, num_classes) or (num_classes,), before softmax.

    `features`, `avgpool` and `classifier` hold the layers as separate modules; the weights of the variant "torchvision"
    go both ways between this class and torchvision.models.alexnet.

    Input scale and initialisation belong together. The networks of 2012 to 2014 drew their weights (std .01, biases up
    to 1) for pixels 0..255 minus the mean; on images normalised to mean 0 and standard deviation 1, everything after
    the first layer is then nearly constant, and the loss stays at ln(num_classes). So with input="normalized" the
    forward pass multiplies the image by 255 * 0.226 = 57.63 where the variant's initialisation is of that kind (paper,
    original2012, caffe, caffenet, owt) and by 1 elsewhere; original weights, too, then take normalised images, within
    2 % of the pixels they were trained on. With input="pixels" nothing is multiplied.

    Args:
        variant: one of `list_variants()`, or a `variants.Variant`.
        num_classes: scores per image; None for the variant's number.
        in_channels: channels of the image; None for the variant's number.
        dropout: probability of every dropout layer; None for the variant's (.5, but .4 in flowers_bn, .3 in cifar).
        input: "normalized" (mean 0, standard deviation 1) or "pixels" (0..255 minus the mean, for such variants).
        weights: trained weights: "cifar10", "mnist" or "digits" of the package (variant "cifar"), or what `load` takes.
            num_classes and in_channels are then the file's by default; with another num_classes the last layer keeps
            its random weights.

    Attributes:
        metadata: of the file of these weights: "classes" (JSON), "recipe" (YAML; mean and std are in it); or empty.
        fused: while True, neighbouring layers run as one operator where `fusion` has one: ReLU, LRN and max pooling
            (with an 11x11 convolution before them), convolution and ReLU, linear layer and ReLU. Modules with hooks
            always run one by one. Results agree to rounding.

    Raises:
        ValueError: an unknown variant or input, fewer than one class or channel, dropout outside 0..1; in the
            forward pass, an image with another number of channels or of a size the linear layers cannot take.
        TypeError: an image that is not floating-point.
        errors.DataError, errors.RecipeError: weights that do not exist, are damaged, or are of another network.

    Sources: those of each variant, in `variants`.
    """

    def __init__(
        self,
        variant: str | Variant = "paper",
        num_classes: int | None = None,
        in_channels: int | None = None,
        dropout: float | None = None,
        *,
        input: str = "normalized",
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.variant = variant if isinstance(variant, Variant) else get_variant(variant)
        self.metadata: dict[str, str] = {}
        file = None if weights is None else _find_network(weights, self.variant)
        if file is not None:
            if file.fit.misfits:
                raise DataError(f"weights {weights} do not fit {self.variant.name}:\n{file.fit.table()}")
            if in_channels not in (None, file.model.in_channels):
                raise DataError(f"weights {weights} take {file.model.in_channels} channels, not {in_channels}")
            num_classes = file.model.num_classes if num_classes is None else num_classes
            in_channels = file.model.in_channels
        self.num_classes = self.variant.num_classes if num_classes is None else num_classes
        in_channels = self.variant.channels if in_channels is None else in_channels
        for name, value in (("num_classes", self.num_classes), ("in_channels", in_channels)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"AlexNet: expected {name} to be a positive integer, got {value!r}")
        if dropout is not None and not 0 <= dropout <= 1:
            raise ValueError(f"AlexNet: expected dropout to be between 0 and 1, got {dropout!r}")
        if input not in ("normalized", "pixels"):
            raise ValueError(f"AlexNet: expected input to be 'normalized' or 'pixels', got {input!r}")
        self.input_scale = PIXELS_PER_UNIT if self.variant.pixels and input == "normalized" else 1.0
        self.fused = True

        side = self.variant.average_pool
        self.feature_size = (side,) * 2 if side else self.variant.feature_size(*(self.variant.input_size,) * 2)
        self.features, channels = self._build("features", in_channels, dropout)
        self.avgpool = nn.AdaptiveAvgPool2d(side) if side else nn.Identity()
        units = channels * self.feature_size[0] * self.feature_size[1]
        self.classifier, _ = self._build("classifier", units, dropout)
        self.reset_parameters()
        if file is not None:
            file.fill(self)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> "AlexNet":
        """`load`, also of a repository "owner/name" of the Hugging Face Hub (extra `hub`)."""
        is_name = isinstance(source, str) and source.count("/") == 1 and not Path(source).exists()
        return cls.load(pretrained.download(str(source)) if is_name else source, **options)

    def save_pretrained(
        self,
        folder: str | Path,
        classes: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        """Write `folder`/model.safetensors for `from_pretrained`, `AlexNet(weights=...)` and `alexnet-cuda predict
        --weights`; with config.json and README.md for readers.

        Args:
            folder: made if there is none.
            classes: a name per score; None: those of `metadata`, or 0, 1, 2 ...
            mean, std: of the pixels in 0..1, one number or one per channel; None: those of `metadata`. Without them
                `alexnet-cuda predict` cannot use the file.

        Raises: ValueError for another number of classes, a mean without std, or a variant that is not the package's.
        """
        pretrained.save(Path(folder), self.state_dict(), self._described(classes, mean, std))

    def push_to_hub(
        self,
        name: str,
        classes: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        private: bool = False,
    ) -> str:
        """Write what `save_pretrained` writes to the repository `name` ("owner/name") of the Hugging Face Hub (extra
        `hub`, after `hf auth login`). Returns its address."""
        return pretrained.upload(name, self.state_dict(), self._described(classes, mean, std), private)

    def _described(
        self, classes: Sequence[str] | None, mean: Sequence[float] | None, std: Sequence[float] | None
    ) -> dict[str, str]:
        name, count = self.variant.name, self.num_classes
        if not is_variant(name) or get_variant(name) != self.variant:
            raise ValueError(f"AlexNet: expected one of list_variants() to save, got the variant {name!r} of your own")
        known = json.loads(self.metadata["classes"]) if "classes" in self.metadata else [str(i) for i in range(count)]
        names = list(known if classes is None else classes)
        if len(names) != count:
            raise ValueError(f"AlexNet: expected {count} class names, got {len(names)}")
        if (mean is None) != (std is None):
            raise ValueError(f"AlexNet: expected mean and std together, got {mean} and {std}")
        facts = {"variant": name, "classes": json.dumps(names), "input_scale": str(self.input_scale)}
        if mean is not None and std is not None:
            values = {"variant": name, "channels": self.in_channels, "mean": list(mean), "std": list(std)}
            facts["recipe"] = json.dumps(values)  # JSON is YAML
        return self.metadata | facts

    @classmethod
    def load(cls, file: str | os.PathLike[str], variant: str | None = None, **options: Any) -> "AlexNet":
        """The network of a file of weights, in evaluation mode: docs/weights.md lists the kinds of files.

        Classes, channels and `metadata` are those of the file. Without `variant` it is the one that the file names, or
        that its tensors fit. `options` are those of AlexNet: dropout, input, and num_classes for a new last layer.
        Nothing in the file is executed. Warns, with a table, where a tensor does not fit the variant that was asked
        for, and where layers look untrained.

        Raises: DataError if there is no such file or it holds no tensors; RecipeError if it is of another network,
            nothing fits, or more than one variant does. Both are in `alexnet_cuda.errors`.
        """
        found = _find_network(file, variant)
        sizes = {"num_classes": found.model.num_classes, "in_channels": found.model.in_channels}
        model = cls(found.model.variant, **(sizes | options))
        found.fill(model)
        return model.eval()

    def _build(self, place: str, channels: int, dropout: float | None) -> tuple[nn.Sequential, int]:
        """The modules of `variant.features` or `variant.classifier`, and the channels or units they end with."""
        modules: list[nn.Module] = []
        for layer in getattr(self.variant, place):
            if not isinstance(layer, PLACES[place]):
                where = "among its features" if place == "features" else "in its classifier"
                raise ValueError(f"AlexNet: variant {self.variant.name!r} has {layer} {where}")
            match layer:
                case variants.Conv(filters, kernel_size, stride, padding, groups, ceil_mode, bias):
                    geometry = kernel_size, stride, padding
                    conv = layers.Conv2d(channels, filters, *geometry, groups=groups, bias=bias, ceil_mode=ceil_mode)
                    modules.append(conv)
                    channels = filters
                case variants.Linear(units):
                    modules.append(nn.Linear(channels, units or self.num_classes))
                    channels = units or self.num_classes
                case variants.LRN():
                    modules.append(layers.LocalResponseNorm(**dataclasses.asdict(layer)))
                case variants.MaxPool(kernel_size, stride, ceil_mode):
                    modules.append(layers.MaxPool2d(kernel_size, stride, ceil_mode=ceil_mode))
                case variants.BatchNorm(eps, momentum):
                    norm = nn.BatchNorm2d if place == "features" else nn.BatchNorm1d
                    modules.append(norm(channels, eps, momentum))
                case variants.Dropout(p):
                    modules.append(nn.Dropout(p if dropout is None else dropout))
                case variants.ReLU():
                    modules.append(nn.ReLU())
                case variants.Tanh():
                    modules.append(nn.Tanh())
        return nn.Sequential(*modules), channels

    @property
    def in_channels(self) -> int:
        """Channels of the image, as the first convolution has them."""
        return next(module.in_channels for module in self.features if isinstance(module, nn.Conv2d))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every weight and set every bias as the variant says; batch normalisation starts afresh."""
        specs = (*self.variant.features, *self.variant.classifier)
        inits = iter([layer.init for layer in specs if isinstance(layer, variants.Conv | variants.Linear)])
        for module in (*self.features, *self.classifier):
            if isinstance(module, nn.Conv2d | nn.Linear):
                _initialise(module, next(inits))
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        images = self._with_memory_format(x if x.dim() == 4 else x[None])  # (N, C, H, W)
        features = self._run(self.features, images, self.input_scale)
        features = self.avgpool(features)  # (N, 256, 6, 6) in most variants
        scores = self._run(self.classifier, torch.flatten(features, 1))  # (N, num_classes)
        return scores if x.dim() == 4 else scores[0]

    if TYPE_CHECKING:  # torch.nn.Module's own returns Any

        def __call__(self, x: Tensor) -> Tensor: ...

    def _run(self, modules: nn.Module, x: Tensor, scale: float = 1.0) -> Tensor:
        """The modules applied to scale * x; what has a hook or is another class than Sequential runs as in torch."""
        if self.fused and type(modules) is nn.Sequential and not fusion.has_hooks(modules):
            return fusion.run(modules, x, scale)
        return modules(x if scale == 1 else x * scale)

    def _with_memory_format(self, images: Tensor) -> Tensor:
        """The images in the memory format that the convolutions should have.

        channels_last if the weights are, as in torch's convolutions. On a CPU always, since it is faster, except for a
        few images in inference where convolutions after the first have a stride: oneDNN computes these, and would
        rearrange their weights in each call.
        """
        if transforms_active():  # vmap knows no memory formats
            return images
        convolutions = [module for module in self.features if isinstance(module, nn.Conv2d)]
        if images.device.type != "cpu":
            last = convolutions[-1].weight.is_contiguous(memory_format=torch.channels_last)
            return images.contiguous(memory_format=torch.channels_last) if last else images
        few = not torch.compiler.is_compiling() and not torch.is_grad_enabled() and images.shape[0] < 8
        strided = any(conv.stride != (1, 1) for conv in convolutions[1:])
        return images.contiguous(memory_format=torch.contiguous_format if few and strided else torch.channels_last)

    def _check(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(f"AlexNet: expected a floating-point image, got {x.dtype}; convert and normalise it first")
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            c = self.in_channels
            raise ValueError(f"AlexNet: expected images (N, {c}, H, W) or ({c}, H, W), got shape {tuple(x.shape)}")
        height, width = x.shape[-2:]
        feature_size = self.variant.feature_size(height, width)
        if 0 in feature_size or (self.variant.average_pool is None and feature_size != self.feature_size):
            size = self.variant.input_size
            made = f"variant {self.variant.name!r} is made for {size}x{size} images, got {height}x{width}"
            remain, takes = ("x".join(map(str, sides)) for sides in (feature_size, self.feature_size))
            raise ValueError(f"AlexNet: {made}, of which {remain} would remain where the classifier takes {takes}")

    def extra_repr(self) -> str:
        return f"variant={self.variant.name!r}, input_scale={self.input_scale:g}"


def _find_network(source: str | os.PathLike[str], variant: str | Variant | None) -> Any:
    """`weights.find_network`, which is loaded when it is needed: it knows every kind of file."""
    return import_module(".weights", __package__).find_network(Path(source), variant)


def _initialise(module: nn.Conv2d | nn.Linear, init: variants.Init) -> None:
    if init.weight == "torch":
        return module.reset_parameters()
    if init.weight == "normal":
        nn.init.normal_(module.weight, std=init.std)
    elif init.weight == "truncated_normal":
        nn.init.trunc_normal_(module.weight, std=init.std, a=-2 * init.std, b=2 * init.std)
    elif init.weight == "xavier_uniform":
        nn.init.xavier_uniform_(module.weight)
    elif init.weight in ("kaiming_normal", "dirac"):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if init.weight == "dirac":
            nn.init.dirac_(module.weight[: module.weight.shape[1]])
    else:
        raise ValueError(f"AlexNet: no initialisation is called {init.weight!r}")
    if module.bias is not None:
        nn.init.constant_(module.bias, init.bias)
