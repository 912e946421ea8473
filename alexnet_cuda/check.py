"""Checks every operator on this machine's devices, forward and backward, against its reference in float64."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from . import ops, reference

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
# Allowed relative error: a few roundings of the result's dtype. TF32 has the mantissa of float16.
TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2, "float64": 1e-10, "tf32": 2e-3}
# Share of the outputs for which rounding may choose another maximum of a window, or another sign, than float64 does.
OTHER_CHOICE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-3, "float64": 0.0, "tf32": 2e-3}
# AlexNet's alpha of 1e-4 changes these inputs by less than half rounds, so that a wrong window would not show.
LRN = dict(size=5, alpha=1.0, k=2.0)
TAIL = dict(size=5, alpha=0.1, k=2.0)


@dataclass(frozen=True)
class Case:
    """One call of an operator. `shape` is that of one image; with `filters`, there are a weight and a bias, too."""

    op: str
    shape: tuple[int, int, int]
    args: dict[str, Any] = field(default_factory=dict)
    filters: int = 0
    kernel_size: int = 11
    images: int = 2

    @property
    def small(self) -> bool:
        return math.prod(self.shape) < 10_000

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """x, weight and bias, or x alone, contiguous on the CPU; the same numbers at every call."""
        random = torch.Generator().manual_seed(0)
        inputs = [torch.randn(self.images, *self.shape, generator=random)]
        if self.filters:
            size = (self.filters, self.shape[0] // self.args.get("groups", 1), self.kernel_size, self.kernel_size)
            inputs.append(torch.randn(size, generator=random) / math.prod(size[1:]) ** 0.5)
            inputs.append(torch.randn(self.filters, generator=random))
        return [t.to(dtype) for t in inputs]

    def call(self, *inputs: Tensor) -> Tensor:
        return getattr(ops, self.op)(*inputs, **self.args)

    def exact(self, dtype: torch.dtype, *inputs: Any) -> Tensor:
        """The reference; the first block's convolution output is rounded to `dtype`, as the operator stores it."""
        if self.op != "conv2d_relu_lrn_max_pool2d":
            return getattr(reference, self.op)(*inputs, **self.args)
        names = ("stride", "padding", "ceil_mode")
        a = reference.conv2d(*inputs, **{name: self.args[name] for name in names if name in self.args})
        tail = {name: value for name, value in self.args.items() if name not in names}
        return reference.relu_lrn_max_pool2d(a + (a.detach().to(dtype).to(a) - a.detach()), **tail)

    def __str__(self) -> str:
        size = f", {self.filters} filters {self.kernel_size}x{self.kernel_size}" if self.filters else ""
        args = "".join(f", {name}={value}" for name, value in self.args.items())
        return f"{self.op} of {self.images}x{'x'.join(map(str, self.shape))}{size}{args}"


def _tails(op: str, shape: Any, args: dict, **rest: Any) -> list[Case]:
    return [Case(op, shape, args | dict(order=order), **rest) for order in reference.ORDERS]


# AlexNet's own layers, then odd sizes and arguments.
CASES = [
    Case("conv2d", (3, 227, 227), filters=96),
    Case("conv2d", (3, 224, 224), dict(padding=2), filters=64),
    Case("conv2d", (96, 27, 27), dict(stride=1, padding=2, groups=2, relu=True), filters=256, kernel_size=5),
    Case("conv2d", (256, 13, 13), dict(stride=1, padding=1), filters=384, kernel_size=3),
    Case("conv2d", (3, 35, 47), filters=96),
    Case("conv2d", (1, 28, 29), filters=96),
    Case("conv2d", (4, 23, 30), dict(padding=3, ceil_mode=True), filters=7),
    Case("conv2d", (16, 9, 10), dict(stride=1, padding=1, relu=True), filters=32, kernel_size=3),
    Case("conv2d", (2, 17, 16), dict(stride=2, groups=2), filters=6, kernel_size=4),
    Case("local_response_norm", (96, 55, 55), LRN),
    Case("local_response_norm", (256, 27, 27), LRN),
    Case("local_response_norm", (1, 1, 1), dict(size=5)),
    Case("local_response_norm", (7, 13, 5), dict(size=4, alpha=0.5, beta=0.5, window="onnx")),
    Case("local_response_norm", (12, 9, 11), dict(size=3, alpha=0.2, beta=1.0, groups=2, divide_alpha=False)),
    Case("local_response_norm", (33, 7, 9), dict(size=11, beta=0.6)),
    Case("local_response_norm", (5, 9, 8), dict(size=3, alpha=0.1, across="spatial")),
    Case("max_pool2d", (96, 55, 55)),
    Case("max_pool2d", (256, 27, 27)),
    Case("max_pool2d", (5, 12, 9), dict(ceil_mode=True)),
    Case("max_pool2d", (3, 11, 14), dict(padding=1)),
    Case("max_pool2d", (2, 9, 9), dict(kernel_size=2)),
    Case("max_pool2d", (3, 17, 16), dict(kernel_size=15, stride=1, padding=7)),
    *_tails("relu_lrn_max_pool2d", (96, 55, 55), TAIL),
    *_tails("relu_lrn_max_pool2d", (256, 27, 27), TAIL),
    *_tails("relu_lrn_max_pool2d", (7, 12, 9), dict(size=4, alpha=1.0, beta=0.5, ceil_mode=True)),
    *_tails("relu_lrn_max_pool2d", (6, 11, 14), dict(size=3, alpha=1.0, padding=1, window="onnx", groups=2)),
    *_tails("conv2d_relu_lrn_max_pool2d", (3, 227, 227), TAIL, filters=96),
    *_tails("conv2d_relu_lrn_max_pool2d", (3, 35, 47), TAIL, filters=96),
    *_tails("conv2d_relu_lrn_max_pool2d", (4, 33, 30), TAIL | dict(padding=3, ceil_mode=True), filters=7),
]


