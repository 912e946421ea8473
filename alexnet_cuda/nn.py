"""Drop-in modules: subclasses of torch's own, so names, arguments, `isinstance` and `state_dict` stay what they are."""

from typing import Any

import torch
from torch import Tensor

from .ops.conv2d import conv2d, has_uniform_geometry
from .ops.local_response_norm import local_response_norm
from .ops.max_pool2d import max_pool2d
from .ops.relu_lrn_max_pool2d import relu_lrn_max_pool2d
from .reference import Size

# torch.fx records calls of these as nodes of its graph instead of tracing into them.
for _name in ("conv2d", "local_response_norm", "max_pool2d", "relu_lrn_max_pool2d"):
    torch.fx.wrap(_name)


def geometry(conv: torch.nn.Conv2d) -> dict[str, Any]:
    """The arguments of `ops.conv2d` for such a convolution, but for `groups`."""
    return dict(stride=conv.stride[0], padding=conv.padding[0], ceil_mode=getattr(conv, "ceil_mode", False))


class _Named:
    def _get_name(self) -> str:
        """In `repr`: alexnet_cuda.Conv2d, and not Conv2d as torch's own."""
        return f"{type(self).__module__.partition('.')[0]}.{type(self).__name__}"


class Conv2d(_Named, torch.nn.Conv2d):
    """`torch.nn.Conv2d` over `ops.conv2d`; `ceil_mode=True` rounds the output size up (the 2012 code's 224 to 55).

    The output size is (H + 2 * padding - kernel_size) / stride + 1, rounded. Convolutions with dilation, a padding
    other than zeros, or strides or paddings that differ per direction are torch's own.

    Raises: ValueError if such a convolution has `ceil_mode`.
    """

    ceil_mode = False

    def __init__(self, *args: Any, ceil_mode: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ceil_mode = ceil_mode
        if ceil_mode and not has_uniform_geometry(self):
            raise ValueError(f"Conv2d: ceil_mode needs one stride, one zero padding and no dilation, got {self}")

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) or (C, H, W) to (N, K, H', W') or (K, H', W')."""
        if not has_uniform_geometry(self):
            return super().forward(x)
        return conv2d(x, self.weight, self.bias, **geometry(self), groups=self.groups)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", ceil_mode=True" if self.ceil_mode else "")


class LocalResponseNorm(_Named, torch.nn.LocalResponseNorm):
    """`torch.nn.LocalResponseNorm` over `ops.local_response_norm`, which explains the arguments."""

    groups = 1
    divide_alpha = True
    window = "torch"
    across = "channels"

    def __init__(
        self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, *,
        groups: int = 1, divide_alpha: bool = True, window: str = "torch", across: str = "channels",
    ) -> None:  # fmt: skip
        super().__init__(size, alpha, beta, k)
        self.groups, self.divide_alpha, self.window, self.across = groups, divide_alpha, window, across

    @classmethod
    def from_tensorflow(
        cls, depth_radius: int = 5, bias: float = 1.0, alpha: float = 1.0, beta: float = 0.5
    ) -> "LocalResponseNorm":
        """`tf.nn.local_response_normalization`: 2 * depth_radius + 1 channels, alpha not divided; TF's defaults."""
        return cls(2 * depth_radius + 1, alpha, beta, bias, divide_alpha=False)

    @classmethod
    def from_caffe(
        cls, local_size: int = 5, alpha: float = 1.0, beta: float = 0.75, norm_region: str = "ACROSS_CHANNELS",
        k: float = 1.0,
    ) -> "LocalResponseNorm":  # fmt: skip
        """Caffe's LRNParameter (fields in its order, with its defaults); local_size is odd. Caffe computes
        WITHIN_CHANNEL with a k of 1, whatever the parameter says."""
        if local_size % 2 == 0:
            raise ValueError(f"LocalResponseNorm.from_caffe: expected local_size to be odd, got {local_size}")
        regions = {"ACROSS_CHANNELS": "channels", "WITHIN_CHANNEL": "spatial"}
        if norm_region not in regions:
            expected = f"expected norm_region to be one of {', '.join(regions)}"
            raise ValueError(f"LocalResponseNorm.from_caffe: {expected}, got {norm_region!r}")
        k = k if norm_region == "ACROSS_CHANNELS" else 1.0
        return cls(local_size, alpha, beta, k, across=regions[norm_region])

    @classmethod
    def from_onnx(cls, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> "LocalResponseNorm":
        """The attributes of ONNX's LRN operator: an even window leans to the later channels."""
        return cls(size, alpha, beta, bias, window="onnx")

    def arguments(self) -> dict[str, Any]:
        """The arguments of `ops.local_response_norm`, by name."""
        names = ("size", "alpha", "beta", "k", "groups", "divide_alpha", "window", "across")
        return {name: getattr(self, name) for name in names}

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) to the same shape."""
        return local_response_norm(x, **self.arguments())

    def extra_repr(self) -> str:
        defaults = vars(LocalResponseNorm)
        changed = {name: value for name, value in self.arguments().items() if value != defaults.get(name, value)}
        return ", ".join([super().extra_repr(), *(f"{name}={value!r}" for name, value in changed.items())])


class MaxPool2d(_Named, torch.nn.MaxPool2d):
    """`torch.nn.MaxPool2d` over `ops.max_pool2d`; with dilation, torch's own."""

    def forward(self, x: Tensor) -> Any:
        """(N, C, H, W) or (C, H, W) to the pooled size."""
        if self.dilation not in (1, (1, 1)):
            return super().forward(x)
        return max_pool2d(x, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.return_indices)


class ReLULRNMaxPool2d(_Named, torch.nn.Module):
    """ReLU, local response normalisation and max pooling as one op, in one of three orders; `ops.relu_lrn_max_pool2d`
    explains the arguments."""

    def __init__(
        self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, *, order: str = "relu-lrn-pool",
        groups: int = 1, divide_alpha: bool = True, window: str = "torch", across: str = "channels",
        kernel_size: Size = 3, stride: Size | None = 2, padding: Size = 0, ceil_mode: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k
        self.arguments: dict[str, Any] = dict(
            order=order, groups=groups, divide_alpha=divide_alpha, window=window, across=across,
            kernel_size=kernel_size, stride=stride, padding=padding, ceil_mode=ceil_mode,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) or (C, H, W) to the pooled size."""
        return relu_lrn_max_pool2d(x, self.size, self.alpha, self.beta, self.k, **self.arguments)

    def extra_repr(self) -> str:
        names = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}, {names}"
