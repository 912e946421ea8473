"""What parity.py checks: results against float64, against torch's own operators, and against themselves."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from parity_cases import Case, cases, small
from torch import Tensor

from alexnet_cuda._library import EMULATED

sys.path.append(str(Path(__file__).resolve().parents[1] / "python_tests"))
from helpers import TOLERANCE, in_layout

LAYOUTS = ("contiguous", "channels_last", "offset", "sliced", "permuted")
# of the elements of a gradient: maxima that rounding decides otherwise than float64
FLIPS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-3}


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


@contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = False


def run(function: Callable, inputs: list[Tensor], grad: Tensor | None = None) -> list[Tensor]:
    """The output where nothing is saved for backward, the output where it is, then the gradients of all inputs."""
    with torch.no_grad():
        inference = function(*inputs)
    return [inference, *differentiate(function, inputs, grad)]


def differentiate(function: Callable, inputs: list[Tensor], grad: Tensor | None = None) -> list[Tensor]:
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
    the device; `grad` is rounded to dtype first. Of the form of `run`."""
    device = "cpu" if inputs[0].numel() < 1 << 18 else inputs[0].device
    shape = case.function()(*inputs).shape
    grad = fixed(shape, inputs[0].device).to(device, dtype).double()
    y, *gradients = differentiate(case.exact(dtype), [x.to(device).double() for x in inputs], grad)
    return [y, y, *gradients]


def match(case: Case, n: int, dtype: torch.dtype, device: str, layouts: tuple[str, ...],
          tf32: bool = False) -> Iterator[tuple[str, Any]]:  # fmt: skip
    """Output and gradients against float64, in every layout."""
    inputs = cache(lambda: case.inputs(n, dtype, device))
    expected = cache(lambda: exact(case, inputs(), dtype))
    precision = torch.float16 if tf32 else dtype  # TF32 has the mantissa of float16
    flips = FLIPS[precision] if "lrn_max_pool" in case.op else 0.0

    def check(layout: str) -> float:
        with tf32_allowed(tf32):
            x, *weights = inputs()
            got = run(case.function(), [in_layout(x, layout), *weights])
        same_inference(got)
        want = expected()
        # behind a convolution a flip changes a whole patch of every gradient: there the norm says enough
        share = 1.0 if flips and case.filters else flips
        for g, w in zip(got[:2], want[:2]):
            compare(g.to(w.device), w, dtype=precision)
        errors = [compare(g.to(w.device), w, share, precision) for g, w in zip(got[2:], want[2:])]
        limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[precision]
        if flips:  # two of them at least, of few outputs
            limit += (2 * max(flips, 2 / max(1, want[0].numel()))) ** 0.5
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
        return max(compare(g.to(w.device), w) for g, w in list(zip(got, want))[: None if gradients else 2])

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
    assert not any(differ), f"elements that differ in outputs and gradients: {differ}"


def same_inference(results: list[Tensor]) -> None:
    """On CUDA one family of kernels serves both; on the CPU inference may use others, which float64 judges."""
    if results[0].is_cuda or EMULATED:
        same(results[:1], results[1:2])


# Norm of the difference over norm. float32: sums in another order, and maybe another algorithm of cuDNN. Half: torch
# rounds after each of six steps of its normalisation, by up to 2^-11 or 2^-8; a simulation gave 4e-4 and 3e-3.
FROM_STOCK = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Of gradients through the maximum of what was rounded so: it often decides between two elements; 0.03 and 0.08.
MOVED = {torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.25}


def stock(case: Case, dtype: torch.dtype, device: str, layout: str) -> Iterator[tuple[str, Any]]:
    """torch's own operators in the same dtype; float64's twins could share a mistake with our kernels. Only for inputs
    below 256, whose squares torch's normalisation in float16 can still sum."""

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        x = F.conv2d(x, *weights, stride=4) if weights else x
        x = F.relu(x) if "relu" in case.op else x
        lrn = {name: case.args[name] for name in ("size", "alpha", "k") if name in case.args}
        x = F.local_response_norm(x, **lrn) if lrn else x
        return F.max_pool2d(x, 3, 2) if "pool" in case.op else x

    def check() -> float:
        x, *weights = case.inputs(5, dtype, device)
        inputs = [in_layout(x, layout), *weights]
        got, want = run(case.function(), inputs), run(function, inputs)
        errors = [((g.double() - w.double()).norm() / w.double().norm()).item() for g, w in zip(got, want)]
        limit = FROM_STOCK[dtype]
        of_gradients = MOVED[dtype] if "lrn_max_pool" in case.op else limit
        assert max(errors[:2]) <= limit, f"outputs apart by {errors[:2]}, limit {limit}"
        assert max(errors[2:]) <= of_gradients, f"gradients apart by {errors[2:]}, limit {of_gradients}"
        return max(errors)

    yield f"{case} like torch's own {dtype} {layout}", check


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
        """Bytes 0xff, NaN in every dtype, in the blocks that the allocator hands out next to outputs and workspaces."""
        sizes = [
            first()[0].numel(),
            *(t.nbytes for t in first()),
            *(1 << k for k in range(9, 25 if device == "cuda" else 20)),
        ]
        if device == "cuda":
            torch.cuda.empty_cache()
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


