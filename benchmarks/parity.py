"""Checks every operator on a device against float64: the part of gpu_check.py that looks at numbers.

Each check is one JSON line in --output: {"op", "check", "ok", "error" (norm of the difference over norm), "message"}.
--smoke instead runs every kernel once on small inputs and checks nothing: what the sanitizers look at.
--device emulator runs the tiny checks of the CUDA operators, host code and kernels, on the CPU (docs/emulator.md);
streams, graphs and large sizes need a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alexnet_cuda import ops, reference
from alexnet_cuda._library import EMULATED
from alexnet_cuda.kernels import VARIABLE

sys.path.append(str(Path(__file__).resolve().parents[1] / "python_tests"))
from helpers import TOLERANCE, in_layout

LAYOUTS = ("contiguous", "channels_last", "offset", "sliced", "permuted")
PAPER = dict(size=5, alpha=1e-4, k=2.0)
CONV: list[tuple[Any, int, dict]] = [
    ((3, 227, 227), 96, {}), ((3, 224, 224), 96, dict(padding=2)), ((3, 224, 224), 64, dict(ceil_mode=True)),
    ((3, 35, 47), 96, {}), ((1, 28, 29), 96, {}), ((4, 27, 24), 64, {}),
    ((4, 23, 30), 7, dict(padding=3, ceil_mode=True)), ((3, 11, 11), 1, {}),
]  # fmt: skip
LRN: list[tuple[Any, dict]] = [
    ((96, 55, 55), PAPER), ((256, 27, 27), PAPER), ((96, 15, 13), PAPER), ((1, 1, 1), dict(size=5)),
    ((7, 13, 5), dict(size=4, alpha=0.5, beta=0.5, window="onnx")), ((33, 7, 9), dict(size=11, beta=0.6)),
    ((12, 9, 11), dict(size=3, alpha=0.2, beta=1.0, groups=2, divide_alpha=False)),
    ((5, 9, 8), dict(size=3, alpha=0.1, across="spatial")),
]  # fmt: skip
POOL: list[tuple[Any, dict]] = [
    ((96, 55, 55), {}), ((256, 27, 27), {}), ((96, 15, 13), {}), ((5, 12, 9), dict(ceil_mode=True)),
    ((3, 11, 14), dict(padding=1)), ((2, 9, 9), dict(kernel_size=2)),
    ((3, 17, 16), dict(kernel_size=15, stride=1, padding=7)),
]  # fmt: skip
# a larger alpha than AlexNet's sets window elements apart that float32 and float64 would order differently
APART = PAPER | dict(alpha=0.1)
TAIL: list[tuple[Any, dict]] = [
    ((96, 55, 55), APART), ((256, 27, 27), APART), ((96, 15, 13), APART),
    ((7, 12, 9), dict(size=4, alpha=1.0, beta=0.5, ceil_mode=True)),
    ((6, 11, 14), dict(size=3, alpha=1.0, beta=1.0, padding=1, window="onnx", groups=2)),
]  # fmt: skip
OPS = ("conv2d", "local_response_norm", "max_pool2d", "relu_lrn_max_pool2d", "conv2d_relu_lrn_max_pool2d")
# of the elements of a gradient: maxima that rounding decides otherwise than float64
FLIPS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-3}


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


def compare(actual: Tensor, exact: Tensor, fraction: float = 0.0, dtype: torch.dtype | None = None) -> float:
    """Norm of the difference over norm; AssertionError if more than `fraction` of the elements are off by more than
    dtype's (else actual's) tolerance."""
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return 0.0
    tolerance, a = TOLERANCE[dtype or actual.dtype], actual.to(exact)
    finite = exact.isfinite()
    scale = exact.where(finite, 0).abs().max().item()
    wrong = ~torch.isclose(a, exact, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
    difference = (a - exact).where(finite, 0)
    error = (difference.norm() / exact.where(finite, 0).norm().clamp_min(1e-300)).item()
    share = wrong.double().mean().item()
    assert share <= fraction, (
        f"{wrong.sum().item()} of {wrong.numel()} elements off, largest difference "
        f"{difference.abs().max().item():.3g} at scale {scale:.3g}, relative norm {error:.3g}"
    )
    return error


def run(function: Callable, inputs: list[Tensor], grad: Tensor | None = None) -> list[Tensor]:
    """The output, then the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    grad = fixed(y.shape, y.device) if grad is None else grad
    assert y.dtype == inputs[0].dtype, f"dtype {y.dtype}, expected {inputs[0].dtype}"
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y))]


