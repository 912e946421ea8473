"""Loads the compiled libraries: `_C.so` (schemas and CPU kernels) always, `_cuda.so` when torch itself has CUDA.

Which tensors have a kernel is decided here alone (`has_kernel`). Where there is none, `ops` uses torch's operators
(`reference`). ALEXNET_CUDA_KERNELS=0 turns all kernels off.
"""

import ctypes
import os
import re
import sys
import warnings
from pathlib import Path

import torch

from ._torch_private import differentiating
from ._version import VERSION

# The dtypes that have kernels, by device type; a device type whose library is not loaded is missing.
KERNEL_DTYPES: dict[str, frozenset[torch.dtype]] = {}
# By device type: "" when its library is loaded, otherwise why not.
UNAVAILABLE_REASON: dict[str, str] = {}

if "ALEXNET_CUDA_LIB_DIR" in os.environ:  # libraries of a plain CMake build tree
    sys.modules[__package__].__path__.append(os.environ["ALEXNET_CUDA_LIB_DIR"])


class Library:
    """The loaded library `_C.so`: the functions of csrc/c_interface.cpp. Its operators are in torch.ops.alexnet_cuda.

    Raises OSError when it does not load."""

    def __init__(self, path: Path):
        torch.ops.load_library(str(path))
        self.path = path
        self._functions = ctypes.CDLL(str(path))

    def build_info(self) -> dict[str, str]:
        lines = self._text("alexnet_cuda_build_info").splitlines()
        return {name: value or "none" for name, _, value in (line.partition(": ") for line in lines)}

    def cpu_level(self) -> str:
        """baseline, avx2, avx512 or avx512 with AMX. Raises RuntimeError for a bad value of ALEXNET_CUDA_CPU_LEVEL."""
        level = self._text("alexnet_cuda_cpu_level")
        if level.startswith("ALEXNET_CUDA_CPU_LEVEL"):
            raise RuntimeError(level)
        return level

    def has_amx(self) -> bool:
        """Whether the kernels for the matrix unit of Intel's CPUs are in use."""
        return self._text("alexnet_cuda_cpu_level").endswith("AMX")

    def cache_limit(self) -> int:
        """Of the CPU caching allocator, in bytes."""
        function = self._functions.alexnet_cuda_cache_limit
        function.restype = ctypes.c_int64
        return function()

    def set_cache_limit(self, limit: int) -> int:
        """In bytes; returns the limit before."""
        function = self._functions.alexnet_cuda_set_cache_limit
        function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_int64
        return function(limit)

    def _text(self, name: str) -> str:
        function = self._functions[name]
        function.restype = ctypes.c_char_p
        return function().decode()


_C: Library | None = None
_CUDA_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


def _kernels_enabled() -> bool:
    value = os.environ.get("ALEXNET_CUDA_KERNELS", "1")
    if value not in ("0", "1"):
        raise ValueError(f"ALEXNET_CUDA_KERNELS: expected 0 or 1, got {value!r}")
    return value == "1"


def _find(name: str) -> Path | None:
    """A library in a folder of the package: an editable installation has two."""
    paths = (Path(folder, name) for folder in sys.modules[__package__].__path__)
    return next(filter(Path.exists, paths), None)


def _load_cpu() -> str:
    global _C
    if not _kernels_enabled():
        return "ALEXNET_CUDA_KERNELS is 0"
    path = _find("_C.so")
    if path is None:
        return "it was installed without a C++ compiler, or this is a source tree that was never installed"
    try:
        _C = Library(path)
    except OSError as error:
        return f"its library does not load ({error.__cause__ or error})"
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
    path = _C.path.with_name("_cuda.so")
    if not path.exists():
        return "the package was built without nvcc"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error.__cause__ or error}"
    driver, runtime = ctypes.c_int(), ctypes.c_int()
    ctypes.CDLL(str(path)).alexnet_cuda_versions(ctypes.byref(driver), ctypes.byref(runtime))
    if reason := driver_problem(driver.value, runtime.value):
        return reason
    KERNEL_DTYPES["cuda"] = _CUDA_DTYPES
    return ""


def driver_problem(driver: int, runtime: int) -> str:
    """Why a driver (1000 major + 10 minor of the CUDA version that it serves, 0: there is none) cannot run a library
    with that CUDA runtime, or "". Minor versions are compatible, but wheels of nvcc 12.4 and later are compressed in a
    way that drivers know from CUDA 12.4 on (tools/wheel.sh)."""
    least = runtime // 1000 * 1000 if runtime < 12040 else max(12040, runtime // 1000 * 1000)
    if not 0 < driver < least:
        return ""
    serves, needs = (f"{version // 1000}.{version % 1000 // 10}" for version in (driver, least))
    return f"the NVIDIA driver serves CUDA {serves}, the library needs a driver for CUDA {needs}"


UNAVAILABLE_REASON["cpu"] = _load_cpu()
UNAVAILABLE_REASON["cuda"] = _load_cuda()
if UNAVAILABLE_REASON["cpu"] and _kernels_enabled():
    warnings.warn(
        f"alexnet_cuda runs on plain torch, more slowly, without its kernels: {UNAVAILABLE_REASON['cpu']}",
        RuntimeWarning,
        stacklevel=1,
    )

HAS_AMX = _C is not None and _C.has_amx()
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
    info["CPU kernels"] = UNAVAILABLE_REASON["cpu"] if _C is None else _C.cpu_level()
    info["CUDA kernels"] = UNAVAILABLE_REASON["cuda"] or "loaded"
    if _C is not None:
        info["CPU cache"] = f"up to {_C.cache_limit() >> 20} MiB of freed results"
    return info


def describe_devices() -> dict[str, str]:
    """For every device of this machine, whether its tensors are served by our kernels, and why."""
    rows = {"kernels on cpu": UNAVAILABLE_REASON["cpu"] if _C is None else f"yes ({_C.cpu_level()})"}
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        answer = "yes" if _has_code(index) else "no"
        why = f"compute capability {capability[0]}.{capability[1]}, compiled for {CUDA_ARCHITECTURES}"
        rows[f"kernels on cuda:{index}"] = UNAVAILABLE_REASON["cuda"] or f"{answer} ({why})"
    return rows
