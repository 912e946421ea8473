"""The CUDA operators as a whole on the CPU: public functions, autograd, host code (csrc/cuda/register.cpp) and kernels.

These are the operators' own tests in another process, where the emulated operators stand in for the CPU's. In float16
alone: the dry run of the GPU check (test_gpu_check.py) does the same with float32, TF32 and bfloat16.
"""

import os
import subprocess
import sys
from pathlib import Path

import test_emulator  # noqa: F401  # skips this file where the emulator is not built

FILES = ("conv2d", "local_response_norm", "max_pool2d", "relu_lrn_max_pool2d", "conv2d_relu_lrn_max_pool2d",
         "host_checks")  # fmt: skip
LEFT_OUT = ("float32-", "bfloat16-", "float64-", "opcheck", "compile", "vmap", "gradients", "alexnets_sizes",
            "special_values", "reference", "cuda")  # fmt: skip


def test_operators():
    files = [Path(__file__).with_name(f"test_{name}.py") for name in FILES]
    options = ["--tb=short", "-p", "no:cacheprovider", "-k", f"not ({' or '.join(LEFT_OUT)})"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    environment = os.environ | {"ALEXNET_CUDA_EMULATED": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CPU kernels: CUDA kernels on the emulator" in done.stdout
