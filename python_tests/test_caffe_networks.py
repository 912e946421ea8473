"""Caffe networks against OpenCV 4, which reads the same two files."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from caffe_helpers import input_layer, layer
from caffe_nets import draw_weights, names, opencv, random_images, table, text_of

from alexnet_cuda import caffe

pytest.importorskip("cv2")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def written(tmp_path):
    """Writes a network and random weights for it; its two files."""

    def write(text):
        prototxt, caffemodel = tmp_path / "net.prototxt", tmp_path / "net.caffemodel"
        prototxt.write_text(text)
        draw_weights(prototxt, caffemodel)
        return prototxt, caffemodel

    return write


@torch.no_grad()
def assert_agree(prototxt, caffemodel, images=1, scale=50.0):
    net, reference = caffe.load(prototxt, caffemodel), opencv(prototxt, caffemodel)
    x = scale / 50 * random_images(net.input_shapes[0][1:], images, seed=1)
    expected = dict(zip(net.outputs, reference(x.numpy(), net.outputs), strict=True))
    actual = net(x)
    for name, blob in ({net.outputs[0]: actual} if torch.is_tensor(actual) else actual).items():
        assert tuple(blob.shape) == expected[name].shape, name
        np.testing.assert_allclose(blob, expected[name], rtol=0, atol=1e-5 * np.abs(expected[name]).max(), err_msg=name)


def narrowed(text: str, divisor: int) -> str:
    """The network with a fraction of the channels and units; those of grouped transposed convolutions stay equal."""

    def smaller(found: re.Match) -> str:
        return f"{found[1]}: {max(4, int(found[2]) // divisor // 4 * 4)}"

    return re.sub(r"(num_output|(?<=32 stride: 16 )group): (\d+)", smaller, text)


@pytest.mark.parametrize("name", names())
def test_networks_of_the_era(name, written):
    files = written(narrowed(text_of(name), 8))
    assert_agree(*files)
    net = caffe.load(*files)
    of_type = {type_: name for name, (type_, _, _) in net.layers.items()}
    assert net.layer(of_type["Convolution"]).weight.dim() == 4


def test_the_document_shows_the_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "more" / "caffe-nets.json").read_text())["networks"]
    assert table(results) in (ROOT / "docs" / "caffe.md").read_text()
    for name, result in results.items():
        assert result["error"] <= 5e-6, name
        # The errors are of two images. Of 1,000 the largest may be three times that; most of it is OpenCV's.
        assert result["largest_difference"] <= 3 * (result["error"] + result["opencv_error"]), name
        assert result["same_first_class"] >= 1 - 1e-4, name  # 1 but for the pixels of an FCN


POOLS = [
    "kernel_size: 3 stride: 2", "kernel_size: 3 stride: 2 pad: 1", "kernel_size: 2 stride: 2 pad: 1",
    "kernel_h: 3 kernel_w: 2 stride_h: 2 stride_w: 1 pad_h: 1 pad_w: 0", "kernel_size: 5 stride: 3 pad: 2",
    "kernel_size: 3 stride: 1 pad: 2", "kernel_size: 4 stride: 2 pad: 3", "global_pooling: true",
]  # fmt: skip


@pytest.mark.parametrize("method", ["MAX", "AVE"])
@pytest.mark.parametrize("window", POOLS)
def test_pooling(method, window, written):
    for size in (12, 13), (10, 11), (7, 9):
        text = input_layer(1, 3, *size) + layer("pool", "Pooling", f"pooling_param {{ pool: {method} {window} }}")
        assert_agree(*written(text + layer("ip", "InnerProduct", "inner_product_param { num_output: 2 }", "pool")))


SHAPE = "num_output: 4 kernel_size: 3"
CASES = {
    "dilated": [("Convolution", f"convolution_param {{ {SHAPE} dilation: 2 pad: 2 group: 2 }}")],
    "oblong": [("Convolution", "convolution_param { num_output: 6 kernel_h: 3 kernel_w: 5 pad_h: 1 pad_w: 2 "
                               "stride_h: 2 stride_w: 1 bias_term: false }")],
    "two numbers": [("Convolution", f"convolution_param {{ {SHAPE} kernel_size: 1 stride: 2 stride: 1 }}")],
    "leaky": [("ReLU", "relu_param { negative_slope: 0.1 }")],
    "prelu": [("PReLU", "")],
    "prelu shared": [("PReLU", "prelu_param { channel_shared: true }")],
    "sigmoid": [("Sigmoid", "")],
    "tanh": [("TanH", "")],
    "elu": [("ELU", "elu_param { alpha: 0.7 }")],
    "absval": [("AbsVal", "")],
    "bnll": [("BNLL", "")],
    "power": [("AbsVal", ""), ("Power", "power_param { power: 1.5 scale: 0.5 shift: 2 }")],
    "exp": [("Exp", "exp_param { base: 2 scale: 0.5 shift: 1 }")],
    "across": [("LRN", "lrn_param { local_size: 3 alpha: 0.01 beta: 0.6 }")],
    "within": [("LRN", "lrn_param { local_size: 3 alpha: 0.5 beta: 0.75 norm_region: WITHIN_CHANNEL }")],
    "dropout": [("Dropout", "dropout_param { dropout_ratio: 0.7 }")],
    "inner product": [("InnerProduct", "inner_product_param { num_output: 5 bias_term: false }"),
                      ("InnerProduct", "inner_product_param { num_output: 3 }")],
    "batch norm": [("BatchNorm", "batch_norm_param { eps: 0.001 }"), ("Scale", "scale_param { bias_term: true }")],
    "scale": [("Scale", "")],
    "flatten": [("Flatten", "flatten_param { axis: 2 }")],
    "flatten some": [("Flatten", "flatten_param { axis: 1 end_axis: 2 }")],
    "reshape": [("Reshape", "reshape_param { shape { dim: 0 dim: 4 dim: -1 } }")],
    "reshape some": [("Reshape", "reshape_param { shape { dim: 2 dim: -1 } axis: 1 num_axes: 1 }")],
    "softmax": [("Softmax", "softmax_param { axis: 2 }")],
    "deconvolution": [("Deconvolution", f"convolution_param {{ {SHAPE} stride: 2 pad: 1 group: 2 }}")],
    "mvn": [("MVN", "mvn_param { eps: 1e-9 }")],
    "mvn across": [("MVN", "mvn_param { across_channels: true normalize_variance: false }")],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_layers(case, written):
    text, bottom = input_layer(1, 8, 9, 11), "data"
    for i, (type_, parameters) in enumerate(CASES[case]):
        text += layer(f"layer{i}", type_, parameters, bottom)
        bottom = f"layer{i}"
    assert_agree(*written(text), scale=2.0)


GRAPHS = {
    "in place behind a branch": (  # the second branch takes what ReLU has left in the blob
        layer("a", "Convolution", "convolution_param { num_output: 4 kernel_size: 1 }")
        + layer("b", "Convolution", "convolution_param { num_output: 4 kernel_size: 1 }", "a")
        + layer("relu", "ReLU", "", "a", "a")
        + layer("sum", "Eltwise", "eltwise_param { coeff: 1 coeff: -0.5 }", "a b")
    ),
    "slice, concat, maximum, product": (
        layer("slice", "Slice", "slice_param { slice_point: 2 slice_point: 5 }", "data", "x y z")
        + layer("halves", "Slice", "slice_param { axis: 2 }", "data", "top bottom")
        + layer("max", "Eltwise", "eltwise_param { operation: MAX }", "top bottom")
        + layer("cat", "Concat", "concat_param { axis: 1 }", "z x")
        + layer("half", "Slice", "slice_param { axis: 2 }", "cat", "p q")
        + layer("product", "Eltwise", "eltwise_param { operation: PROD }", "p q")
        + layer("join", "Concat", "concat_param { concat_dim: 1 }", "max product")
        + layer("middle", "AbsVal", "", "y")
    ),
    "a scale from the network": (
        layer("pool", "Pooling", "pooling_param { pool: AVE global_pooling: true }")
        + layer("flat", "Flatten", "", "pool")
        + layer("scaled", "Scale", "scale_param { axis: 0 }", "data flat")
    ),
    "split and crop": (
        layer("split", "Split", "", "data", "u v")
        + layer("pool", "Pooling", "pooling_param { kernel_size: 2 stride: 2 }", "u")
        + layer("crop", "Crop", "crop_param { axis: 2 offset: 1 offset: 2 }", "v pool")
        + layer("sum", "Eltwise", "", "crop pool")
    ),
}


@pytest.mark.parametrize("graph", GRAPHS)
def test_graphs(graph, written):
    assert_agree(*written(input_layer(1, 8, 10, 12) + GRAPHS[graph]))


def test_blobs_and_layers_have_caffes_names_and_train(tmp_path):
    path = tmp_path / "net.prototxt"
    path.write_text(
        input_layer(1, 3, 35, 35)
        + layer("conv.1/a", "Convolution", "convolution_param { num_output: 8 kernel_size: 11 stride: 4 }", "data", "a")
        + layer("relu", "ReLU", "", "a", "a")
        + layer("norm", "LRN", "lrn_param { alpha: 0.1 }", "a", "n")
        + layer("half", "Pooling", "pooling_param { kernel_size: 3 stride: 2 }", "n", "p")
        + layer("half", "Dropout", "", "p", "p")
        + layer("fc", "InnerProduct", "inner_product_param { num_output: 4 }", "p", "scores")
    )
    net = caffe.load(path)
    assert list(net.state_dict()) == ["conv_1/a.weight", "conv_1/a.bias", "fc.weight", "fc.bias"]
    assert isinstance(net.layer("half"), torch.nn.MaxPool2d)
    assert net.layers["fc"] == ("InnerProduct", ["p"], ["scores"])
    x = torch.randn(2, 3, 35, 35)
    blobs = net.blobs(x)
    assert {name: tuple(blob.shape[1:]) for name, blob in blobs.items()} == {
        "data": (3, 35, 35), "a": (8, 7, 7), "n": (8, 7, 7), "p": (8, 3, 3), "scores": (4,),
    }  # fmt: skip
    torch.testing.assert_close(net(x), blobs["scores"])
    assert blobs["a"].min() == 0
    net.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    with pytest.raises(ValueError, match=r"expected 1 inputs \(data\), got 2"):
        net(x, x)
