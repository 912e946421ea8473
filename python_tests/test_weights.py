"""Weights from others: nothing in their files is executed, what does not fit is one sentence; and training that starts
from them: what is taken over and what stays fixed."""

import ast
import io
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from training_helpers import checkpoint, cli, no_report  # noqa: F401

import alexnet_cuda
from alexnet_cuda import AlexNet, weights
from alexnet_cuda.errors import DataError, RecipeError
from alexnet_cuda.networks import build
from alexnet_cuda.recipe import Recipe
from alexnet_cuda.training.classifier import Classifier, parameter_groups
from alexnet_cuda.training.whitening import whiten
from alexnet_cuda.weights import start_from

PACKAGE = Path(alexnet_cuda.__file__).parent
TINY = ["digits", "--limit", "40", "--batch-size", "16", "--max-steps", "2", "--accelerator", "cpu"]


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


def recipe(**values):
    return Recipe().replace({"variant": "cifar", **values})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "trained"
    cli("train", *TINY, "--output", folder)
    return folder


# What people's checkpoints look like: names of the tensors, and what is around them.
WRAPPED = {
    "state_dict": lambda own: own,
    "parallel": lambda own: {"epoch": 3, "state_dict": {f"module.{name}": t for name, t in own.items()}},
    "parallel features": lambda own: {"net": {name.replace("s.", "s.module.", 1): t for name, t in own.items()}},
    "compiled": lambda own: {"model": {f"_orig_mod.{name}": t for name, t in own.items()}, "optimizer": {}},
    "averaged": lambda own: {
        "model": {name: torch.zeros_like(t) for name, t in own.items()},
        "model_ema": {"n_averaged": torch.tensor(5), **{f"module.{name}": t for name, t in own.items()}},
    },
    "inner": lambda own: {"state_dict": {f"backbone.{name}": t for name, t in own.items()} | {"loss.w": torch.ones(2)}},
}


@pytest.mark.parametrize("kind", ["run", "weights", "checkpoint", *WRAPPED])
def test_everything_but_the_last_layer_is_taken_over(trained, tmp_path, kind):
    own = safetensors.torch.load_file(trained / "weights.safetensors")
    path = trained / {"weights": "weights.safetensors", "checkpoint": "checkpoints/last.ckpt"}.get(kind, "")
    if kind in WRAPPED:
        path = tmp_path / "a.pth"
        torch.save(WRAPPED[kind](own), path)
    values = recipe(weights=str(path), channels=1)
    model = build(values, 7)
    fresh = model.classifier[-1].weight.clone()
    start_from(model, values)
    state = model.state_dict()
    assert torch.equal(state.pop("classifier.3.weight"), fresh)
    assert state.pop("classifier.3.bias").shape == (7,)
    assert all(torch.equal(value, own[name]) for name, value in state.items())


def test_weights_that_do_not_fit_or_are_missing_are_named(trained, tmp_path):
    values = recipe(weights=str(trained), variant="torchvision")
    with pytest.raises(RecipeError, match=r"do not fit torchvision: nothing in them does\n.*\n +features\.0\.weight "):
        start_from(build(values, 10), values)

    with pytest.raises(DataError, match="does not exist; weights must be"):
        start_from(build(recipe(), 10), recipe(weights=str(tmp_path / "none")))


def test_torchvision_weights_fit_the_variant_torchvision(monkeypatch):
    state = AlexNet("torchvision").state_dict()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **options: dict(state))
    values = recipe(variant="torchvision", weights="torchvision")
    model = build(values, 17)
    start_from(model, values)
    assert torch.equal(model.features[0].weight, state["features.0.weight"])
    with pytest.raises(RecipeError, match="got cifar"):
        start_from(build(recipe(), 17), recipe(weights="torchvision"))

    def offline(url, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(DataError, match=r"alexnet.*cannot be downloaded: no route"):
        start_from(model, values)


@pytest.mark.parametrize(("freeze", "moving"), [("features", 4), ("backbone", 2)])
def test_frozen_layers_and_their_statistics_stay_as_they_were(trained, tmp_path, freeze, moving):
    folder = tmp_path / "run"
    cli("train", *TINY, "--output", folder, "--weights", trained, "--freeze", freeze)
    before = safetensors.torch.load_file(trained / "weights.safetensors")
    after = safetensors.torch.load_file(folder / "weights.safetensors")
    changed = [name for name in after if not torch.equal(before[name], after[name])]
    assert len(changed) == moving
    assert all(name.startswith("classifier.") for name in changed)
    assert len(checkpoint(folder)["optimizer_states"][0]["state"]) == moving


def test_earlier_layers_take_smaller_steps():
    values = recipe(lr=0.1, layer_decay=0.5, weight_decay=0.01)
    model = build(values, 10)
    groups = parameter_groups(model, values)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert set(rate) == {id(p) for p in model.parameters()}
    assert rate[id(model.classifier[-1].weight)] == 0.1
    assert rate[id(model.features[0].weight)] == pytest.approx(0.1 * 0.5**6)
    assert rate[id(model.features[1].weight)] == rate[id(model.features[0].weight)]  # batch normalisation
    assert all(group["weight_decay"] == (0.01 if group["params"][0].dim() > 1 else 0) for group in groups)
    assert len(parameter_groups(model, recipe())) == 2


def test_biases_can_have_a_rate_of_their_own():
    values = recipe(lr=0.1, bias_lr=16, weight_decay=0.01)
    model = build(values, 10)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in parameter_groups(model, values)
             for p in group["params"]}  # fmt: skip
    for name, p in model.named_parameters():
        assert rates[id(p)] == ((1.6, 0) if name.endswith("bias") else (0.1, 0.01) if p.dim() > 1 else (0.1, 0))


def test_whitening_filters_make_patches_uncorrelated_and_come_in_pairs():
    torch.manual_seed(0)
    images = F.avg_pool2d(torch.randn(40, 3, 34, 34), 3, 1) * torch.tensor([1.0, 3.0, 0.2]).view(3, 1, 1)
    conv = torch.nn.Conv2d(3, 48, 3, padding=1, bias=False)
    before = conv.weight.detach().clone()
    whiten(conv, images)
    assert conv.weight.norm().item() == pytest.approx(before.norm().item(), rel=1e-5)
    assert conv.weight[24:].equal(-conv.weight[:24])
    y = F.conv2d(images, conv.weight[:8]).transpose(0, 1).flatten(1)
    covariance = y.cov() / y.cov()[0, 0]
    torch.testing.assert_close(covariance, torch.eye(8), atol=0.03, rtol=0)
    few = torch.nn.Conv2d(1, 64, 2)
    old = few.weight.detach().clone()
    whiten(few, images[:, :1])
    assert few.weight[8:].equal(old[8:])  # a patch of four pixels has four components


def test_mixed_images_have_mixed_targets():
    module = Classifier(recipe(mixup=0.2, cutmix=1.0), "0123456789")
    torch.manual_seed(0)
    x, target = module.mix(torch.rand(8, 3, 32, 32), torch.arange(8))
    assert x.shape == (8, 3, 32, 32)
    assert target.shape == (8, 10)
    torch.testing.assert_close(target.sum(1), torch.ones(8))
