"""Which operators of a network run on this package's kernels, and which on torch's own (`reference`).

Decided once per device, from its properties. ALEXNET_CUDA_KERNELS decides instead for every network of a process, and
the argument `kernels` of AlexNet and accelerate for one network. A value is "auto", "all", "none", "wgmma", or the
operators that use our kernels, with commas between. Whatever is called in `ops` uses a kernel where there is one.

"wgmma" is auto, and the first block's other kernel in half and bfloat16 on GPUs of compute capability 9.0:
conv2d_relu_lrn_max_pool2d_wgmma.cu, which has not been measured yet. As the variable it holds for a whole process, for
`ops` and for networks that chose something else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _library, ops, reference

VARIABLE = "ALEXNET_CUDA_KERNELS"
OPERATORS = tuple(ops.__all__)


class KernelsError(ValueError):
    """No such choice."""


_chosen: dict[tuple[str | None, str, int | None], tuple[str, ...]] = {}


def operator(name: str, x: Tensor, kernels: str | None) -> Callable[..., Any]:
    """`ops.name` or its twin in plain torch; kernels: a network's choice, or None for the environment's. Where torch.fx
    traces, which knows no device, the function is a node of its graph."""
    if isinstance(x, torch.fx.Proxy):
        target = getattr(reference if kernels == "none" else ops, name)
        return lambda *args, **kwargs: x.tracer.create_proxy("call_function", target, args, kwargs)
    return getattr(ops if uses(name, x, kernels) else reference, name)


def uses(name: str, x: Tensor, kernels: str | None) -> bool:
    return name in chosen(kernels, x.device.type, x.device.index)


@torch.compiler.assume_constant_result
def chosen(kernels: str | None, device: str, index: int | None) -> tuple[str, ...]:
    """The operators that use our kernels there."""
    key = kernels, device, index
    if key not in _chosen:
        _chosen[key] = decide(*key)[0]
    return _chosen[key]


def decide(kernels: str | None, device: str, index: int | None = None) -> tuple[tuple[str, ...], str]:
    """The operators that use our kernels there, and why these."""
    source = "kernels"
    if kernels is None:
        kernels, source = os.environ.get(VARIABLE) or "auto", VARIABLE
    names = tuple(name.strip() for name in kernels.split(",")) if isinstance(kernels, str) else ("",)
    if kernels in ("auto", "wgmma"):
        return _automatic(device, index)
    if kernels in ("all", "none"):
        return OPERATORS if kernels == "all" else (), f"{source} is {kernels}"
    if not set(names) <= set(OPERATORS):
        raise KernelsError(
            f"{source}: expected auto, all, none, wgmma, or some of {', '.join(OPERATORS)} with commas between, "
            f"got {kernels!r}"
        )
    return names, f"{source} is {kernels}"


def _automatic(device: str, index: int | None) -> tuple[tuple[str, ...], str]:
    why_not = _library.WHY_NOT.get(device, f"there are no kernels for {device}")
    if why_not:
        return (), why_not
    if device == "cpu":
        return OPERATORS, _library.build_info()["CPU kernels"]
    capability = torch.cuda.get_device_capability(index)
    built = _library.build_info()["CUDA architectures"]
    why = f"compute capability {capability[0]}.{capability[1]}, compiled for {built}"
    if os.environ.get(VARIABLE) == "wgmma":
        wgmma = capability[0] == 9 and re.search(r"\b90a", built)
        why += "; first block by wgmma" if wgmma else "; wgmma needs 9.0 and code for 90a"
    return OPERATORS if _runs_on(capability, built) else (), why


def _runs_on(capability: tuple[int, int], built: str) -> bool:
    """Whether code for these architectures, in CMake's spelling ("80-real 90a 120-virtual"), runs on such a device."""
    for number, kind, only in re.findall(r"(\d+)([af]?)(-real|-virtual)?", built):
        least = int(number[:-1]), int(number[-1])
        if kind == "a":
            fits = capability == least
        else:  # machine code for later ones of the same generation, PTX for whatever is later
            later_generation = not kind and only != "-real"
            fits = capability >= least and (later_generation or capability[0] == least[0])
        if fits:
            return True
    return not re.search(r"\d", built)  # "native", "all"


def describe() -> dict[str, str]:
    """For `alexnet-cuda info`: on every device, the operators that use our kernels, and why."""
    devices: list[tuple[str, int | None]] = [("cpu", None)]
    if torch.cuda.is_available():
        devices += [("cuda", index) for index in range(torch.cuda.device_count())]
    rows = {VARIABLE: os.environ.get(VARIABLE) or "not set, which is auto; or all, none, wgmma, names of operators"}
    for device, index in devices:
        names, why = decide(None, device, index)
        name = device if index is None else f"{device}:{index}"
        rows[f"our kernels on {name}"] = f"{', '.join(names) or 'none'} ({why})"
        if device == "cuda" and not _library.WHY_NOT["cuda"]:
            rows[f"first block on {name}"] = _first_block(index)
    return rows


def _first_block(index: int | None) -> str:
    properties: Any = torch.cuda.get_device_properties(index)  # torch's stub lacks what follows
    memory = properties.shared_memory_per_block_optin
    needed = {filters: torch.ops.alexnet_cuda._first_block_bytes(3, filters) for filters in (64, 96)}
    fits = [f"{filters} filters ({size / 1024:.0f} KB)" for filters, size in needed.items() if size <= memory]
    return f"one kernel for {' and '.join(fits) or 'no number of filters'} in {memory >> 10} KB of shared memory"
