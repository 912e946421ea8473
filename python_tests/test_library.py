"""The libraries and the import, not the operators: symbols, build facts, what is imported, who has a kernel."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import alexnet_cuda
from alexnet_cuda import _library

# What every Linux with torch has. Older C libraries have parts of libc in files of their own.
NEEDED = re.compile(r"lib(torch|torch_cpu|c|stdc\+\+|m|gcc_s|dl|pthread|rt)\.so(\.\d+)?|ld-linux-.*")


@pytest.mark.skipif(shutil.which("nm") is None or shutil.which("readelf") is None, reason="no nm or no readelf")
@pytest.mark.parametrize("name", ["_C.so", "_cuda.so"])
def test_one_library_serves_every_python_and_torch(name, kernels):
    """Only PyTorch's stable ABI, no Python, and the CUDA runtime inside."""
    torch_abi_audit = pytest.importorskip("torch_abi_audit")
    path = _library._C.path.with_name(name)
    if not path.exists():
        pytest.skip(f"{name} was not built")
    abi = torch_abi_audit.inspect_extension(path).torch
    assert (abi.unstable_symbols, abi.unknown_shim_symbols) == ((), ())
    assert abi.min_torch_version == "2.11.0"
    undefined = subprocess.run(["nm", "-D", "-u", path], check=True, capture_output=True, text=True).stdout
    assert not re.findall(r" [Uw] ((?:_?Py|cu)\w+)", undefined)
    dynamic = subprocess.run(["readelf", "-d", path], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert "libtorch.so" in needed
    assert [library for library in needed if not NEEDED.fullmatch(library)] == []


@pytest.mark.parametrize(
    ("driver", "runtime", "reason"),
    [
        (12040, 13000, "the NVIDIA driver serves CUDA 12.4, the library needs a driver for CUDA 13.0"),
        (12020, 12090, "the NVIDIA driver serves CUDA 12.2, the library needs a driver for CUDA 12.4"),
        (12000, 12020, ""),
        (12040, 12090, ""),  # minor versions are compatible
        (13020, 12090, ""),
        (0, 13000, ""),  # no driver, so no GPU
    ],
)
def test_an_older_driver_is_named(driver, runtime, reason):
    assert _library.driver_problem(driver, runtime) == reason


def test_build_info():
    info = alexnet_cuda.build_info()
    assert info["version"] == alexnet_cuda.__version__
    assert info["torch"] == torch.__version__
    assert {"CPU kernels", "CUDA kernels"} <= info.keys()
    assert all(isinstance(value, str) and value for value in info.values())


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=os.environ | environment
    )


def test_import_loads_nothing_heavy():
    """`import torch` takes most of the time; torch._dynamo alone would nearly double it."""
    code = "import sys, torch; before = set(sys.modules); import alexnet_cuda; print(*(set(sys.modules) - before))"
    run = python(code)
    assert run.returncode == 0, run.stderr
    loaded = {name for name in run.stdout.split() if not name.startswith("alexnet_cuda")}
    heavy = "torch._dynamo", "torch._inductor", "torchvision", "lightning", "matplotlib", "sklearn", "typer", "google"
    assert not [name for name in loaded if name.startswith(heavy)]
    assert len(loaded) < 40, sorted(loaded)


