"""Loads the compiled libraries: `_C` (schemas and CPU kernels) always, `_cuda.so` when torch itself has CUDA.

Which tensors have a kernel is decided here alone (`has_kernel`). Where there is none, `ops` uses torch's operators
(`reference`). ALEXNET_CUDA_KERNELS=0 turns all kernels off.
"""

import importlib
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from ._torch_private import differentiating
from ._version import VERSION

# The dtypes that have kernels, by device type; a device type whose library is not loaded is missing.
KERNEL_DTYPES: dict[str, frozenset[torch.dtype]] = {}
# By device type: "" when its library is loaded, otherwise why not.
UNAVAILABLE_REASON: dict[str, str] = {}

if "ALEXNET_CUDA_LIB_DIR" in os.environ:  # libraries of a plain CMake build tree
    sys.modules[__package__].__path__.append(os.environ["ALEXNET_CUDA_LIB_DIR"])

_C: Any = None
_CUDA_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


def _kernels_enabled() -> bool:
    value = os.environ.get("ALEXNET_CUDA_KERNELS", "1")
    if value not in ("0", "1"):
        raise ValueError(f"ALEXNET_CUDA_KERNELS: expected 0 or 1, got {value!r}")
    return value == "1"


def _load_cpu() -> str:
    global _C
    if not _kernels_enabled():
        return "ALEXNET_CUDA_KERNELS is 0"
    try:
        _C = importlib.import_module("._C", __package__)
    except ModuleNotFoundError:
        return "it was installed without a C++ compiler, or this is a source tree that was never installed"
    except ImportError as error:
        return f"its library does not load ({error})"
    if mib := os.environ.get("ALEXNET_CUDA_CACHE_MIB"):
        if not mib.isdecimal():
            raise ValueError(f"ALEXNET_CUDA_CACHE_MIB: expected a whole number of MiB, got {mib!r}")
        _C.set_cache_limit(int(mib) << 20)
    KERNEL_DTYPES["cpu"] = _CUDA_DTYPES | {torch.float64}
    return ""


def _load_cuda() -> str:
    if not _kernels_enabled():
        return "ALEXNET_CUDA_KERNELS is 0"
    if _C is None:
        return "the CPU library, which defines the operators, is not loaded"
    if torch.version.cuda is None:
        return "this torch is a CPU build"
    path = next(Path(_C.__file__).parent.glob("_cuda*.so"), None)
    if path is None:
        return "the package was built without nvcc"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    KERNEL_DTYPES["cuda"] = _CUDA_DTYPES
    return ""


UNAVAILABLE_REASON["cpu"] = _load_cpu()
UNAVAILABLE_REASON["cuda"] = _load_cuda()
if UNAVAILABLE_REASON["cpu"] and _kernels_enabled():
    warnings.warn(
        f"alexnet_cuda runs on plain torch, more slowly, without its kernels: {UNAVAILABLE_REASON['cpu']}",
        RuntimeWarning,
        stacklevel=1,
    )

# In CMake's spelling: "80-real 90a 120-virtual".
CUDA_ARCHITECTURES: str = _C.build_info()["CUDA architectures"] if _C is not None else "none"
_has_code_for: dict[int | None, bool] = {}  # by CUDA device


def has_kernel(x: torch.Tensor) -> bool:
    """Whether a compiled kernel serves tensors with x's device and dtype. On CUDA the library must hold code for the
    device. Inside torch.func.grad and its like, and in a dual_level() of torch.autograd.forward_ad, none does: they
    cannot differentiate operators registered with torch.library."""
    kind = "cpu" if x.is_cpu else x.device.type  # a device object takes long to make, beside a small CPU call
    if x.dtype not in KERNEL_DTYPES.get(kind, ()) or differentiating():
        return False
    return kind != "cuda" or _has_code(x.device.index)


def _has_code(index: int | None) -> bool:
    if index not in _has_code_for:
        _has_code_for[index] = runs_on(torch.cuda.get_device_capability(index), CUDA_ARCHITECTURES)
    return _has_code_for[index]


def runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Whether code for these architectures runs on a device of that compute capability."""
    for number, kind, only in re.findall(r"(\d+)([af]?)(-real|-virtual)?", architectures):
        least = int(number[:-1]), int(number[-1])
        if kind == "a":
            fits = capability == least
        else:  # machine code for later ones of the same generation, PTX for whatever is later
            later_generation = not kind and only != "-real"
            fits = capability >= least and (later_generation or capability[0] == least[0])
        if fits:
            return True
    return architectures in ("native", "all", "all-major")


def build_info() -> dict[str, str]:
    """Versions, architectures and what is in use, each as one printable string.

    Keys: `version`, `torch` (running), and, when compiled, `built against torch`, `runs on torch`, `compiler`,
    `CUDA toolkit`, `CUDA architectures`; `CPU kernels` and `CUDA kernels` hold the instruction set in use and "loaded",
    or the reason why torch's operators serve instead; `CPU cache`: the limit of the CPU caching allocator.
    """
    info = {"version": VERSION, "torch": torch.__version__}
    if _C is not None:
        info |= _C.build_info()
    info["CPU kernels"] = UNAVAILABLE_REASON["cpu"] or _C.cpu_level()
    info["CUDA kernels"] = UNAVAILABLE_REASON["cuda"] or "loaded"
    if _C is not None:
        info["CPU cache"] = f"up to {_C.cache_limit() >> 20} MiB of freed results"
    return info


def describe_devices() -> dict[str, str]:
    """For every device of this machine, whether its tensors are served by our kernels, and why."""
    rows = {"kernels on cpu": UNAVAILABLE_REASON["cpu"] or f"yes ({_C.cpu_level()})"}
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        answer = "yes" if _has_code(index) else "no"
        why = f"compute capability {capability[0]}.{capability[1]}, compiled for {CUDA_ARCHITECTURES}"
        rows[f"kernels on cuda:{index}"] = UNAVAILABLE_REASON["cuda"] or f"{answer} ({why})"
    return rows