def large(case: Case, dtype: torch.dtype, tf32: bool, device: str, layout: str, elements: int
          ) -> Iterator[tuple[str, Any]]:  # fmt: skip
    """Offsets beyond 2^31 elements: the first and last images of a huge batch against the same images alone."""

    def check() -> float:
        n = elements // math.prod(case.shape) + 6
        x, *weights = case.inputs(3, dtype, device)
        format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        many = torch.zeros(n, *case.shape, dtype=dtype, device=device).contiguous(memory_format=format)
        many[:3] = many[-3:] = x
        leaves = [t.requires_grad_() for t in (many, *weights)]
        with tf32_allowed(tf32):
            with torch.no_grad():
                inference = case.function()(*leaves)[-3:].clone()
            y = case.function()(*leaves)
            grad = torch.zeros_like(y)
            grad[-3:] = fixed(grad[-3:].shape, device)
            dx, *gradients = torch.autograd.grad(y, leaves, grad)
        assert torch.equal(y[:3], y[-3:]), "the first and the last images of the batch are equal, their results are not"
        assert not dx[:-3].any(), "a gradient reached an image that has none"
        same_inference([inference, y[-3:].detach()])
        want = differentiate(case.exact(dtype), [t.detach().double() for t in (x, *weights)], grad[-3:].double())
        precision = torch.float16 if tf32 else dtype
        for result in (inference, y[-3:].detach()):
            compare(result, want[0], dtype=precision)
        flips = (1.0 if case.filters else 2e-3) if "lrn_max_pool" in case.op else 0.0
        error = max(compare(g, w, flips, precision) for g, w in zip([dx[-3:], *gradients], want[1:]))
        assert error < 0.08, f"relative norm of a gradient's error {error:.3g}"
        return error

    yield f"{case} more than {elements} elements {'TF32' if tf32 else dtype} {layout}", check


def large_checks(op: str, device: str, tiny: bool) -> Iterator[tuple[str, Any]]:
    """One after the other, and with nothing else on the device: up to 60 GB."""
    case = next(case for case in cases(op) if case.big != tiny)
    kinds = [(torch.bfloat16, False), *[(torch.float32, tf32) for tf32 in (False, True) if op == "conv2d"]]
    for (dtype, tf32), layout in product(kinds, LAYOUTS[:2]):
        if not tf32 or device == "cuda" or EMULATED:
            yield from large(case, dtype, tf32, device, layout, 1 << 14 if tiny else 1 << 31)


def checks(op: str, device: str, tiny: bool) -> Iterator[tuple[str, Any]]:
    """Names and functions; what a check needs is allocated in it, so that it alone fails for lack of memory."""
    dtypes = (torch.float32, torch.bfloat16) if tiny else (torch.float32, torch.float16, torch.bfloat16)
    layouts = LAYOUTS[:3] if tiny else LAYOUTS
    big = [case for case in cases(op) if case.big]
    main, other = (small(op)[0], small(op)[-1]) if tiny else (big[0], small(op)[0])
    for dtype, layout in product(dtypes, layouts[:2]):
        yield from invariants(main, dtype, device, layout)
        yield from special(other, dtype, device, layout)
        if device == "cuda" or dtype == torch.float32:  # torch normalises no half on the CPU
            yield from stock(main, dtype, device, layout)
    for case in cases(op)[1:] if device == "cuda" else ():  # whose allocator keeps what is freed
        yield from (c for c in invariants(case, torch.bfloat16, device, "contiguous") if " poison " in c[0])
    for case, dtype in product(small(op), dtypes):
        for n in (0, 2) if tiny else (0, 1, 3):
            yield from match(case, n, dtype, device, layouts)
    if device == "cuda" and torch.cuda.device_count() > 1:
        for dtype, layout in product(dtypes, layouts[:2]):
            yield from second(main, dtype, device, layout, "cuda:1")
    if "conv2d" in op and (device == "cuda" or EMULATED):
        for case in small(op) if tiny else cases(op):
            yield from match(case, 3, torch.float32, device, layouts[:2], tf32=True)
    if not tiny:
        for n, case, dtype in product((1, 5, 133), big, dtypes):
            yield from match(case, n, dtype, device, layouts if n == 5 else layouts[:2])