def fixed(shape: torch.Size, device: torch.device | str) -> Tensor:
    """Random numbers, the same at every call."""
    return torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(1))


def exact(case: Case, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """In float64: up to one large image on the CPU, which has seen none of the device's own libraries, more of them on
    the device; `grad` is rounded to dtype first."""
    device = "cpu" if inputs[0].numel() < 1 << 18 else inputs[0].device
    shape = case.function()(*inputs).shape
    grad = fixed(shape, inputs[0].device).to(device, dtype).double()
    return run(case.exact(dtype), [x.to(device).double() for x in inputs], grad)


def match(case: Case, n: int, dtype: torch.dtype, device: str, layouts: tuple[str, ...],
          tf32: bool = False) -> Iterator[tuple[str, Any]]:  # fmt: skip
    """Output and gradients against float64, in every layout."""
    inputs = cache(lambda: case.inputs(n, dtype, device))
    expected = cache(lambda: exact(case, inputs(), dtype))
    precision = torch.float16 if tf32 else dtype  # TF32 has the mantissa of float16
    flips = FLIPS[precision] if "lrn_max_pool" in case.op else 0.0

    def check(layout: str) -> float:
        torch.backends.cudnn.allow_tf32 = tf32
        try:
            x, *weights = inputs()
            got = run(case.function(), [in_layout(x, layout), *weights])
        finally:
            torch.backends.cudnn.allow_tf32 = False
        want = expected()
        # behind a convolution a flip changes a whole patch of every gradient: there the norm says enough
        share = 1.0 if flips and case.filters else flips
        compare(got[0].to(want[0].device), want[0], dtype=precision)
        errors = [compare(g.to(w.device), w, share, precision) for g, w in zip(got[1:], want[1:])]
        limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[precision] + (2 * flips) ** 0.5
        assert max(errors) <= limit, f"relative norm of a gradient's error {max(errors):.3g}, limit {limit:.3g}"
        assert not tf32 or max(errors) > 1e-5, "TF32 is allowed, the result is float32's"
        return max(errors)

    for layout in layouts:
        yield f"{case} n={n} {'TF32' if tf32 else str(dtype)[6:]} {layout}", partial(check, layout)


def special(case: Case, dtype: torch.dtype, device: str, layout: str) -> Iterator[tuple[str, Any]]:
    """NaN, ties, negative zeros and large values."""

    def check(change: Callable[[Tensor], Tensor], gradients: bool) -> float:
        x, *weights = case.inputs(2, dtype, device)
        inputs = [in_layout(change(x), layout), *weights]
        got, want = run(case.function(), inputs), exact(case, inputs, dtype)
        return max(compare(g.to(w.device), w) for g, w in list(zip(got, want))[: None if gradients else 1])

    def nan(x: Tensor) -> Tensor:
        x[0, :, x.shape[2] // 2, x.shape[3] // 2] = torch.nan
        return x

    pool, lrn = case.op == "max_pool2d", case.op == "local_response_norm"  # the gradients of the others have flips
    changes: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
        "NaN": (nan, pool), "ties": (lambda x: (x * 2).round(), pool or lrn),
        "zeros": (lambda x: x.clamp(-1, 0) * 0.0, pool), "large": (lambda x: x * 1e4, False),
    }  # fmt: skip
    for name, change in list(changes.items())[: 3 if case.filters else 4]:
        yield f"{case} {name} {dtype} {layout}", partial(check, *change)


def same(a: list[Tensor], b: list[Tensor]) -> None:
    differ = [(s != t).sum().item() for s, t in zip(a, b)]
    assert not any(differ), f"elements that differ in output and gradients: {differ}"


def invariants(case: Case, dtype: torch.dtype, device: str, layout: str) -> Iterator[tuple[str, Any]]:
    """What must not change a bit."""
    function = case.function()

    @cache
    def inputs() -> list[Tensor]:
        x, *weights = case.inputs(5, dtype, device)
        return [in_layout(x, layout), *weights]

    first = cache(lambda: run(function, inputs()))

    def repeat() -> None:
        same(first(), run(function, inputs()))
        same(first(), run(function, inputs()))

    def poison() -> None:
        """Bytes 0xff, NaN in every dtype, in the blocks that the allocator hands out next."""
        sizes = [first()[0].numel(), *(t.nbytes for t in first())]
        blocks = [torch.full((size,), 255, dtype=torch.uint8, device=device) for size in 3 * sizes]
        del blocks
        same(first(), run(function, inputs()))

    def deterministic() -> None:
        torch.use_deterministic_algorithms(True)
        try:
            same(first(), run(function, inputs()))
        finally:
            torch.use_deterministic_algorithms(False)

    def side_stream() -> None:
        """Inputs arrive late on another stream: work on the default stream would read zeros."""
        late, busy = [torch.zeros_like(x) for x in inputs()], torch.randn(4096, 4096, device=device)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                busy = busy @ busy * 1e-3
            for a, b in zip(late, inputs()):
                a.copy_(b)
            got = run(function, late)
        torch.cuda.synchronize()
        same(first(), got)

    def graph() -> None:
        static, grad = [torch.zeros_like(x) for x in inputs()], fixed(first()[0].shape, device)
        with torch.cuda.stream(torch.cuda.Stream()):
            run(function, static, grad)
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            got = run(function, static, grad)
        for a, b in zip(static, inputs()):
            a.copy_(b)
        captured.replay()
        torch.cuda.synchronize()
        same(first(), got)

    for check in (repeat, poison, deterministic, *((side_stream, graph) if device == "cuda" else ())):
        yield f"{case} {check.__name__} {dtype} {layout}", check


def second(case: Case, dtype: torch.dtype, device: str, layout: str, other: str) -> Iterator[tuple[str, Any]]:
    """The bits of the current device on another one of its kind, which does not become the current one."""

    def check() -> None:
        x, *weights = case.inputs(5, dtype, device)
        inputs, function = [in_layout(x, layout), *weights], case.function()
        first = run(function, inputs)
        got = run(function, [t.to(other) for t in inputs], fixed(first[0].shape, device).to(other))
        same(first, [t.to(device) for t in got])

    yield f"{case} on {other} {dtype} {layout}", check


def large(case: Case, device: str, layout: str, elements: int) -> Iterator[tuple[str, Any]]:
    """Offsets beyond 2^31 elements: the last images of a huge batch against the same images alone."""

    def check() -> float:
        n = elements // math.prod(case.shape) + 6
        x, *weights = case.inputs(3, torch.bfloat16, device)
        format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        many = torch.zeros(n, *case.shape, dtype=x.dtype, device=device).contiguous(memory_format=format)
        many[:3] = many[-3:] = x
        y = case.function()(many.requires_grad_(not weights), *[w.requires_grad_() for w in weights])
        grad = torch.zeros_like(y)
        grad[-3:] = fixed(grad[-3:].shape, device)
        gradients = torch.autograd.grad(y, weights or [many], grad)
        want = run(case.exact(x.dtype), [t.detach().double() for t in (x, *weights)], grad[-3:].double())
        assert torch.equal(y[:3], y[-3:]), "the first and the last images of the batch are equal, their results are not"
        compare(y[-3:].detach(), want[0])
        flips = 1.0 if "lrn_max_pool" in case.op else 0.0
        if weights:
            error = max(compare(g, w, flips) for g, w in zip(gradients, want[2:]))
        else:
            assert not gradients[0][:-3].any(), "a gradient reached an image that has none"
            error = compare(gradients[0][-3:], want[1], 2e-3 * flips)
        assert error < 0.08, f"relative norm of a gradient's error {error:.3g}"
        return error

    yield f"{case} more than {elements} elements {layout}", check


def checks(op: str, device: str, tiny: bool) -> Iterator[tuple[str, Any]]:
    """Names and functions; what a check needs is allocated in it, so that it alone fails for lack of memory."""
    dtypes = (torch.float32, torch.bfloat16) if tiny else (torch.float32, torch.float16, torch.bfloat16)
    layouts = LAYOUTS[:3] if tiny else LAYOUTS
    big = [case for case in cases(op) if case.big]
    main, other = (small(op)[0], small(op)[-1]) if tiny else (big[0], small(op)[0])
    for dtype, layout in product(dtypes, layouts[:2]):
        yield from invariants(main, dtype, device, layout)
        yield from special(other, dtype, device, layout)
    for case, dtype in product(small(op), dtypes):
        for n in (0, 2) if tiny else (0, 1, 3):
            yield from match(case, n, dtype, device, layouts)
    if device == "cuda" and torch.cuda.device_count() > 1:
        for dtype, layout in product(dtypes, layouts[:2]):
            yield from second(main, dtype, device, layout, "cuda:1")
    if "conv2d" in op and (device == "cuda" or EMULATED):
        for case in small(op) if tiny else cases(op):
            yield from match(case, 3, torch.float32, device, layouts[:2], tf32=True)
    for layout in LAYOUTS[:2] if tiny or (device == "cuda" and torch.cuda.mem_get_info()[0] > 60e9) else ():
        yield from large(main, device, layout, 1 << 15 if tiny else 1 << 31)
        torch.cuda.empty_cache()  # for the other operators' checks
    if tiny:
        return
    for n, case, dtype in product((1, 2, 5, 133), big, dtypes):
        yield from match(case, n, dtype, device, layouts if n == 5 else layouts[:2])


def smoke(device: str) -> None:
    for op in OPS:
        for case, dtype, layout in product(small(op), (torch.float32, torch.bfloat16), LAYOUTS[:2]):
            # everything comes from the CPU as the kernels want it: no kernel but ours writes what they read
            x, *weights = case.inputs(2, dtype, "cpu")
            leaves = [t.to(device).requires_grad_() for t in (in_layout(x, layout), *weights)]
            y = case.function()(*leaves)
            grad = torch.empty_like(y, device="cpu").copy_(torch.randn(y.shape)).to(device)
            torch.autograd.grad(y, leaves, grad)


def main(arguments: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--device", choices=("cpu", "cuda", "emulator"), default="cuda")
    flags.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    flags.add_argument("--output", type=Path)
    flags.add_argument("--time", type=float, default=float("inf"), help="seconds; checks not reached by then fail")
    flags.add_argument("--tiny", action="store_true", help="small shapes only")
    flags.add_argument("--smoke", action="store_true", help="run every kernel, check nothing")
    args = flags.parse_args(arguments)
    if args.device == "emulator":
        if not EMULATED:  # which is decided when the package is imported
            command = [sys.executable, __file__, *(sys.argv[1:] if arguments is None else arguments)]
            return subprocess.run(command, env=os.environ | {"ALEXNET_CUDA_EMULATED": "1"}).returncode
        args.device, args.tiny = "cpu", True
    if args.smoke:
        for allow, kernels in ((False, "auto"), (True, "wgmma")):
            torch.backends.cudnn.allow_tf32, os.environ[VARIABLE] = allow, kernels
            smoke(args.device)
        return 0
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, but where a check says TF32
    end, failed, count = time.monotonic() + args.time, 0, 0
    file = open(args.output, "w") if args.output else sys.stdout  # noqa: SIM115
    for op in args.ops:
        torch.manual_seed(0)
        for name, check in checks(op, args.device, args.tiny):
            record: dict[str, Any] = {"op": op, "check": name, "ok": True}
            try:
                if time.monotonic() > end:
                    raise TimeoutError(f"not reached within {args.time:g} s, nor what follows")
                record["error"] = check()
            except torch.OutOfMemoryError as error:  # the other operators' checks use the device too
                record["message"] = f"skipped: {error}"[:200]
            except Exception as error:
                record |= {"ok": False, "message": f"{type(error).__name__}: {error}"[:500]}
            count, failed = count + 1, failed + (not record["ok"])
            file.write(json.dumps(record) + "\n")
            file.flush()
            if record.get("message", "").startswith(("TimeoutError", "AcceleratorError")):
                break  # after a CUDA error nothing runs in this process
    print(f"{count} checks, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
