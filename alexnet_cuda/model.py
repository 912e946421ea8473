"""AlexNet, built from a `Variant`: one module per layer, in the variant's order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import kernels as choice
from . import later_layers, ops, variants
from . import nn as layers
from ._library import transforming
from .reference import ORDERS
from .variants import Variant, get_variant

# Pixels 0..255 minus their mean are this many times as large as images normalised with ImageNet's mean and standard
# deviation (0.229, 0.224, 0.225 of the range 0..1).
PIXELS_PER_UNIT = 255 * 0.226


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
        kernels: the operators that use this package's kernels: "all", "none", names of `ops` with commas between, or
            "auto" for what suits the device, "wgmma" for the same with the first block's other kernel (see `kernels`);
            None for what the environment's ALEXNET_CUDA_KERNELS says, or "auto".

    Attributes:
        fused: while True, ReLU, LRN and max pooling that follow each other, and a first convolution before them, run as
            one op; on a CPU, so do later float32 convolutions or linear layers and the ReLU after them, in a kernel of
            our own or in oneDNN (unless `kernels` is "none"). Modules with hooks always run one by one. Results agree
            to rounding.

    Raises:
        ValueError: an unknown variant, input or operator, fewer than one class or channel, dropout outside 0..1; in the
            forward pass, an image with another number of channels or of a size the linear layers cannot take.
        TypeError: an image that is not floating-point.

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
        kernels: str | None = None,
    ) -> None:
        super().__init__()
        self.variant = variant if isinstance(variant, Variant) else get_variant(variant)
        self.num_classes = self.variant.num_classes if num_classes is None else num_classes
        in_channels = self.variant.channels if in_channels is None else in_channels
        for name, value in (("num_classes", self.num_classes), ("in_channels", in_channels)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"AlexNet: expected {name} to be a positive integer, got {value!r}")
        if dropout is not None and not 0 <= dropout <= 1:
            raise ValueError(f"AlexNet: expected dropout to be between 0 and 1, got {dropout!r}")
        if input not in ("normalized", "pixels"):
            raise ValueError(f"AlexNet: expected input to be 'normalized' or 'pixels', got {input!r}")
        choice.decide(kernels, "cpu")  # raises if there is no such choice
        self.kernels = kernels
        self.input_scale = PIXELS_PER_UNIT if self.variant.pixels and input == "normalized" else 1.0
        self.fused = True

        side = self.variant.average_pool
        self.feature_size = (side,) * 2 if side else self.variant.feature_size(*(self.variant.input_size,) * 2)
        self.features, channels = _features(self.variant, in_channels)
        for module in self.features:
            if hasattr(module, "kernels"):
                module.kernels = kernels  # type: ignore[assignment]
        self.avgpool = nn.AdaptiveAvgPool2d(side) if side else nn.Identity()
        units = channels * self.feature_size[0] * self.feature_size[1]
        self.classifier = _classifier(self.variant, units, self.num_classes, dropout)
        self.reset_parameters()

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
        images = x if x.dim() == 4 else x[None]  # (N, C, H, W)
        if images.device.type == "cpu" and not transforming():  # vmap knows no memory formats
            images = images.contiguous(memory_format=_cpu_format(images, self.variant))
        features = self._run(self.features, images, self.input_scale)
        features = self.avgpool(features)  # (N, 256, 6, 6) in most variants
        scores = self._run(self.classifier, torch.flatten(features, 1))  # (N, num_classes)
        return scores if x.dim() == 4 else scores[0]

    def _run(self, modules: nn.Module, x: Tensor, scale: float = 1) -> Tensor:
        """The modules applied to `scale` * x; what has a hook or is no plain Sequential runs as torch would."""
        if type(modules) is nn.Sequential and not _has_hooks(modules):
            return _run_fused(modules, x, self.fused, self.kernels, scale)
        return modules(x if scale == 1 else x * scale)

    def _check(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(f"AlexNet: expected a floating-point image, got {x.dtype}; convert and normalise it first")
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            c = self.in_channels
            raise ValueError(f"AlexNet: expected images (N, {c}, H, W) or ({c}, H, W), got shape {tuple(x.shape)}")
        height, width = x.shape[-2:]
        size = self.variant.input_size
        if (height, width) == (size, size):
            return
        feature_size = self.variant.feature_size(height, width)
        if 0 in feature_size or (self.variant.average_pool is None and feature_size != self.feature_size):
            raise ValueError(
                f"AlexNet: variant {self.variant.name!r} is made for {size}x{size} images, got {height}x{width}, of "
                f"which {feature_size[0]}x{feature_size[1]} would remain where the classifier takes "
                f"{self.feature_size[0]}x{self.feature_size[1]}"
            )

    def extra_repr(self) -> str:
        kernels = "" if self.kernels is None else f", kernels={self.kernels!r}"
        return f"variant={self.variant.name!r}, input_scale={self.input_scale:g}{kernels}"


def _features(variant: Variant, channels: int) -> tuple[nn.Sequential, int]:
    """The modules of `variant.features`, and the channels they end with."""
    modules: list[nn.Module] = []
    for layer in variant.features:
        match layer:
            case variants.Conv(filters, kernel_size, stride, padding, groups, ceil_mode, bias):
                if isinstance(padding, tuple):
                    modules.append(nn.ZeroPad2d(padding))
                    padding = 0
                conv: nn.Conv2d
                if kernel_size == 11:
                    conv = layers.Conv2d(channels, filters, 11, stride, padding, bias=bias, ceil_mode=ceil_mode)
                else:
                    conv = nn.Conv2d(channels, filters, kernel_size, stride, padding, groups=groups, bias=bias)
                modules.append(conv)
                channels = filters
            case variants.LRN(size, alpha, beta, k, groups, divide_alpha, across):
                lrn = layers.LocalResponseNorm(
                    size, alpha, beta, k, groups=groups, divide_alpha=divide_alpha, across=across
                )
                modules.append(lrn)
            case variants.MaxPool(kernel_size, stride, ceil_mode):
                modules.append(layers.MaxPool2d(kernel_size, stride, ceil_mode=ceil_mode))
            case variants.BatchNorm(eps, momentum):
                modules.append(nn.BatchNorm2d(channels, eps, momentum))
            case variants.ReLU():
                modules.append(nn.ReLU())
            case _:
                raise ValueError(f"AlexNet: variant {variant.name!r} has {layer} among its features")
    return nn.Sequential(*modules), channels


def _classifier(variant: Variant, units: int, num_classes: int, dropout: float | None) -> nn.Sequential:
    modules: list[nn.Module] = []
    for layer in variant.classifier:
        match layer:
            case variants.Linear(out):
                modules.append(nn.Linear(units, out or num_classes))
                units = out or num_classes
            case variants.Dropout(p):
                modules.append(nn.Dropout(p if dropout is None else dropout))
            case variants.BatchNorm(eps, momentum):
                modules.append(nn.BatchNorm1d(units, eps, momentum))
            case variants.ReLU():
                modules.append(nn.ReLU())
            case _:
                raise ValueError(f"AlexNet: variant {variant.name!r} has {layer} in its classifier")
    return nn.Sequential(*modules)


def _initialise(module: nn.Conv2d | nn.Linear, init: variants.Init) -> None:
    if init.weight == "torch":
        module.reset_parameters()
        return
    if init.weight == "normal":
        nn.init.normal_(module.weight, std=init.std)
    elif init.weight == "truncated_normal":
        nn.init.trunc_normal_(module.weight, std=init.std, a=-2 * init.std, b=2 * init.std)
    elif init.weight == "xavier_uniform":
        nn.init.xavier_uniform_(module.weight)
    elif init.weight == "kaiming_normal":
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    else:
        raise ValueError(f"AlexNet: no initialisation is called {init.weight!r}")
    if module.bias is not None:
        nn.init.constant_(module.bias, init.bias)


# Neighbouring layers that one op computes. They are looked for in every forward pass, among the modules as they are
# then (a dozen type comparisons), so that a layer that was replaced or has got a hook is always seen.
_STEPS = {nn.ReLU: "relu", layers.LocalResponseNorm: "lrn", layers.MaxPool2d: "pool"}


def _run_fused(modules: nn.Sequential, x: Tensor, fused: bool, kernels: str | None, scale: float) -> Tensor:
    """The modules applied to `scale` * x."""
    chain: list[Any] = list(modules)
    with_conv = fused and choice.uses("conv2d_relu_lrn_max_pool2d", x, kernels)
    without = fused and choice.uses("relu_lrn_max_pool2d", x, kernels)
    with_later = fused and later_layers.serves(x) and choice.chosen(kernels, "cpu", None) != ()
    while chain:
        conv = chain[0]
        start = int(with_conv and type(conv) is layers.Conv2d and conv.kernel_size == (11, 11) and conv._plain())
        tail = chain[start : start + 3]
        order = _order(tail)
        fusible = (start or without) and order in ORDERS and _fusible(chain[: start + 3])
        if scale != 1 and not (start and fusible):
            x, scale = x * scale, 1
        if not fusible:
            free = chain[: 1 if _order(chain[1:4]) in ORDERS else 2]  # of a convolution's ReLU and the tail it begins
            count = later_layers.length(free, x) if with_later else 0
            if count and _fusible(chain[:count]):
                x = later_layers.run(chain[:count], x)
                del chain[:count]
            else:
                x = chain.pop(0)(x)
            continue
        del chain[: start + 3]
        steps = dict(zip(order.split("-"), tail))
        lrn, pool = steps["lrn"], steps["pool"]
        window = {name: getattr(pool, name) for name in ("kernel_size", "stride", "padding", "ceil_mode")}
        more: dict[str, Any] = {name: getattr(lrn, name) for name in ("size", "alpha", "beta", "k")}
        more |= {"order": order, **lrn.arguments()}
        if start:
            more |= {f"pool_{name}": value for name, value in window.items()}
            more |= {"stride": conv.stride[0], "padding": conv.padding[0], "ceil_mode": conv.ceil_mode}
            more["wgmma"] = kernels == "wgmma"
            weight = conv.weight if scale == 1 else conv.weight * scale  # much smaller than the images
            x, scale = ops.conv2d_relu_lrn_max_pool2d(x, weight, conv.bias, **more), 1
        else:
            x = ops.relu_lrn_max_pool2d(x, **more, **window)
    return x


def _order(modules: list[nn.Module]) -> str:
    """As in ORDERS, if they are such layers."""
    return "-".join(_STEPS.get(type(module), "") for module in modules)


def _fusible(modules: list[nn.Module]) -> bool:
    """No module has a hook, LRN runs across channels, and pooling returns values only."""
    return not any(
        _has_hooks(module)
        or getattr(module, "across", "channels") != "channels"
        or getattr(module, "return_indices", False)
        or (isinstance(module, nn.MaxPool2d) and module.dilation not in (1, (1, 1)))
        for module in modules
    )


def _has_hooks(module: nn.Module) -> bool:
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def _cpu_format(images: Tensor, variant: Variant) -> torch.memory_format:
    """In which convolutions are fastest. For oneDNN's, those with a stride, torch brings the weights into that order at
    each call, which a few images do not pay back in inference."""
    few = not torch.compiler.is_compiling() and not torch.is_grad_enabled() and images.shape[0] < 8
    later = [layer for layer in variant.features if isinstance(layer, variants.Conv)][1:]
    return torch.contiguous_format if few and any(conv.stride > 1 for conv in later) else torch.channels_last


@dataclass(frozen=True)
class LayerSummary:
    """One layer as `model_summary` sees it; `macs` are multiply-accumulates per image."""

    name: str
    type: str
    output_size: tuple[int, ...]
    parameters: int
    macs: int


def model_summary(model: AlexNet | str) -> list[LayerSummary]:
    """Every layer of a network, or of the variant of that name, in the order of execution, for one image.

    Nothing is computed: the sizes come from a forward pass of a copy on torch's meta device.
    """
    if isinstance(model, str):
        model = AlexNet(model)
    with torch.device("meta"):
        twin = AlexNet(model.variant, model.num_classes, model.in_channels)
    rows: list[LayerSummary] = []

    def note(name: str, module: nn.Module, output: Tensor) -> None:
        parameters = sum(p.numel() for p in module.parameters())
        weight = module.weight.numel() if isinstance(module, nn.Conv2d | nn.Linear) else 0
        size = tuple(output.shape[1:])
        positions = output[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        rows.append(LayerSummary(name, type(module).__name__, size, parameters, weight * positions))

    for name, module in twin.named_modules():
        if next(module.children(), None) is None and not isinstance(module, nn.Identity):
            module.register_forward_hook(lambda module, _, output, name=name: note(name, module, output))
    side = model.variant.input_size
    twin.eval()(torch.empty(1, model.in_channels, side, side, device="meta"))
    return rows
