"""Weights in other people's files: Keras's, TensorFlow-Slim's, checkpoints with more than tensors; files of something
else; layers that look untrained. `keras_files` were written by Keras 3.15, narrow networks with random weights."""

import argparse
import json
import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from alexnet_cuda import AlexNet
from alexnet_cuda.errors import DataError, RecipeError
from alexnet_cuda.formats.tensors import as_state, read_content
from alexnet_cuda.matching import compare, fill, untrained
from alexnet_cuda.recipe import Recipe
from alexnet_cuda.training.classifier import Classifier
from alexnet_cuda.variants import VARIANTS, Conv, Linear
from alexnet_cuda.weights import start_from

FILES = Path(__file__).parent / "keras_files"


def narrow(name, times=32):
    """A variant with a small part of its filters, and 16 hidden units."""
    variant = VARIANTS[name]
    features = [replace(v, filters=v.filters // times) if isinstance(v, Conv) else v for v in variant.features]
    classifier = [replace(v, units=16) if isinstance(v, Linear) and v.units else v for v in variant.classifier]
    return replace(variant, features=tuple(features), classifier=tuple(classifier))


@pytest.mark.parametrize("kind", ["whole", "weights alone"])
@pytest.mark.parametrize("name", ["keras_mnist.h5", "flowers_bn.keras"])
def test_keras_networks_compute_what_they_compute_in_keras(name, kind, tmp_path):
    import h5py

    path = FILES / name
    if kind == "weights alone" and path.suffix == ".keras":
        path = tmp_path / "a.weights.h5"
        path.write_bytes(zipfile.ZipFile(FILES / name).read("model.weights.h5"))
    elif kind == "weights alone":
        path = tmp_path / "legacy.h5"
        with h5py.File(FILES / name) as whole, h5py.File(path, "w") as file:
            for layer in whole["model_weights"]:
                whole.copy(f"model_weights/{layer}", file)
            file.attrs["layer_names"] = whole["model_weights"].attrs["layer_names"]
    stem = Path(name).stem
    model = AlexNet(narrow(stem)).eval()
    fit = fill(model, compare(model, as_state(read_content(path)[0], model)))
    assert fit.misfits == []
    x = torch.from_numpy(np.random.default_rng(7).standard_normal((1, 224, 224, 3), np.float32)).permute(0, 3, 1, 2)
    expected = torch.tensor(json.loads((FILES / "outputs.json").read_text())[stem])
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_slim_arrays_compute_what_their_convolutions_compute(tmp_path):
    variant = narrow("tf_slim")
    rng, arrays, channels = np.random.default_rng(0), {}, 3
    geometry = [(11, 4, 0), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1), (5, 1, 0), (1, 1, 0), (1, 1, 0)]
    filters = [v.filters for v in variant.features if isinstance(v, Conv)] + [16, 16, 9]
    y = torch.randn(2, 3, 224, 224)
    x = y
    names = [*(f"conv{i}" for i in range(1, 6)), "fc6", "fc7", "fc8"]
    for name, (size, stride, padding), count in zip(names, geometry, filters):
        kernel = (rng.standard_normal((size, size, channels, count)) / (size * channels**0.5)).astype("f4")
        bias = rng.random(count).astype("f4")
        arrays |= {f"alexnet_v2/{name}/weights": kernel, f"alexnet_v2/{name}/biases": bias,
                   f"alexnet_v2/{name}/weights/Momentum": kernel}  # fmt: skip
        y = F.conv2d(y, torch.from_numpy(kernel).permute(3, 2, 0, 1), torch.from_numpy(bias), stride, padding)
        y = y if name == "fc8" else y.relu()
        y = F.max_pool2d(y, 3, 2) if name in ("conv1", "conv2", "conv5") else y
        channels = count
    path = tmp_path / "slim.npz"
    np.savez(path, global_step=7, **arrays)
    model = AlexNet(variant, 9).eval()
    fit = fill(model, compare(model, as_state(read_content(path)[0], model)))
    assert fit.misfits == []
    with torch.no_grad():
        torch.testing.assert_close(model(x), y.flatten(1), rtol=0, atol=1e-5 * y.abs().max().item())


class Settings:
    """Of a training, beside its tensors."""


def test_tensors_beside_objects_are_read_and_the_objects_are_not_made(tmp_path):
    state = AlexNet("cifar").state_dict()
    path = tmp_path / "a.pth"
    beside = {"args": argparse.Namespace(lr=1), "best": np.float64(0.5), "settings": Settings(), "where": tmp_path}
    torch.save({"state_dict": {f"net.backbone.module.{name}": t.half() for name, t in state.items()}, **beside}, path)
    model = AlexNet("cifar")
    content, _ = read_content(path)
    fit = fill(model, compare(model, as_state(content, model)))
    assert fit.misfits == []
    torch.testing.assert_close(model.classifier[0].weight.data, state["classifier.0.weight"].half().float())


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state, other: {
            "a": {"checkpoint": {"model": {"state_dict": state}}},
            "optimizer": {"state": {0: other}},
        },
        lambda state, other: {"model": other, "ema": None, "ema_model": {"module": state, "decay": 0.9}},
        lambda state, other: {"net": other, "swa_state_dict": state},
        lambda state, other: (state, {"epoch": 3, "scores": [1.0]}),
    ],
)
def test_tensors_are_found_however_deep_they_lie(wrapped, tmp_path):
    state = {"fc.weight": torch.ones(2)}
    torch.save(wrapped(state, {"fc.weight": torch.zeros(2)}), tmp_path / "a.pt")
    content, _ = read_content(tmp_path / "a.pt")
    assert {name: tensor.tolist() for name, tensor in content.items()} == {"fc.weight": [1, 1]}


