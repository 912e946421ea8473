"""Loads the compiled libraries: `_C` (schemas and CPU kernels) always, `_cuda.so` when torch itself has CUDA.

Whatever cannot be loaded is replaced by the plain-torch twins in `reference`; `build_info()` says what and why.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

# Where kernels are registered, and the dtypes they take there; `ops` sends everything else to torch.
KERNEL_DTYPES: dict[str, frozenset[torch.dtype]] = {}
# "" when loaded, otherwise the reason.
WHY_NOT: dict[str, str] = {}

if "ALEXNET_CUDA_LIB_DIR" in os.environ:  # libraries of a plain CMake build tree
    sys.modules[__package__].__path__.append(os.environ["ALEXNET_CUDA_LIB_DIR"])

_C: Any = None
# For tests: the CPU's operators are the CUDA kernels on the emulator, with their host code (csrc/emulator/host.cpp).
EMULATED = os.environ.get("ALEXNET_CUDA_EMULATED") == "1"
_CUDA_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


def _load_cpu() -> str:
    global _C
    try:
        _C = importlib.import_module("._emulated" if EMULATED else "._C", __package__)
    except ModuleNotFoundError:
        if EMULATED:
            raise
        return "it was installed without a C++ compiler, or this is a source tree that was never installed"
    except ImportError as error:
        return f"its library does not load ({error})"
    if mib := os.environ.get("ALEXNET_CUDA_KEPT_MIB"):
        if not mib.isdecimal():
            raise ValueError(f"ALEXNET_CUDA_KEPT_MIB: expected a whole number of MiB, got {mib!r}")
        _C.set_kept_memory(int(mib) << 20)
    KERNEL_DTYPES["cpu"] = _CUDA_DTYPES if EMULATED else _CUDA_DTYPES | {torch.float64}
    return ""


def _load_cuda() -> str:
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


WHY_NOT["cpu"] = _load_cpu()
WHY_NOT["cuda"] = _load_cuda()
if WHY_NOT["cpu"]:
    warnings.warn(
        f"alexnet_cuda runs on plain torch, more slowly, without its kernels: {WHY_NOT['cpu']}",
        RuntimeWarning,
        stacklevel=1,
    )


def has_kernel(x: torch.Tensor) -> bool:
    """Whether a compiled kernel serves tensors with x's device and dtype.

    Not inside torch.func.grad and its like, and not in a dual_level() of torch.autograd.forward_ad, which cannot
    differentiate operators registered with torch.library.
    """
    kind = "cpu" if x.is_cpu else x.device.type  # which makes a device object: long, beside a small CPU call
    return x.dtype in KERNEL_DTYPES.get(kind, ()) and not _differentiating()


def transforming() -> bool:
    """Whether this runs inside torch.vmap, a transform of torch.func or a level of forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _differentiating() -> bool:
    if forward_ad._current_level >= 0:
        return True
    if not transforming():
        return False
    from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_all_functorch_interpreters

    return not all(isinstance(level, VmapInterpreter) for level in retrieve_all_functorch_interpreters())


def set_kept_memory(limit: int) -> int:
    """Keep at most `limit` bytes of freed CPU results for later ones, and return the limit before.

    The system maps the memory of a large new tensor page by page while it is first written. At 32 images that takes
    longer than computing AlexNet's first layers, so our CPU operators use the memory of earlier results again, which
    torch's profiler does not see. With 0 they use torch's allocator, and what was kept is given back. At first the
    limit is 512 MiB, or ALEXNET_CUDA_KEPT_MIB.

    Raises:
        ValueError: `limit` is negative.
    """
    if limit < 0:
        raise ValueError(f"set_kept_memory: expected limit to be at least 0, got {limit}")
    return _C.set_kept_memory(limit) if _C is not None else 0


def build_info() -> dict[str, str]:
    """Versions, architectures and what is in use, each as one printable string.

    Keys: `version`, `torch` (running), and, when compiled, `built against torch`, `runs on torch`, `compiler`,
    `CUDA toolkit`, `CUDA architectures`; `CPU kernels` and `CUDA kernels` hold the instruction set in use and "loaded",
    or the reason why the plain-torch versions serve instead; `CPU memory kept`: see `set_kept_memory`.
    """
    from . import __version__

    info = {"version": __version__, "torch": torch.__version__}
    if _C is not None:
        info |= _C.build_info()
    info["CPU kernels"] = WHY_NOT["cpu"] or _C.cpu_level()
    info["CUDA kernels"] = WHY_NOT["cuda"] or "loaded"
    if _C is not None:
        info["CPU memory kept"] = f"up to {_C.kept_memory_limit() >> 20} MiB"
    return info