@dataclass
class Row:
    """The worst results of an operator in a dtype on a device, over all its cases and memory formats."""

    op: str
    device: str
    dtype: str
    cases: int = 0
    kernels: int = 0  # cases that ran on this package's kernels alone
    output: tuple[float, float] = (0.0, math.nan)  # the error, and what is allowed
    gradients: tuple[float, float] = (0.0, math.nan)
    wrong: list[str] = field(default_factory=list)

    def update(self, what: str, error: float, allowed: float) -> bool:
        """Keeps the error that is the largest share of what is allowed; False if it is too large."""
        before, limit = getattr(self, what)
        if math.isnan(limit) or not error / allowed < before / limit:
            setattr(self, what, (error, allowed))
        return error <= allowed


def check(device: str, *, small: bool = False) -> Iterator[Row]:
    """One row for each operator and dtype that has kernels on `device`. `small`: odd sizes alone, without torch's
    profiler, hence without `Row.kernels`; for a run under compute-sanitizer."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages
    without = "float64" if device == "cuda" else "tf32"
    for op, dtype in product(dict.fromkeys(case.op for case in CASES), [*DTYPES, "tf32"]):
        if dtype == without or (dtype == "tf32" and not op.startswith("conv2d")):
            continue
        cases = [case for case in CASES if case.op == op and (case.small or not small)]
        if device == "cuda":  # more images than the device has multiprocessors
            many = torch.cuda.get_device_properties(device).multi_processor_count + 8
            cases.append(replace(next(case for case in cases if case.small), images=many))
        elif dtype == "float16":  # torch's own convolutions of half take many seconds on a CPU
            cases = [case for case in cases if not case.filters or case.small or case.shape[0] == 3]
        row = Row(op, device, dtype)
        for case in cases:
            _check_case(row, case, profiled=not small)
        yield row


def _check_case(row: Row, case: Case, profiled: bool) -> None:
    dtype = DTYPES[row.dtype.replace("tf32", "float32")]
    x, *weights = case.inputs(dtype)
    wide = [t.double().requires_grad_() for t in (x, *weights)]
    exact = case.exact(dtype, *wide)
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact_gradients = torch.autograd.grad(exact, wide, grad.double())
    names: set[str] = set()
    profiler: Any = partial(torch.profiler.profile, activities=[torch.profiler.ProfilerActivity.CPU])
    for memory_format in (torch.contiguous_format, torch.channels_last):
        moved = [t.detach().to(row.device) for t in (x.contiguous(memory_format=memory_format), *weights)]
        leaves = [t.requires_grad_() for t in moved]
        try:
            with _tf32(row.dtype == "tf32"):
                with torch.no_grad():
                    inference = case.call(*leaves)
                if inference.shape != exact.shape or inference.dtype != dtype:
                    got = f"{tuple(inference.shape)} of {inference.dtype}"
                    raise ValueError(f"expected a result of shape {tuple(exact.shape)} of {dtype}, got {got}")
                with profiler() if profiled else nullcontext() as profile:
                    y = case.call(*leaves)
                    gradients = torch.autograd.grad(y, leaves, grad.to(row.device))
            names |= {event.name for event in profile.events()} if profile else set()
            good = [row.update("output", *_largest_error(t, exact, row.dtype)) for t in (inference, y)]
            for t, e in zip(gradients, exact_gradients):
                good.append(row.update("gradients", *_gradient_error(t, e, row.dtype, case, exact.numel())))
            problem = "" if all(good) else "too far from float64"
        except Exception as error:  # whatever an operator raises is its result here
            problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if problem:
            row.wrong.append(f"{case}, {row.dtype}, {str(memory_format)[6:]} on {row.device}: {problem}")
    row.cases += 1
    own = any(name.startswith("alexnet_cuda::") for name in names)
    row.kernels += own and not any(name.startswith("aten::convolution") for name in names)


def _largest_error(actual: Tensor, exact: Tensor, dtype: str) -> tuple[float, float]:
    """Of all elements, relative to the element and the largest one; and what is allowed."""
    a, e = actual.detach().cpu().double(), exact.detach()
    scale = e.abs() + (e.abs().max() if e.numel() else 0)
    error = (a - e).abs().div(scale.clamp_min(1e-300)).max()
    return error.nan_to_num(math.inf, math.inf).item(), TOLERANCE[dtype]


def _gradient_error(actual: Tensor, exact: Tensor, dtype: str, case: Case, outputs: int) -> tuple[float, float]:
    """Where rounding decides which elements have a gradient (a maximum of computed values, the sign of one before
    ReLU), the norm of the difference over the norm; a share s of other choices changes it by the square root of 2 s."""
    if "lrn_max_pool" not in case.op and not case.args.get("relu"):
        return _largest_error(actual, exact, dtype)
    a, e = actual.detach().cpu().double(), exact.detach()
    share = OTHER_CHOICE[dtype] and max(OTHER_CHOICE[dtype], 2 / outputs)
    error = (a - e).norm() / e.norm().clamp_min(1e-300)
    return error.nan_to_num(math.inf, math.inf).item(), TOLERANCE[dtype] + (2 * share) ** 0.5


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
