#!/usr/bin/env bash
# Installs dist/*.whl in fresh environments, of every Python from 3.10 to 3.14t that uv finds or can download, with each
# torch requirement given (the oldest that is supported and the newest, unless said), and compares every operator with
# float64 there, with nothing on PATH. Usage: try_wheel.sh PYTHON [REQUIREMENT...]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
shift
[ $# -gt 0 ] || set -- "torch==2.11.*" torch
"$python" -m pip install --quiet uv
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
tried=0
for version in ${PYTHONS:-3.10 3.11 3.12 3.13 3.14 3.14t}; do
  for torch in "$@"; do
    if ! "$python" -m uv venv --quiet --clear --python "$version" "$environment"; then
      echo "Python $version: not available here"
      break
    fi
    "$python" -m uv pip install --quiet --python "$environment" "$torch" dist/*.whl
    (
      export PATH=
      cd "$environment"
      bin/python -W error -c 'import sys, torch, alexnet_cuda
info = alexnet_cuda.build_info()
print(sys.version.split()[0], info)
assert info["CPU kernels"].split()[0] in ("baseline", "avx2", "avx512"), info
assert info["CUDA kernels"] == ("loaded" if torch.version.cuda else "this torch is a CPU build"), info'
      bin/alexnet-cuda check --small
    )
    tried=$((tried + 1))
  done
done
echo "$tried environments passed"
test "$tried" -gt 0
