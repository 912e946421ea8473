"""Drop-in modules: subclasses of torch's own, so names, arguments, `isinstance` and `state_dict` stay what they are.

Their attribute `kernels` says whether they use our kernels, as `kernels` explains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import later_layers
from .kernels import operator, uses
from .reference import Size


class Conv2d(torch.nn.Conv2d):
    """`torch.nn.Conv2d` over `ops.conv2d`; `ceil_mode=True` rounds the output size up (the 2012 code's 224 to 55).

    The output size is (H + 2 * padding - kernel_size) / stride + 1, rounded. Convolutions other than plain ones with
    one stride and one zero padding cannot have `ceil_mode`. On a CPU, float32 convolutions of 3x3 and 5x5 with stride 1
    between multiples of 16 channels run on a kernel of our own, with less than half the products, if they are large
    enough to gain by it; the others as torch's own.
    """

    ceil_mode = False
    kernels: str | None = None

    def __init__(self, *args: Any, ceil_mode: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ceil_mode = ceil_mode
        if ceil_mode and not self._plain():
            raise ValueError(f"Conv2d: ceil_mode needs one stride, one zero padding, no dilation or groups, got {self}")

    def _plain(self) -> bool:
        simple = self.groups == 1 and self.dilation == (1, 1) and self.padding_mode == "zeros"
        one_stride = self.stride[0] == self.stride[1]
        return simple and one_stride and isinstance(self.padding, tuple) and self.padding[0] == self.padding[1]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) or (C, H, W) to (N, K, H', W') or (K, H', W')."""
        if later_layers.serves(x) and later_layers.by_winograd(self, x, 1.75) and uses("conv2d", x, self.kernels):
            return later_layers.conv2d(self, x)
        if not self.ceil_mode and (self.kernel_size != (11, 11) or not self._plain()):
            return super().forward(x)
        conv2d = operator("conv2d", x, self.kernels)
        return conv2d(x, self.weight, self.bias, self.stride[0], int(self.padding[0]), self.ceil_mode)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", ceil_mode=True" if self.ceil_mode else "")


class LocalResponseNorm(torch.nn.LocalResponseNorm):
    """`torch.nn.LocalResponseNorm` over `ops.local_response_norm`, which explains the arguments."""

    groups = 1
    divide_alpha = True
    window = "torch"
    across = "channels"
    kernels: str | None = None

    def __init__(
        self,
        size: int,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        *,
        groups: int = 1,
        divide_alpha: bool = True,
        window: str = "torch",
        across: str = "channels",
    ) -> None:
        super().__init__(size, alpha, beta, k)
        self.groups = groups
        self.divide_alpha = divide_alpha
        self.window = window
        self.across = across

    @classmethod
    def from_tensorflow(
        cls, depth_radius: int = 5, bias: float = 1.0, alpha: float = 1.0, beta: float = 0.5
    ) -> LocalResponseNorm:
        """`tf.nn.local_response_normalization`: 2 * depth_radius + 1 channels, alpha not divided; TF's defaults."""
        return cls(2 * depth_radius + 1, alpha, beta, bias, divide_alpha=False)

    @classmethod
    def from_caffe(
        cls,
        local_size: int = 5,
        alpha: float = 1.0,
        beta: float = 0.75,
        norm_region: str = "ACROSS_CHANNELS",
        k: float = 1.0,
    ) -> LocalResponseNorm:
        """Caffe's LRNParameter (fields in its order, with its defaults); local_size is odd."""
        if local_size % 2 == 0:
            raise ValueError(f"LocalResponseNorm.from_caffe: expected local_size to be odd, got {local_size}")
        regions = {"ACROSS_CHANNELS": "channels", "WITHIN_CHANNEL": "spatial"}
        if norm_region not in regions:
            raise ValueError(
                f"LocalResponseNorm.from_caffe: expected norm_region to be one of {', '.join(regions)}, "
                f"got {norm_region!r}"
            )
        return cls(local_size, alpha, beta, k, across=regions[norm_region])

    @classmethod
    def from_onnx(cls, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> LocalResponseNorm:
        """The attributes of ONNX's LRN operator: an even window leans to the later channels."""
        return cls(size, alpha, beta, bias, window="onnx")

    def arguments(self) -> dict[str, Any]:
        """The keyword-only arguments of the op."""
        return dict(groups=self.groups, divide_alpha=self.divide_alpha, window=self.window, across=self.across)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) to the same shape."""
        local_response_norm = operator("local_response_norm", x, self.kernels)
        return local_response_norm(x, self.size, self.alpha, self.beta, self.k, **self.arguments())

    def extra_repr(self) -> str:
        changed = {name: value for name, value in self.arguments().items() if value != getattr(type(self), name)}
        return ", ".join([super().extra_repr(), *(f"{name}={value!r}" for name, value in changed.items())])


class MaxPool2d(torch.nn.MaxPool2d):
    """`torch.nn.MaxPool2d` over `ops.max_pool2d`; with dilation, torch's own."""

    kernels: str | None = None

    def forward(self, x: Tensor) -> Any:
        """(N, C, H, W) or (C, H, W) to the pooled size."""
        if self.dilation not in (1, (1, 1)):
            return super().forward(x)
        max_pool2d = operator("max_pool2d", x, self.kernels)
        return max_pool2d(x, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.return_indices)


class ReLULRNMaxPool2d(torch.nn.Module):
    """ReLU, local response normalisation and max pooling as one op, in one of three orders; `ops.relu_lrn_max_pool2d`
    explains the arguments."""

    kernels: str | None = None

    def __init__(
        self,
        size: int,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        *,
        order: str = "relu-lrn-pool",
        groups: int = 1,
        divide_alpha: bool = True,
        window: str = "torch",
        across: str = "channels",
        kernel_size: Size = 3,
        stride: Size | None = 2,
        padding: Size = 0,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k
        self.arguments: dict[str, Any] = dict(
            order=order, groups=groups, divide_alpha=divide_alpha, window=window, across=across,
            kernel_size=kernel_size, stride=stride, padding=padding, ceil_mode=ceil_mode,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) or (C, H, W) to the pooled size."""
        relu_lrn_max_pool2d = operator("relu_lrn_max_pool2d", x, self.kernels)
        return relu_lrn_max_pool2d(x, self.size, self.alpha, self.beta, self.k, **self.arguments)

    def extra_repr(self) -> str:
        names = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}, {names}"
