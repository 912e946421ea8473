"""The types that an editor or mypy sees in a user's own script."""

import subprocess
import sys

SCRIPT = """
import torch
from alexnet_cuda import AlexNet, accelerate, build_info, list_variants, nn, ops

x = torch.rand(1, 3, 32, 32)
model = AlexNet("cifar", weights="cifar10")
reveal_type(model(x))
reveal_type(ops.max_pool2d(x))
reveal_type(ops.max_pool2d(x, return_indices=True))
reveal_type(ops.conv2d(x, x))
reveal_type(ops.local_response_norm(x, 5))
reveal_type(accelerate(model))
reveal_type(AlexNet.from_pretrained("runs/digits"))
reveal_type(list_variants())
reveal_type(build_info())
AlexNet(variant=3)
"""
TYPES = ["Tensor", "Tensor", "tuple[Tensor, Tensor]", "Tensor", "Tensor", "AlexNet", "AlexNet", "dict[str, str]",
         "dict[str, str]"]  # fmt: skip


def test_a_script_that_uses_the_package(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--config-file", "", "--cache-dir", tmp_path, "script.py"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    for short in ("torch._tensor.", "alexnet_cuda.model.", "builtins."):
        output = output.replace(short, "")
    revealed = [line.split('"')[1] for line in output.splitlines() if "Revealed type" in line]
    assert revealed == TYPES, output
    assert 'Argument "variant" to "AlexNet" has incompatible type "int"' in output
