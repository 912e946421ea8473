"""The shapes and arguments with which parity.py calls every operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from alexnet_cuda import ops, reference

# AlexNet's but for alpha: its 1e-4 changes such inputs by less than half rounds, so that a wrong window would not show
STRONG = dict(size=5, alpha=1.0, k=2.0)
# enough to set window elements apart that float32 and float64 would order differently
APART = dict(size=5, alpha=0.1, k=2.0)
CONV: list[tuple[Any, int, dict]] = [
    ((3, 227, 227), 96, {}), ((3, 224, 224), 96, dict(padding=2)), ((3, 224, 224), 64, dict(ceil_mode=True)),
    ((3, 35, 47), 96, {}), ((1, 28, 29), 96, {}), ((4, 27, 24), 64, {}),
    ((4, 23, 30), 7, dict(padding=3, ceil_mode=True)), ((3, 11, 11), 1, {}),
]  # fmt: skip
LRN: list[tuple[Any, dict]] = [
    ((96, 55, 55), STRONG), ((256, 27, 27), STRONG), ((96, 15, 13), STRONG), ((1, 1, 1), dict(size=5)),
    ((7, 13, 5), dict(size=4, alpha=0.5, beta=0.5, window="onnx")), ((33, 7, 9), dict(size=11, beta=0.6)),
    ((12, 9, 11), dict(size=3, alpha=0.2, beta=1.0, groups=2, divide_alpha=False)),
    ((5, 9, 8), dict(size=3, alpha=0.1, across="spatial")),
]  # fmt: skip
POOL: list[tuple[Any, dict]] = [
    ((96, 55, 55), {}), ((256, 27, 27), {}), ((96, 15, 13), {}), ((5, 12, 9), dict(ceil_mode=True)),
    ((3, 11, 14), dict(padding=1)), ((2, 9, 9), dict(kernel_size=2)),
    ((3, 17, 16), dict(kernel_size=15, stride=1, padding=7)),
]  # fmt: skip
TAIL: list[tuple[Any, dict]] = [
    ((96, 55, 55), APART), ((256, 27, 27), APART), ((96, 15, 13), APART),
    ((7, 12, 9), dict(size=4, alpha=1.0, beta=0.5, ceil_mode=True)),
    ((6, 11, 14), dict(size=3, alpha=1.0, beta=1.0, padding=1, window="onnx", groups=2)),
]  # fmt: skip
OPS = ("conv2d", "local_response_norm", "max_pool2d", "relu_lrn_max_pool2d", "conv2d_relu_lrn_max_pool2d")


@dataclass
class Case:
    op: str
    shape: tuple[int, int, int]
    filters: int
    args: dict[str, Any]

    @property
    def big(self) -> bool:
        return math.prod(self.shape) > 100_000

    def function(self) -> Callable[..., Tensor]:
        return lambda *inputs: getattr(ops, self.op)(*inputs, **self.args)

    def exact(self, dtype: torch.dtype) -> Callable[..., Tensor]:
        """For float64; the whole block's convolution output is rounded to dtype, as the operator stores it."""
        if self.op != "conv2d_relu_lrn_max_pool2d":
            return lambda *inputs: getattr(reference, self.op)(*inputs, **self.args)
        conv = {name: self.args[name] for name in ("padding", "ceil_mode") if name in self.args}
        tail = {name: value for name, value in self.args.items() if name not in conv}

        def block(*inputs: Any) -> Tensor:
            a = reference.conv2d(*inputs, **conv)
            return reference.relu_lrn_max_pool2d(a + (a.to(dtype).to(a) - a).detach(), **tail)

        return block

    def inputs(self, n: int, dtype: torch.dtype, device: str) -> list[Tensor]:
        shapes = [(n, *self.shape), (self.filters, self.shape[0], 11, 11), (self.filters,)]
        inputs = [torch.randn(shape, device=device) for shape in shapes[: 3 if self.filters else 1]]
        return [(t / 19 if i == 1 else t).to(dtype) for i, t in enumerate(inputs)]

    def __str__(self) -> str:
        args = " ".join(f"{k}={v}" for k, v in self.args.items())
        return f"{'x'.join(map(str, self.shape))} {args}".strip()


def cases(op: str) -> list[Case]:
    if op == "conv2d":
        return [Case(op, *case) for case in CONV]
    if op in ("local_response_norm", "max_pool2d"):
        return [Case(op, shape, 0, args) for shape, args in (LRN if op == "local_response_norm" else POOL)]
    orders = [dict(order=order) for order in reference.ORDERS]
    if op == "relu_lrn_max_pool2d":
        return [Case(op, shape, 0, args | order) for (shape, args), order in product(TAIL, orders)]
    wide = [case for case in CONV if case[0][1] > 20]  # there is something to pool
    return [Case(op, shape, filters, args | APART | order) for (shape, filters, args), order in product(wide, orders)]


def small(op: str) -> list[Case]:
    return [case for case in cases(op) if not case.big]
