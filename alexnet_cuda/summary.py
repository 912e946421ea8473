"""The layers of a network as a table: sizes, parameters and multiply-accumulates, and a short name for each."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .model import AlexNet

KINDS = {
    nn.Conv2d: "conv", nn.Linear: "fc", nn.ReLU: "relu", nn.Tanh: "tanh", nn.LocalResponseNorm: "norm",
    nn.MaxPool2d: "pool", nn.AdaptiveAvgPool2d: "avgpool", nn.BatchNorm1d: "bn", nn.BatchNorm2d: "bn",
    nn.Dropout: "drop",
}  # fmt: skip


@dataclass(frozen=True)
class LayerSummary:
    """One layer: its name in the network, its class, its output without the batch dimension, its parameters, and its
    multiply-accumulates per image."""

    name: str
    type: str
    output_size: tuple[int, ...]
    parameters: int
    macs: int


def model_summary(model: AlexNet | str, size: int | None = None) -> list[LayerSummary]:
    """Every layer of a network, or of the variant of that name, in the order of execution, for one image of `size` x
    `size` pixels; None: of the variant's own size. Nothing is computed: the sizes come from a forward pass of a copy on
    torch's meta device."""
    with torch.device("meta"):
        if isinstance(model, str):
            model = AlexNet(model)
        twin = AlexNet(model.variant, model.num_classes, model.in_channels)
    rows: list[LayerSummary] = []

    def note(name: str, module: nn.Module, _: object, output: Tensor) -> None:
        parameters = sum(p.numel() for p in module.parameters())
        weight = module.weight.numel() if isinstance(module, nn.Conv2d | nn.Linear) else 0
        size = tuple(output.shape[1:])
        positions = output[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        rows.append(LayerSummary(name, type(module).__name__, size, parameters, weight * positions))

    for name, module in _leaves(twin):
        module.register_forward_hook(partial(note, name))
    side = size or model.variant.input_size
    twin.eval()(torch.empty(1, model.in_channels, side, side, device="meta"))
    return rows


def layer_names(model: nn.Module) -> dict[str, str]:
    """Names of layers as in Caffe, by the names of the modules: {"features.0": "conv1", "features.1": "relu1", ...}.

    A name is the kind of layer and how many convolutions and linear layers there were so far: conv1, relu1, norm1,
    pool1, conv2, ..., fc6, relu6, drop6, fc7, ... A second layer of that name is norm2_2. Padding takes the number of
    the convolution that follows it.
    """
    names: dict[str, str] = {}
    number, used = 0, dict[str, int]()
    for path, module in _leaves(model):
        kind = next((name for type_, name in KINDS.items() if isinstance(module, type_)), type(module).__name__.lower())
        number += kind in ("conv", "fc")
        name = f"{kind}{number + (kind == 'pad')}"
        used[name] = used.get(name, 0) + 1
        names[path] = name if used[name] == 1 else f"{name}_{used[name]}"
    return names


def _leaves(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules without children, by name."""
    return [(name, m) for name, m in model.named_modules() if not isinstance(m, nn.Identity) and not [*m.children()]]
