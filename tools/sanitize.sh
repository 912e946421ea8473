#!/usr/bin/env bash
# The CPU operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer, with PYTHON (.venv's unless set).
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath --no-symlinks "${PYTHON:-.venv/bin/python}")
build=build/sanitize
PATH="$(dirname "$python"):$PATH"

cmake -S . -B $build -G Ninja -DPython_EXECUTABLE="$python" -DALEXNET_CUDA_WITH_CUDA=OFF \
  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined"
cmake --build $build --target _C
rm -rf $build/package && mkdir $build/package
cp -r alexnet_cuda $build/package && cp $build/_C.so $build/package/alexnet_cuda

LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
  "$python" - "$@" <<'PYTHON'
import sys

sys.meta_path = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]  # an editable install
sys.path.insert(0, "build/sanitize/package")
from alexnet_cuda import _library

assert "sanitize" in str(_library._C.path), _library._C.path
import pytest

ops = ["local_response_norm", "max_pool2d", "relu_lrn_max_pool2d", "conv2d", "conv2d_relu_lrn_max_pool2d"]
files = [f"python_tests/test_{name}.py" for name in [*ops, "winograd_conv2d", "fuzz", "cpu_cache", "cpu_kernels", "host_checks"]]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "not cuda and not compile and not export and not spawn", *files, *sys.argv[1:]]))
PYTHON
