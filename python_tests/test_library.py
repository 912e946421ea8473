"""The libraries and the import, not the operators: symbols, build facts, import time."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import alexnet_cuda
from alexnet_cuda import _library

# The functions of PyTorch's stable C ABI that we call; all are in torch 2.11. A name that is not here needs a look at
# the version that brought it. (The stream's is in torch's CUDA library, hence weak.)
STABLE = re.compile(
    r"aoti_torch_(abi_version|aten_fill__Scalar|(create|delete)_device_guard|delete_(library|tensor)_object"
    r"|dtype_element_size"
    r"|get_(current_cuda_stream|device_index|device_type|dim|dtype|numel|size|stride)"
    r"|library_(def|init_def|init_impl)|new_tensor_handle|(device_type|dtype|layout|memory_format)_\w+)"
    r"|torch_(call_dispatcher|from_blob|parallel_for|library_impl|get_(const|mutable)_data_ptr|dtype_\w+"
    r"|new_list_reserve_size|list_push_back|delete_list)"
)


def undefined_symbols(library):
    lines = subprocess.run(["nm", "-D", "-u", library], check=True, capture_output=True, text=True).stdout.splitlines()
    return [line.split()[-1].split("@")[0] for line in lines if line.strip()]


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.parametrize("stem", ["_C", "_cuda"])
def test_stable_abi(stem, kernels):
    path = next(Path(_library._C.__file__).parent.glob(f"{stem}.*so"), None)
    if path is None:
        pytest.skip(f"{stem} was not built")
    symbols = undefined_symbols(path)
    demangled = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True).stdout
    assert not re.findall(r"^.*\b(?:c10|at|caffe2)::.*$|^.*\btorch::(?!stable|headeronly).*$", demangled, re.M)
    assert [s for s in symbols if s.startswith(("aoti_torch", "torch_")) and not STABLE.fullmatch(s)] == []
    linked = subprocess.run(["readelf", "-d", path], check=True, capture_output=True, text=True).stdout
    assert not re.search(r"NEEDED.*(cuda|cudnn|cublas|torch_python|c10)", linked)
    assert not [s for s in symbols if s.startswith("cu")]  # the CUDA runtime is inside


def test_build_info():
    info = alexnet_cuda.build_info()
    assert info["version"] == alexnet_cuda.__version__
    assert info["torch"] == torch.__version__
    assert {"CPU kernels", "CUDA kernels"} <= info.keys()
    assert all(isinstance(value, str) and value for value in info.values())


def test_import_is_light():
    code = (
        "import sys, torch; before = set(sys.modules); import alexnet_cuda; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"torchvision", "lightning", "matplotlib", "sklearn", "typer", "rich"} & set(run.stdout.split())


def test_without_libraries(tmp_path):
    """The package's Python alone, as after an installation without a compiler: it works, and says so once."""
    package = Path(alexnet_cuda.__file__).parent
    shutil.copytree(package, tmp_path / "alexnet_cuda", ignore=shutil.ignore_patterns("*.so"))
    code = (
        f"import torch, alexnet_cuda; assert alexnet_cuda.__file__.startswith({str(tmp_path)!r}); "
        "y = alexnet_cuda.ops.relu_lrn_max_pool2d(torch.randn(1, 8, 9, 9, requires_grad=True), 5); y.sum().backward(); "
        "print(alexnet_cuda.build_info()['CPU kernels'])"
    )
    run = subprocess.run([sys.executable, "-S", "-c", PATHS + code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "without a C++ compiler" in run.stdout
    assert run.stderr.count("RuntimeWarning") == 1


# -S leaves out the import hook of an editable installation, which would find the built package.
PATHS = f"import sys; sys.path += {[p for p in sys.path if 'site-packages' in p]!r}; "
