"""Weights files from others: nothing in them is executed, and what does not fit is one sentence."""

import ast
import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from training_helpers import cli

import alexnet_cuda
from alexnet_cuda import weights
from alexnet_cuda.errors import DataError

PACKAGE = Path(alexnet_cuda.__file__).parent


class Evil:
    """Unpickling it leaves a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "model.ckpt"])
def test_nothing_in_a_file_is_executed(name, kind, tmp_path):
    marker, path = tmp_path / "executed", tmp_path / name
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Evil(marker)))
    else:
        torch.save({"state_dict": Evil(marker), "global_step": 0}, path)
    unpickle = pickle.load if kind == "pickle" else lambda file: torch.load(file, weights_only=False)
    unpickle(io.BytesIO(path.read_bytes()))
    marker.rmdir()  # the file is as dangerous as it should be
    assert "is not a weights file of a run" in cli("export", "--run", path, code=1)
    assert "is not a weights file of a run" in cli("predict", "x.png", "--run", path, code=1)
    with pytest.raises(DataError, match="is not a checkpoint"):
        weights.read_checkpoint(path)
    output = cli("train", "digits", "--weights", path, "--output", tmp_path / "run", code=1)
    assert "is not a file of tensors" in output
    assert not marker.exists()


def test_a_damaged_caffemodel_is_one_sentence(tmp_path):
    path = tmp_path / "net.caffemodel"
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(DataError, match=r"net\.caffemodel is not a file of tensors: .* incomplete or no Caffe model"):
        weights.read_tensors(path)


def test_the_package_unpickles_nothing():
    """Every torch.load has weights_only=True, np.load has no pickles, and no other library unpickles."""
    loads = 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name, values = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                where = f"{path}:{node.lineno}"
                assert not name.startswith(("pickle.load", "joblib.", "dill.", "cloudpickle.")), where
                if name in ("torch.load", "torch.hub.load_state_dict_from_url"):
                    loads += 1
                    assert values.get("weights_only") == "True", where
                if name in ("np.load", "numpy.load"):
                    assert values.get("allow_pickle") == "False", where
                if name in ("yaml.load", "torch.hub.load"):
                    raise AssertionError(where)
    assert loads >= 2