def test_a_file_with_several_networks_is_not_guessed_at(tmp_path):
    state = {"fc.weight": torch.ones(2)}
    torch.save({"first": state, "second": state}, tmp_path / "a.pt")
    with pytest.raises(DataError, match=r"several sets of tensors \(first, second\)"):
        read_content(tmp_path / "a.pt")


def test_two_networks_under_prefixes_are_not_guessed_at_but_an_average_is(tmp_path):
    model, source = AlexNet("cifar", num_classes=3), AlexNet("cifar", num_classes=3).state_dict()
    other = {name: torch.zeros_like(tensor) for name, tensor in source.items()}
    named = lambda word, state: {f"{word}.{name}": tensor for name, tensor in state.items()}
    with pytest.raises(DataError, match=r"holds several networks \(student\., teacher\.\); save one of them alone"):
        compare(model, named("student", other) | named("teacher", source))
    fit = compare(model, named("model", other) | named("model_ema", source))
    assert all(torch.equal(fit.loaded[name], tensor) for name, tensor in source.items())
    assert f"passed over: {len(source)} tensors beside the network, as model.features.0.weight" in str(fit)


def test_shards_are_read_together(tmp_path):
    state = AlexNet("cifar", num_classes=3).state_dict()
    shards = {f"part-{i}.safetensors": dict(list(state.items())[i::2]) for i in (0, 1)}
    for name, part in shards.items():
        save_file({key: tensor.contiguous() for key, tensor in part.items()}, tmp_path / name)
    index = {"weight_map": {key: name for name, part in shards.items() for key in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for source in (tmp_path, tmp_path / "model.safetensors.index.json"):
        assert read_content(source)[0].keys() == state.keys()
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(DataError, match=r"part-1\.safetensors does not exist"):
        read_content(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_beside_tensors_in_either_format(zipped, tmp_path):
    kept = {"state_dict": {"fc.weight": torch.ones(2)}, "args": argparse.Namespace(lr=1), "mine": Settings()}
    torch.save(kept, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert list(read_content(tmp_path / "a.pt")[0]) == ["fc.weight"]


class Command:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_pickle_is_ever_executed(zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {"fc.weight": torch.ones(2)}, "mine": Command()}
    torch.save(content, "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataError, match=r"can run any code .*system"):
        read_content(tmp_path / "a.pt")
    assert not (tmp_path / "executed").exists()


def test_values_of_every_kind(tmp_path):
    state = AlexNet("cifar", 2).state_dict()
    kinds = {"features.0.weight": torch.Tensor.to_sparse, "classifier.0.bias": lambda t: t.to(torch.float8_e4m3fn)}
    state = {name: kinds.get(name, lambda t: t)(tensor) for name, tensor in state.items()}
    state["classifier.0.weight"] = (100 * state["classifier.0.weight"]).to(torch.int8)
    state["features.5.weight"] = state["features.5.weight"].to(torch.complex64)
    torch.save(state, tmp_path / "a.pt")
    model = AlexNet("cifar", 2)
    fit = compare(model, as_state(read_content(tmp_path / "a.pt")[0], model))
    reasons = {misfit.name: misfit.reason for misfit in fit.misfits}
    assert reasons == {"classifier.0.weight": "integers, not weights", "features.5.weight": "complex numbers"}
    fill(model, fit)


def test_caffe_s_hdf5_goes_to_caffe_s_reader(tmp_path):
    with h5py.File(tmp_path / "a.caffemodel.h5", "w") as file:
        file["data/conv1/0"], file["data/conv1/1"] = np.zeros((8, 3, 11, 11)), np.zeros(8)
    with pytest.raises(DataError, match="no weight and bias for conv2; layers found: conv1"):
        read_content(tmp_path / "a.caffemodel.h5")


def npy(path):
    np.save(path, np.array({"conv1": [1]}, dtype=object), allow_pickle=True)


def script(path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)


OTHERS = {
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "page": (lambda path: path.write_text("\n<!DOCTYPE html><html>"), "it is a web page"),
    "lfs": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "module": (
        lambda path: torch.save(torch.nn.Linear(2, 2), path),
        r"torch\.nn\.modules.*save the module's state_dict",
    ),
    "inside": (lambda path: torch.save({"model": torch.nn.Linear(2, 2)}, path), "save the module's state_dict"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(Settings())), "it holds pickled objects"),
    "npy": (npy, "[Oo]bject arrays cannot be loaded"),
    "text": (lambda path: path.write_text("hello"), "it begins with b'hello', as no known file of weights does"),
    "cut": (
        lambda path: (torch.save({"a": torch.ones(99)}, path), path.write_bytes(path.read_bytes()[:500])),
        "it is cut",
    ),
    "zip": (lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "x"), "a zip archive without weights"),
    "zeros": (lambda path: path.write_bytes(bytes(4096)), "it begins with"),
    "program": (
        lambda path: zipfile.ZipFile(path, "w").writestr("net/archive_format", "pt2"),
        "a program of torch.export; save",
    ),
    "script": (script, "a program of TorchScript"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_file_of_tensors_is_named(kind, tmp_path):
    write, message = OTHERS[kind]
    path = tmp_path / ("a.npy" if kind == "npy" else "a.pth")
    write(path)
    with pytest.raises(DataError, match=rf"is not a file of tensors: .*{message}") as error:
        read_content(path)
    assert "\n" not in str(error.value)


def test_a_safetensors_header_of_any_length_is_read(tmp_path):
    path = tmp_path / "w.safetensors"
    for more in range(400):  # the length is the file's first bytes, here 0x3C20: a blank and <, as of a web page
        save_file({"x": torch.zeros(1)}, path, {"note": "a" * (15_100 + more)})
        if path.read_bytes()[:2] == b"\x20\x3c":
            break
    else:
        pytest.fail("no header of this length")
    assert list(read_content(path)[0]) == ["x"]


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.pt")
    with pytest.raises(DataError, match=r"a\.pt is not a file"):
        read_content(tmp_path / "a.pt")


def test_tensorflow_s_own_files_are_named(tmp_path):
    (tmp_path / "model.ckpt.index").touch()
    with pytest.raises(DataError, match=r"is a checkpoint of TensorFlow: .*numpy\.savez"):
        read_content(tmp_path / "model.ckpt")
    (tmp_path / "saved_model.pb").touch()
    with pytest.raises(DataError, match=r"is a SavedModel of TensorFlow; save the model as \.keras"):
        read_content(tmp_path)


def recipe(**values):
    return Recipe().replace({"variant": "cifar", **values})


def test_what_fits_is_loaded_and_the_rest_is_a_table(tmp_path):
    state = AlexNet("cifar", in_channels=1).state_dict()
    del state["features.5.weight"]
    state |= {"extra.weight": torch.ones(2, 3), "classifier.0.bias": torch.full((256,), torch.nan)}
    torch.save(state, tmp_path / "a.pth")
    model = AlexNet("cifar")
    own = model.features[0].weight.clone()
    text = str(start_from(model, recipe(weights=str(tmp_path / "a.pth")), "0123456789"))
    assert torch.equal(model.features[0].weight, own)
    assert torch.equal(model.features[10].weight, state["features.10.weight"])
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "features.0.weight (48, 1, 3, 3) (48, 3, 3, 3) another shape" in lines
    assert "features.5.weight - (96, 48, 3, 3) not in the file" in lines
    assert "extra.weight (2, 3) - not in the network" in lines
    assert "classifier.0.bias (256,) (256,) NaN or infinite values" in lines
    assert "the last layer is new" in text
    with pytest.raises(RecipeError, match=r"--freeze would leave features\.0\.weight as it was drawn"):
        Classifier(recipe(weights=str(tmp_path / "a.pth"), freeze="features"), "0123456789")


def test_classes_that_match_by_name_keep_their_rows(tmp_path):
    state = AlexNet("cifar", 3).state_dict()
    torch.save({"state_dict": state, "class_to_idx": {"Cat": 0, "eel": 2, "dog": 1}}, tmp_path / "a.pth")
    model = AlexNet("cifar", 4)
    fresh = model.classifier[-1].weight.clone()
    fit = start_from(model, recipe(weights=str(tmp_path / "a.pth")), ["ant", "cat", "dog", "fox"])
    assert "keeps its rows for 2 of 4 classes; new are ant, fox" in str(fit)
    assert torch.equal(model.classifier[-1].weight[1:3], state["classifier.3.weight"][:2])
    assert torch.equal(model.classifier[-1].weight[::3], fresh[::3])
    assert torch.equal(model.classifier[-1].bias[1:3], state["classifier.3.bias"][:2])


@pytest.mark.parametrize("name", VARIANTS)
def test_fresh_weights_look_untrained_and_changed_ones_do_not(name):
    torch.manual_seed(0)
    model = AlexNet(narrow(name, 16))
    names = list(model.state_dict())
    layers = {name.rpartition(".")[0] for name in names}
    assert set(untrained(model, names)) == layers
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    assert untrained(model, names) == []


def test_a_network_is_loaded_with_its_variant_and_classes(tmp_path):
    torch.manual_seed(0)
    state = AlexNet("cifar", 3, 1).state_dict()
    torch.save(state, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match=r"features\.0, .*classifier\.3 look untrained"):
        model = AlexNet.load(tmp_path / "a.pth", dropout=0.1)
    with pytest.warns(UserWarning, match="look untrained"):
        other = AlexNet("cifar", weights=tmp_path / "a.pth")
    assert (model.variant.name, model.num_classes, model.in_channels, model.training) == ("cifar", 3, 1, False)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    with pytest.raises((DataError, RecipeError), match=r"do not fit owt:\n.*reason\n"):
        AlexNet("owt", weights=tmp_path / "a.pth")
    torch.save({"x.weight": torch.ones(3, 3)}, tmp_path / "b.pth")
    with pytest.raises(RecipeError, match=r"fit no variant whole.*\n.*reason\n"):
        AlexNet.load(tmp_path / "b.pth")
