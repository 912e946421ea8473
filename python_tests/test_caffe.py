"""Caffe's weights: the .caffemodel reader against files written here, and the network against raw Caffe semantics."""

import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits
from network_helpers import narrow_network
from torch import nn

from alexnet_cuda import caffe
from alexnet_cuda.errors import DataError
from alexnet_cuda.formats.caffe import LAYERS, MEAN_BGR, load_caffe, read_caffemodel, state_dict_from_caffe
from alexnet_cuda.formats.tensors import read_content

CLASSES = 10


def varint(value):
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def field(number, payload):
    if isinstance(payload, int):
        return varint(number << 3) + varint(payload)
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def blob(array, legacy=False, packed=True, double=False):
    array = np.ascontiguousarray(array, np.float64 if double else np.float32)
    if legacy:
        sizes = (1,) * (4 - array.ndim) + array.shape
        shape = b"".join(field(i + 1, size) for i, size in enumerate(sizes))
    else:
        shape = field(7, field(1, b"".join(varint(size) for size in array.shape)))
    if packed:
        return shape + field(8 if double else 5, array.tobytes())
    return shape + b"".join(varint(5 << 3 | 5) + struct.pack("<f", value) for value in array.ravel())


def caffemodel(blobs, v1=False, **options):
    layer, name, weights = (2, 4, 6) if v1 else (100, 1, 7)
    messages = (
        field(name, key.encode()) + b"".join(field(weights, blob(b, legacy=v1, **options)) for b in value)
        for key, value in {"data": [], **blobs, "prob": []}.items()
    )
    return field(1, b"Net") + b"".join(field(layer, message) for message in messages)


SMALL = {"a": [np.arange(24.0).reshape(4, 1, 2, 3), np.arange(4.0)], "fc": [np.arange(6.0).reshape(2, 3) / 7]}


@pytest.fixture(scope="module")
def weights():
    """Random weights {layer: [weight, bias]} of a narrow network."""
    rng, blobs = np.random.default_rng(0), {}
    modules = [m for m in narrow_network("caffe", CLASSES).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for name, module in zip(LAYERS, modules, strict=True):
        scale = np.float32((2 / module.weight[0].numel()) ** 0.5)
        shape = tuple(module.weight.shape)
        blobs[name] = [scale * rng.standard_normal(shape, np.float32), rng.standard_normal(shape[0], np.float32) / 10]
    return blobs


def caffe_net(weights, x, pool_first):
    """The network as Caffe computes it, from BGR images, in plain torch."""
    w = {name: [torch.from_numpy(blob) for blob in blobs] for name, blobs in weights.items()}

    def tail(y):
        y = F.max_pool2d(y, 3, 2, ceil_mode=True) if pool_first else y
        y = F.local_response_norm(y, 5, 1e-4, 0.75, 1.0)
        return y if pool_first else F.max_pool2d(y, 3, 2, ceil_mode=True)

    y = tail(F.conv2d(x, *w["conv1"], stride=4).relu())
    y = tail(F.conv2d(y, *w["conv2"], padding=2, groups=2).relu())
    y = F.conv2d(y, *w["conv3"], padding=1).relu()
    y = F.conv2d(y, *w["conv4"], padding=1, groups=2).relu()
    y = F.max_pool2d(F.conv2d(y, *w["conv5"], padding=1, groups=2).relu(), 3, 2, ceil_mode=True)
    y = F.linear(y.flatten(1), *w["fc6"]).relu()
    return F.linear(F.linear(y, *w["fc7"]).relu(), *w["fc8"])


@pytest.mark.parametrize("variant", ["caffe", "caffenet"])
@torch.no_grad()
def test_network_on_rgb_equals_caffe_on_bgr(variant, weights, tmp_path):
    pixels = torch.randint(0, 256, (2, 3, 227, 227), generator=torch.Generator().manual_seed(0)).float()
    mean = torch.tensor(MEAN_BGR)[:, None, None]
    expected = caffe_net(weights, pixels - mean, pool_first=variant == "caffenet")

    path = tmp_path / "net.caffemodel"
    path.write_bytes(caffemodel(weights, v1=True))
    assert_same_bits(state_dict_from_caffe(path), state_dict_from_caffe(weights))
    renamed = {"fc8_flickr" if name == "fc8" else name: blobs for name, blobs in weights.items()}
    assert_same_bits(state_dict_from_caffe(renamed), state_dict_from_caffe(weights))
    model = load_caffe(narrow_network(variant, CLASSES, input="pixels"), path)
    rgb = pixels.flip(1) - mean.flip(0)
    torch.testing.assert_close(model(rgb), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())

    model.input_scale = narrow_network(variant, CLASSES).input_scale
    imagenet = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    normalised = model((pixels.flip(1) / 255 - imagenet[0]) / imagenet[1])
    assert (normalised - expected).std() < 0.05 * expected.std()


@pytest.mark.parametrize(
    "options", [{}, {"packed": False}, {"double": True}, {"v1": True}, {"v1": True, "packed": False}]
)
def test_reads_every_form_of_blob(options, tmp_path):
    path = tmp_path / "small.caffemodel"
    path.write_bytes(caffemodel(SMALL, **options))
    found = read_caffemodel(path)
    assert list(found) == ["data", "a", "fc", "prob"]
    for name, blobs in SMALL.items():
        for read, written in zip(found[name], blobs, strict=True):
            np.testing.assert_array_equal(read.reshape(written.shape), written.astype(read.dtype))
    if not options.get("v1"):
        assert found["a"][0].shape == (4, 1, 2, 3)


def test_a_damaged_file_is_a_sentence_with_its_path(tmp_path):
    path = tmp_path / "broken.caffemodel"
    whole = caffemodel(SMALL)
    inside_of_the_floats = whole.index(np.float32(2).tobytes())
    for content in (b"", b"\xff" * 40, b"<html></html>", whole[:inside_of_the_floats], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.caffemodel is incomplete or no Caffe model"):
            read_caffemodel(path)
        with pytest.raises(DataError, match=r"caffemodel is not a file of tensors: .* incomplete or no Caffe model"):
            read_content(path)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"broken\.caffemodel: no weight and bias for conv1; layers found: a, fc"):
        state_dict_from_caffe(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        read_caffemodel(tmp_path / "missing")


def test_wrong_shapes_are_sentences(weights):
    assert caffe.load_caffe is load_caffe
    with pytest.raises(ValueError, match=r"classifier.6.weight to be \(3, 64\) as in the model, got \(10, 64\)"):
        load_caffe(narrow_network("caffe", 3), weights)
    with pytest.raises(ValueError, match=r"conv2 has blobs of shapes \(3,\) and \(3,\)"):
        state_dict_from_caffe({**weights, "conv2": [np.ones(3), np.ones(3)]})
    with pytest.raises(ValueError, match="five convolutions"):
        load_caffe(torch.nn.Linear(2, 2), weights)
