"""What a variant consists of: its layers with their constants and start values."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Init:
    """Start values of a layer: how its weights are drawn, and the constant its biases start at.

    weight: "normal" or "truncated_normal" (at two std), both with `std`; "xavier_uniform"; "kaiming_normal"; "dirac",
        where as many filters as there are input channels pass one channel each and the others are "kaiming_normal";
        "torch", which leaves weights and biases as torch draws them.
    """

    weight: str = "torch"
    std: float = 0.0
    bias: float = 0.0


@dataclass(frozen=True)
class Conv:
    filters: int
    kernel_size: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    ceil_mode: bool = False
    bias: bool = True
    init: Init = Init()


@dataclass(frozen=True)
class LRN:
    """Arguments of `ops.local_response_norm`."""

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0
    groups: int = 1
    divide_alpha: bool = True
    across: str = "channels"


@dataclass(frozen=True)
class ReLU:
    pass


@dataclass(frozen=True)
class Tanh:
    pass


@dataclass(frozen=True)
class MaxPool:
    kernel_size: int = 3
    stride: int = 2
    ceil_mode: bool = False


@dataclass(frozen=True)
class BatchNorm:
    """momentum as in torch: the weight of the new batch in the running statistics."""

    eps: float = 1e-5
    momentum: float = 0.1


@dataclass(frozen=True)
class Dropout:
    p: float = 0.5


@dataclass(frozen=True)
class Linear:
    """units: None for as many as there are classes."""

    units: int | None = None
    init: Init = Init()


Layer = Conv | LRN | ReLU | Tanh | MaxPool | BatchNorm | Dropout | Linear


@dataclass(frozen=True)
class Variant:
    """One network.

    average_pool: side of the adaptive average pool between features and classifier, or None.
    pixels: whether the initialisation was made for pixels 0..255 minus their mean.
    """

    name: str
    description: str
    features: tuple[Layer, ...]
    classifier: tuple[Layer, ...]
    num_classes: int = 1000
    input_size: int = 227
    channels: int = 3
    average_pool: int | None = None
    pixels: bool = False

    def feature_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after `features`; 0 where the image is too small."""
        return _feature_size(self.features, height), _feature_size(self.features, width)

    @property
    def parameters(self) -> int:
        """How many, with the variant's own classes and channels."""
        return sum(own for own, _ in self._sizes())

    @property
    def running_statistics(self) -> int:
        """Numbers that batch normalisation keeps beside its parameters."""
        return sum(running for _, running in self._sizes())

    def _sizes(self) -> Iterator[tuple[int, int]]:
        """Parameters and running statistics of each layer that has some."""
        inputs = self.channels
        for layer in self.features:
            if isinstance(layer, Conv):
                yield layer.filters * (inputs // layer.groups * layer.kernel_size**2 + layer.bias), 0
                inputs = layer.filters
            elif isinstance(layer, BatchNorm):
                yield 2 * inputs, 2 * inputs
        height, width = (self.average_pool,) * 2 if self.average_pool else self.feature_size(*(self.input_size,) * 2)
        inputs *= height * width
        for layer in self.classifier:
            if isinstance(layer, Linear):
                units = layer.units or self.num_classes
                yield units * (inputs + 1), 0
                inputs = units
            elif isinstance(layer, BatchNorm):
                yield 2 * inputs, 2 * inputs


def _feature_size(layers: tuple[Layer, ...], size: int) -> int:
    for layer in layers:
        if isinstance(layer, Conv | MaxPool):
            padded = size + 2 * getattr(layer, "padding", 0)
            if padded < layer.kernel_size:
                return 0
            size = (padded - layer.kernel_size + (layer.stride - 1 if layer.ceil_mode else 0)) // layer.stride + 1
            if isinstance(layer, MaxPool) and (size - 1) * layer.stride >= padded:
                size -= 1  # torch drops a window that would start beyond the edge
    return size
