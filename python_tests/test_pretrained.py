"""The package's trained weights, and those that a user saves and shares: what comes back, and what is refused."""

import importlib
import json
import re
import sys

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from training_helpers import cli

from alexnet_cuda import AlexNet, pretrained
from alexnet_cuda.data import load_images
from alexnet_cuda.errors import AlexNetError, DataError, RecipeError
from alexnet_cuda.recipe import Recipe
from alexnet_cuda.training.evaluation import figures, predict
from alexnet_cuda.variants import VARIANTS
from alexnet_cuda.weights import load_weights, save_weights
from alexnet_cuda.words import percent


@pytest.mark.parametrize("name", pretrained.NAMES)
def test_the_weights_of_the_package(name):
    path = pretrained.FOLDER / f"{name}.safetensors"
    assert path.stat().st_size < 3e6
    card = path.with_suffix(".md").read_text()
    assert "test accuracy" in card
    assert re.search(r"of commit [0-9a-f]{7,}, torch", card)
    text = path.read_bytes()[:10000].decode("latin1")
    assert "/work" not in text
    assert "/tmp" not in text
    model = AlexNet("cifar", weights=name)
    assert model.num_classes == len(json.loads(model.metadata["classes"])) == 10
    assert model.features[0].weight.dtype == torch.float32


def test_the_digits_of_the_package_are_as_accurate_as_their_card_says():
    model, recipe, _ = load_weights("digits")
    accuracy = figures(predict(model, load_images(recipe), recipe))["test/accuracy"]
    assert f"{percent(accuracy)} after the weights" in (pretrained.FOLDER / "digits.md").read_text()


def test_without_a_run_the_weights_of_the_package_serve(tmp_path, monkeypatch):
    picture = tmp_path / "grey.png"
    pytest.importorskip("PIL.Image").new("RGB", (40, 30), "grey").save(picture)
    monkeypatch.chdir(tmp_path)
    output = cli("predict", picture)
    assert "no finished run in runs/: the package's weights cifar10 serve" in output
    answer = json.loads(cli("predict", picture, "--weights", "mnist", "--json"))
    assert answer[0]["top"][0]["class"] in "0123456789"
    assert "report draws into a run folder" in cli("report", "--run", "digits", code=1)
    assert "no finished run in runs/" in cli("report", code=1)
    cli("export", "--run", "digits", "--format", "safetensors")
    assert (tmp_path / "digits.safetensors").exists()


def test_a_network_comes_back_as_it_was_saved(tmp_path):
    torch.manual_seed(0)
    model = AlexNet("cifar", num_classes=3, in_channels=1).eval()
    model.save_pretrained(tmp_path / "mine", classes=["a", "b", "c"], mean=[0.4], std=[0.2])
    again = AlexNet.from_pretrained(tmp_path / "mine")
    x = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(model(x), again(x))
    again.save_pretrained(tmp_path / "copy")
    network, recipe, classes = load_weights(tmp_path / "copy")
    torch.testing.assert_close(model(x), network.eval()(x))
    assert (recipe.mean, recipe.std, recipe.channels, classes) == ((0.4,), (0.2,), 1, ["a", "b", "c"])
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == {"variant": "cifar", "classes": classes}


def test_pixel_networks_keep_their_scale(tmp_path):
    small = AlexNet("torchvision", 2, dropout=0)
    small.input_scale = 7.0
    small.save_pretrained(tmp_path)
    assert AlexNet.from_pretrained(tmp_path).input_scale == 7
    with pytest.raises(DataError, match="its metadata has no 'recipe'"):
        load_weights(tmp_path)


def test_another_number_of_classes_keeps_all_but_the_last_layer():
    first, second = AlexNet("cifar", weights="cifar10"), AlexNet("cifar", 4, weights="cifar10")
    assert torch.equal(first.features[0].weight, second.features[0].weight)
    assert second.classifier[-1].weight.shape[0] == 4
    assert second.metadata == {}


def test_weights_that_do_not_fit(tmp_path):
    with pytest.raises(DataError, match=r"nothing does not exist; .* cifar10, mnist, digits"):
        AlexNet("cifar", weights="nothing")
    with pytest.raises(RecipeError, match="cifar10 holds the network cifar, not owt"):
        AlexNet("owt", weights="cifar10")
    with pytest.raises(DataError, match="weights cifar10 take 3 channels, not 1"):
        AlexNet("cifar", in_channels=1, weights="cifar10")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match=r"bad.safetensors is not a file of tensors"):
        AlexNet("cifar", weights=tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match="expected 10 class names, got 2"):
        AlexNet("cifar", weights="cifar10").save_pretrained(tmp_path, ["a", "b"])
    with pytest.raises(ValueError, match="expected mean and std together"):
        AlexNet("cifar", weights="cifar10").save_pretrained(tmp_path, mean=[0.5])


def test_the_hub(tmp_path, monkeypatch):
    """What is uploaded is what comes back; the hub itself is replaced by a folder."""
    hub = tmp_path / "hub"

    def upload(self, repo_id, folder_path):
        pretrained.Path(folder_path).rename(hub)
        hub.with_name("again").mkdir()  # the temporary folder is removed at the end
        hub.with_name("again").rename(folder_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **options: f"https://hub/{name}")
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: hub / file)
    model = AlexNet("cifar", weights="digits")
    assert model.push_to_hub("me/digits") == "https://hub/me/digits"
    assert sorted(path.name for path in hub.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = AlexNet.from_pretrained("me/digits")
    assert torch.equal(model.features[0].weight, again.features[0].weight)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(AlexNetError, match=r"pip install 'alexnet_cuda\[hub\]'"):
        AlexNet.from_pretrained("me/digits")


def test_a_run_names_no_folder_of_its_machine(tmp_path):
    values = {"variant": "cifar", "data_path": "/home/me/data", "output": "/home/me/run", "weights": "/home/me/w.pt"}
    recipe = Recipe().replace(values)
    save_weights(tmp_path / "weights.safetensors", AlexNet("cifar", 2), recipe, ["a", "b"])
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        assert "/home" not in str(file.metadata())
    assert AlexNet.from_pretrained(tmp_path).num_classes == 2


def test_timm_makes_the_variants():
    timm = pytest.importorskip("timm")
    importlib.import_module("alexnet_cuda.timm_models")
    assert len(timm.list_models("alexnet_cuda_*")) == len(VARIANTS)
    model = timm.create_model("alexnet_cuda_cifar", pretrained=True).eval()
    assert model.metadata["variant"] == "cifar"
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 32, 32)
    assert timm.create_model("alexnet_cuda_cifar", num_classes=4, in_chans=1)(torch.rand(2, 1, 32, 32)).shape == (2, 4)
    with pytest.raises(ValueError, match="alexnet_cuda_paper: no weights come with"):
        timm.create_model("alexnet_cuda_paper", pretrained=True)