def test_variable_turns_kernels_off(kernels, monkeypatch):
    code = """if True:
        import torch, alexnet_cuda
        from alexnet_cuda._library import has_kernel
        x = torch.randn(1, 8, 9, 9)
        y = alexnet_cuda.ops.relu_lrn_max_pool2d(x, 5)
        assert y.equal(alexnet_cuda.reference.relu_lrn_max_pool2d(x, 5))
        print(has_kernel(x), alexnet_cuda.build_info()["CPU kernels"], alexnet_cuda.build_info()["CUDA kernels"])"""
    run = python(code, ALEXNET_CUDA_KERNELS="0")
    assert run.stdout == "False ALEXNET_CUDA_KERNELS is 0 ALEXNET_CUDA_KERNELS is 0\n", run.stderr
    for value in ("all", "", "2"):
        monkeypatch.setenv("ALEXNET_CUDA_KERNELS", value)
        with pytest.raises(ValueError, match=f"ALEXNET_CUDA_KERNELS: expected 0 or 1, got {value!r}"):
            _library._load_cpu()


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((9, 0), "80-real 90a-real", True),
        ((8, 6), "80-real 90a-real", True),
        ((7, 5), "80-real 90a-real", False),
        ((10, 0), "80-real 90a", False),  # "a" is for 9.0 alone, PTX as well
        ((8, 0), "86-real", False),
        ((12, 1), "100-real 120", True),
        ((13, 0), "100-real 120", True),
        ((13, 0), "100-real 120-real", False),
        ((10, 3), "100f", True),
        ((12, 0), "100f", False),
        ((9, 0), "80-virtual", True),
        ((9, 0), "native", True),
        ((9, 0), "none", False),
    ],
)
def test_a_gpu_without_code_is_served_by_torch(capability, architectures, runs, monkeypatch):
    """Every operator asks has_kernel; a tensor on a device that the library has no code for has none."""
    monkeypatch.setitem(_library.KERNEL_DTYPES, "cuda", frozenset({torch.float32}))
    monkeypatch.setitem(_library.UNAVAILABLE_REASON, "cuda", "")
    monkeypatch.setattr(_library, "CUDA_ARCHITECTURES", architectures)
    monkeypatch.setattr(_library, "_has_code_for", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, 8, 9, 9, device="cuda")
        assert _library.has_kernel(x) is runs
        assert not _library.has_kernel(x.double())
        weight, image = torch.empty(4, 3, 11, 11, device="cuda"), torch.empty(1, 3, 27, 27, device="cuda")
        calls = {
            "conv2d": (image, weight),
            "local_response_norm": (x, 5),
            "max_pool2d": (x,),
            "relu_lrn_max_pool2d": (x, 5),
            "conv2d_relu_lrn_max_pool2d": (image, weight, None, 5),
        }
        for name, args in calls.items():
            with OperatorLog() as log:
                y = getattr(alexnet_cuda.ops, name)(*args)
            assert y.device.type == "cuda"
            assert (f"alexnet_cuda::{name}" in log.names) is runs, name
    answer = "yes" if runs else "no"
    why = f"compute capability {capability[0]}.{capability[1]}, compiled for {architectures}"
    assert _library.describe_devices()["kernels on cuda:0"] == f"{answer} ({why})"


class OperatorLog(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


def test_devices_are_described(kernels):
    rows = _library.describe_devices()
    assert rows["kernels on cpu"] == f"yes ({alexnet_cuda.build_info()['CPU kernels']})"
    assert len(rows) == 1 + torch.cuda.device_count()


def test_without_libraries(tmp_path):
    """The package's Python alone, as after an installation without a compiler: it works, and says so once."""
    package = Path(alexnet_cuda.__file__).parent
    shutil.copytree(package, tmp_path / "alexnet_cuda", ignore=shutil.ignore_patterns("*.so"))
    code = (
        f"import torch, alexnet_cuda; assert alexnet_cuda.__file__.startswith({str(tmp_path)!r}); "
        "y = alexnet_cuda.ops.relu_lrn_max_pool2d(torch.randn(1, 8, 9, 9, requires_grad=True), 5); y.sum().backward(); "
        "print(alexnet_cuda.build_info()['CPU kernels'])"
    )
    run = subprocess.run([sys.executable, "-S", "-c", PATHS + code], capture_output=True, text=True, cwd=tmp_path,
                         env={k: v for k, v in os.environ.items() if k != "ALEXNET_CUDA_LIB_DIR"})  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "without a C++ compiler" in run.stdout
    assert run.stderr.count("RuntimeWarning") == 1


# -S leaves out the import hook of an editable installation, which would find the built package.
PATHS = f"import sys; sys.path += {[p for p in sys.path if 'site-packages' in p]!r}; "
