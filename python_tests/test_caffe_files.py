"""Caffe's files of every age, phases, fillers, and what is said about files that do not fit."""

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from caffe_helpers import input_layer, layer
from google.protobuf import text_format
from helpers import assert_same_bits

from alexnet_cuda import caffe
from alexnet_cuda.formats.caffe import schema

TODAY = """
name: "Small"
input: "data"
input_shape { dim: 1 dim: 3 dim: 12 dim: 12 }
layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1"
  convolution_param { num_output: 4 kernel_size: 3 pad: 1 stride: 2 group: 1 } }
layer { name: "relu1" type: "ReLU" bottom: "conv1" top: "conv1" }
layer { name: "pool1" type: "Pooling" bottom: "conv1" top: "pool1"
  pooling_param { pool: AVE kernel_size: 3 stride: 2 } }
layer { name: "norm1" type: "LRN" bottom: "pool1" top: "norm1" lrn_param { local_size: 3 alpha: 0.5 beta: 0.5 } }
layer { name: "fc" type: "InnerProduct" bottom: "norm1" top: "fc" inner_product_param { num_output: 5 } }
layer { name: "drop" type: "Dropout" bottom: "fc" top: "fc" dropout_param { dropout_ratio: 0.3 } }
layer { name: "prob" type: "Softmax" bottom: "fc" top: "prob" }
"""
V1 = """
name: "Small"
input: "data"
input_dim: 1 input_dim: 3 input_dim: 12 input_dim: 12
layers { name: "conv1" type: CONVOLUTION bottom: "data" top: "conv1" blobs_lr: 1 blobs_lr: 2 weight_decay: 1
  convolution_param { num_output: 4 kernel_size: 3 pad: 1 stride: 2 group: 1 } }
layers { name: "relu1" type: RELU bottom: "conv1" top: "conv1" }
layers { name: "pool1" type: POOLING bottom: "conv1" top: "pool1" pooling_param { pool: AVE kernel_size: 3 stride: 2 } }
layers { name: "norm1" type: LRN bottom: "pool1" top: "norm1" lrn_param { local_size: 3 alpha: 0.5 beta: 0.5 } }
layers { name: "fc" type: INNER_PRODUCT bottom: "norm1" top: "fc" inner_product_param { num_output: 5 } }
layers { name: "drop" type: DROPOUT bottom: "fc" top: "fc" dropout_param { dropout_ratio: 0.3 } }
layers { name: "prob" type: SOFTMAX bottom: "fc" top: "prob" }
"""
V0 = """
name: "Small"
input: "data"
input_dim: 1 input_dim: 3 input_dim: 12 input_dim: 12
layers { layer { name: "pad1" type: "padding" pad: 1 } bottom: "data" top: "pad1" }
layers { layer { name: "conv1" type: "conv" num_output: 4 kernelsize: 3 stride: 2 group: 1 blobs_lr: 1. blobs_lr: 2. }
  bottom: "pad1" top: "conv1" }
layers { layer { name: "relu1" type: "relu" } bottom: "conv1" top: "conv1" }
layers { layer { name: "pool1" type: "pool" pool: AVE kernelsize: 3 stride: 2 } bottom: "conv1" top: "pool1" }
layers { layer { name: "norm1" type: "lrn" local_size: 3 alpha: 0.5 beta: 0.5 } bottom: "pool1" top: "norm1" }
layers { layer { name: "fc" type: "innerproduct" num_output: 5 } bottom: "norm1" top: "fc" }
layers { layer { name: "drop" type: "dropout" dropout_ratio: 0.3 } bottom: "fc" top: "fc" }
layers { layer { name: "prob" type: "softmax" } bottom: "fc" top: "prob" }
"""
BLOBS = {"conv1": [(4, 3, 3, 3), (4,)], "fc": [(5, 36), (5,)]}
TEXTS = {"today": TODAY, "V1": V1, "V0": V0}


def put(blob, array, form="float", legacy=False):
    if legacy:
        sizes = (1,) * (4 - array.ndim) + array.shape
        blob.num, blob.channels, blob.height, blob.width = sizes
    else:
        blob.shape.dim.extend(array.shape)
    if form == "float":
        blob.data.extend(array.ravel().tolist())
    elif form == "double":
        blob.double_data.extend(array.ravel().tolist())
    else:
        blob.raw_data_type = {"raw double": 0, "raw": 1, "raw half": 2}[form]
        blob.raw_data = array.astype({"raw double": "<f8", "raw": "<f4", "raw half": "<f2"}[form]).tobytes()


def caffemodel(path, age="today", form="float", shapes=BLOBS):
    """Writes random weights, the same each time; all of them are exact in half."""
    rng, net = np.random.default_rng(0), schema.NetParameter(name="Small")
    for name, blobs in shapes.items():
        message = net.layer.add() if age == "today" else net.layers.add()
        message = message.layer if age == "V0" else message
        message.name = name
        for shape in blobs:
            array = rng.normal(size=shape).astype(np.float16).astype(np.float32)
            put(message.blobs.add(), array, form, legacy=age != "today")
    path.write_bytes(net.SerializeToString())
    return path


def scores(tmp_path, text, *file):
    (tmp_path / "net.prototxt").write_text(text)
    net = caffe.load(tmp_path / "net.prototxt", *file)
    with torch.no_grad():
        return net(torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("age", TEXTS)
def test_every_age_of_text_and_weights(age, tmp_path):
    expected = scores(tmp_path, TODAY, caffemodel(tmp_path / "today"))
    assert expected.shape == (2, 5)
    assert_same_bits(scores(tmp_path, TEXTS[age], caffemodel(tmp_path / "old", age)), expected)


@pytest.mark.parametrize("form", ["double", "raw", "raw double", "raw half"])
def test_every_form_of_blob(form, tmp_path):
    expected = scores(tmp_path, TODAY, caffemodel(tmp_path / "float"))
    assert_same_bits(scores(tmp_path, TODAY, caffemodel(tmp_path / "other", form=form)), expected)


def test_weights_as_text_and_hdf5_in_any_order(tmp_path):
    expected = scores(tmp_path, TODAY, caffemodel(tmp_path / "binary"))
    blobs = caffe.read_caffemodel(tmp_path / "binary")
    net = schema.NetParameter()
    for name in ("extra", *reversed(blobs)):
        message = net.layers.add(name=name)
        for blob in blobs.get(name, [np.ones(3, np.float32)]):
            put(message.blobs.add(), blob, legacy=True)
    (tmp_path / "text").write_text(text_format.MessageToString(net))
    assert_same_bits(scores(tmp_path, TODAY, tmp_path / "text"), expected)
    with h5py.File(tmp_path / "hdf5", "w") as file:
        for name in blobs:
            for i, blob in enumerate(blobs[name]):
                file[f"data/{name}/{i}"] = blob
    assert_same_bits(scores(tmp_path, TODAY, tmp_path / "hdf5"), expected)
    (tmp_path / "cut").write_bytes((tmp_path / "hdf5").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"cut is incomplete or no Caffe model: .*truncated"):
        scores(tmp_path, TODAY, tmp_path / "cut")


def test_bilinear_upsampling_needs_no_weights(tmp_path):
    up = "num_output: 5 group: 5 kernel_size: 4 stride: 2 pad: 1 bias_term: false weight_filler { type: 'bilinear' }"
    text = TODAY[: TODAY.index('layer { name: "relu1"')].replace("num_output: 4", "num_output: 5")
    text += layer("up", "Deconvolution", f"convolution_param {{ {up} }}", "conv1")
    shapes = {"conv1": [(5, 3, 3, 3), (5,)]}
    actual = scores(tmp_path, text, caffemodel(tmp_path / "weights", shapes=shapes))
    small = scores(tmp_path, text[: text.index('layer { name: "up"')], tmp_path / "weights")
    expected = F.interpolate(small, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(actual[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])  # the edges fade out in Caffe


def test_parts_of_the_file_that_caffe_reads_otherwise(tmp_path):
    """V0 data with its transformation, and a train_val file whose channels only the weights tell."""
    data = 'name: "data" type: "data" source: "db" batchsize: 3 cropsize: 12 scale: 0.5 mirror: true'
    head = f'name: "Small"\nlayers {{ layer {{ {data} }} top: "data" top: "label" }}'
    loss = 'layers { layer { name: "loss" type: "softmax_loss" } bottom: "fc" bottom: "label" top: "loss" }'
    text = head + V0[V0.index("\nlayers") : V0.rindex("\nlayers")] + loss
    expected = scores(tmp_path, TODAY.replace('layer { name: "prob"', "#"), caffemodel(tmp_path / "today"))
    assert_same_bits(scores(tmp_path, text, tmp_path / "today"), expected)
    net = caffe.load(tmp_path / "net.prototxt", tmp_path / "today")
    assert (net.inputs, net.input_shapes, net.outputs) == (["data"], [(3, 3, 12, 12)], ["fc"])
    with pytest.raises(ValueError, match=r"layer conv1 \(Convolution, line 4 of .*the shape of its input is not known"):
        caffe.load(tmp_path / "net.prototxt")


def test_phases_and_stages(tmp_path):
    path = tmp_path / "net.prototxt"
    data = 'layer { name: "data" type: "Data" top: "data" include { phase: %s } transform_param { %s } }\n'
    path.write_text(
        data % ("TRAIN", "crop_size: 8 force_color: true")
        + data % ("TEST", "crop_size: 6 force_gray: true")
        + layer("a", "Power", "include { phase: TRAIN } power_param { scale: 2 }", "data", "data")
        + layer("b", "Power", "exclude { phase: TRAIN } power_param { scale: 3 }", "data", "data")
        + layer("c", "Power", 'include { stage: "deploy" not_stage: "x" } power_param { scale: 5 }', "data", "data")
    )
    one = torch.ones(1, 1, 2, 2)
    for options, factor in (
        ({}, 3), ({"phase": "TRAIN"}, 2), ({"stages": ["deploy"]}, 15), ({"stages": ["deploy", "x"]}, 3),
    ):  # fmt: skip
        assert caffe.load(path, **options)(one).unique().item() == factor
    assert caffe.load(path).input_shapes == [(1, 1, 6, 6)]
    assert caffe.load(path, phase="TRAIN").input_shapes == [(1, 3, 8, 8)]
    with pytest.raises(ValueError, match="'TRAIN' or 'TEST', got 'test'"):
        caffe.load(path, phase="test")


def test_what_opencv_reads_otherwise(tmp_path):
    """LRN's k, which it ignores; pooling that rounds down; stochastic pooling; the unused k of WITHIN_CHANNEL; layers
    that it does not know."""
    path, x = tmp_path / "net.prototxt", torch.rand(2, 8, 9, 11)
    for parameters, expected in (
        ('"LRN" lrn_param { local_size: 3 alpha: 0.1 k: 2 }', F.local_response_norm(x, 3, 0.1, 0.75, 2)),
        ('"LRN" lrn_param { local_size: 3 alpha: 2 k: 5 norm_region: WITHIN_CHANNEL }',
         x / (1 + 2 * F.avg_pool2d(x * x, 3, 1, 1)) ** 0.75),
        ('"Pooling" pooling_param { kernel_size: 4 stride: 2 round_mode: FLOOR }', F.max_pool2d(x, 4, 2)),
        ('"Pooling" pooling_param { pool: STOCHASTIC kernel_size: 3 stride: 2 }',
         F.avg_pool2d(x * x, 3, 2) / F.avg_pool2d(x, 3, 2)),
        ('"Pooling" pooling_param { pool: STOCHASTIC global_pooling: true }',
         (x * x).sum((2, 3), keepdim=True) / x.sum((2, 3), keepdim=True)),
        ('"Threshold" threshold_param { threshold: 0.5 }', (x > 0.5).float()),
        ('"Log" log_param { base: 10 shift: 1 }', (x + 1).log10()),
        ('"Swish" swish_param { beta: 2 }', x * (2 * x).sigmoid()),
        ('"Tile" tile_param { axis: 2 tiles: 3 }', x.repeat(1, 1, 3, 1)),
        ('"Reduction" reduction_param { axis: 2 operation: MEAN coeff: 3 }', 3 * x.mean((2, 3))),
        ('"Reduction" reduction_param { axis: 1 operation: SUMSQ }', (x * x).sum((1, 2, 3))),
        ('"Reduction" reduction_param { axis: -1 operation: ASUM }', x.sum(3)),
        ('"ArgMax" argmax_param { axis: 1 }', x.argmax(1, keepdim=True).float()),
        ('"ArgMax" argmax_param { axis: 3 top_k: 2 out_max_val: true }', x.sort(3, descending=True)[0][..., :2]),
        ('"ArgMax" argmax_param { top_k: 3 }', x.flatten(1).argsort(1, descending=True)[:, None, :3, None].float()),
    ):  # fmt: skip
        path.write_text(input_layer(1, 8, 9, 11) + f'layer {{ name: "y" bottom: "data" top: "y" type: {parameters} }}')
        torch.testing.assert_close(caffe.load(path)(x), expected, rtol=1e-5, atol=1e-6)
    path.write_text(input_layer(1, 1, 4, 4) + layer("p", "Pooling", "pooling_param { kernel_size: 1 stride: 2 }"))
    pooled = caffe.load(path)(x[:, :1, :4, :4])
    assert pooled.shape == (2, 1, 3, 3)  # the last window of Caffe is beyond the edge and empty
    torch.testing.assert_close(pooled[..., :2, :2], x[:, :1, :4:2, :4:2])
    assert pooled[..., 2].max() == -torch.finfo(torch.float32).max


def test_fillers_shared_parameters_and_batch_statistics(tmp_path):
    path = tmp_path / "net.prototxt"
    filler = (
        'convolution_param { num_output: 6 kernel_size: 4 weight_filler { type: "%s" %s } bias_filler { value: 0.1 } } '
    )
    path.write_text(
        input_layer(1, 6, 9, 9)
        + layer("xavier", "Convolution", filler % ("xavier", ""))
        + layer("gaussian", "Convolution", filler % ("gaussian", "std: 0.01"))
        + layer("msra", "Convolution", filler % ("msra", "variance_norm: AVERAGE"))
        + layer("bilinear", "Deconvolution", "convolution_param { num_output: 6 kernel_size: 4 stride: 2 group: 6 "
                "bias_term: false weight_filler { type: 'bilinear' } }")
        + layer("first", "Convolution", 'param { name: "w" } param { name: "b" } ' + filler % ("xavier", ""))
        + layer("second", "Convolution", 'param { name: "w" } param { name: "b" } ' + filler % ("xavier", ""))
        + layer("scale", "Scale", "scale_param { bias_term: true }")
        + layer("norm", "BatchNorm", "batch_norm_param { use_global_stats: false }")
    )  # fmt: skip
    net = caffe.load(path)
    assert abs(net.xavier.weight.abs().max().item() - (3 / 96) ** 0.5) < 0.01
    assert abs(net.gaussian.weight.std().item() - 0.01) < 0.002
    assert abs(net.msra.weight.std().item() - (2 / 96) ** 0.5) < 0.02
    assert net.xavier.bias.unique().item() == pytest.approx(0.1)
    assert net.first.weight is net.second.weight
    assert net.first.bias is net.second.bias
    assert (net.scale.weight == 1).all()
    assert (net.scale.bias == 0).all()
    y = net(torch.ones(2, 6, 9, 9))
    plain = F.conv_transpose2d(torch.ones(2, 6, 9, 9), net.bilinear.weight, stride=2, groups=6)
    torch.testing.assert_close(y["bilinear"], plain)
    torch.testing.assert_close(plain[0, 0, 2:-2, 2:-2], torch.ones(16, 16))  # bilinear: constants stay constants
    z = torch.randn(4, 6, 9, 9)
    torch.testing.assert_close(net(z)["norm"], F.batch_norm(z, None, None, training=True))


@pytest.mark.filterwarnings("ignore:.*has no field named")
def test_unknown_and_unfit_layers_are_sentences_with_their_line(tmp_path):
    path = tmp_path / "net.prototxt"
    for text, message in (
        (layer("roi", "ROIPooling", "roi_pooling_param { pooled_w: 6 }"),
         r"layer roi \(ROIPooling, line 2 of .*not known"),
        ("\n" + layer("c", "Convolution", "convolution_param { num_output: 4 }"),
         r"layer c \(Convolution, line 3 of .*kernel_size must be .*nothing"),
        (layer("c", "Convolution", "convolution_param { num_output: 4 kernel_size: 1 group: 3 }"),
         r"layer c .*divisible"),
        (layer("c", "Convolution", "convolution_param { num_output: 4 kernel_h: 3 }"),
         r"layer c .*kernel_size must be .*\[3, 0\]"),
        (layer("s", "Eltwise", "", "data gone"), r"layer s .*no layer before it makes its bottom gone"),
        (layer("p", "Pooling", "pooling_param { kernel_size: 3 pad: 3 }"),
         r"layer p .*padding \(3, 3\) must be smaller"),
        (layer("p", "Pooling", "pooling_param { kernel_size: 3 }", "data", "p mask"), r"layer p .*expected one top"),
        (layer("l", "LRN", "lrn_param { local_size: 4 }"), r"layer l .*local_size to be odd, got 4"),
        (layer("s", "Slice", "", "data", "a b c"), r"layer s .*cannot be cut into 3"),
        (layer("r", "Reshape", "reshape_param { shape { dim: 5 } }"), r"layer r .*shape"),
        (layer("f", "Convolution", "convolution_param { num_output: 4 kernel_size: 1 weight_filler { type: 'z' } }"),
         r"layer f .*unknown filler 'z'"),
        (layer("c", "Convolution", "convolution_param { kernel_size: 1 }"), r"layer c .*num_output positive"),
        (layer("i", "InnerProduct"), r"layer i .*num_output must be positive"),
        (layer("c", "Crop"), r"layer c .*does not take 1 bottoms and 1 tops"),
        (layer("r", "ReLU", "", "data data"), r"layer r .*does not take 2 bottoms and 1 tops"),
        (layer("g", "Pooling", "pooling_param { global_pooling: true }") + layer("s", "Eltwise", "", "data g"),
         r"layer s \(Eltwise, line 3 of .*bottoms of one shape, got \(1, 8, 6, 6\) and \(1, 8, 1, 1\)"),
        (layer("p", "Pooling", "pooling_param { pool: AVG }"), r'line 2: Enum type "PoolMethod" has no value.* AVG'),
        ("layers { name: 'x' type: RELU bottom: 'data' top: 'x' }", r"has both `layer` and `layers`"),
        ("layer { name: 'x' type: ReLU }", r"net.prototxt, line 2: Expected string but found: 'ReLU'$"),
        ("layer { name: 'x'\n\n bottom: }", r"net.prototxt, line 4: .*"),
    ):  # fmt: skip
        path.write_text(input_layer(1, 8, 6, 6) + text)
        with pytest.raises(ValueError, match=message) as error:
            caffe.load(path)
        assert "\n" not in str(error.value)
    path.write_text(input_layer(1, 3, 4, 4) + layer("acc", "Accuracy", "", "data data"))
    with pytest.raises(ValueError, match="no layers that compute anything in this phase"):
        caffe.load(path)
    path.write_text("test: 'x'")
    with pytest.raises(ValueError, match="has no layers"):
        caffe.load(path)


def test_comments_in_any_encoding(tmp_path):
    path = tmp_path / "net.prototxt"
    path.write_bytes(b"\xef\xbb\xbf# \xb4\xf3\r\n" + TODAY.replace("\n", "\r\n").encode())
    assert caffe.load(path).outputs == ["prob"]


def test_a_misspelt_field_is_told(tmp_path):
    path = tmp_path / "net.prototxt"
    path.write_text(input_layer(1, 8, 6, 6) + layer("p", "Pooling", "pooling_param { kernel_size: 3\n padd: 1 }"))
    with pytest.warns(UserWarning, match=r'line 3: .*PoolingParameter" has no field named "padd"') as warned:
        net = caffe.load(path)
    assert warned[0].filename == __file__
    assert net(torch.zeros(1, 8, 6, 6)).shape == (1, 8, 4, 4)


def test_weights_that_do_not_fit_are_sentences(tmp_path):
    path, weights = tmp_path / "net.prototxt", tmp_path / "net.caffemodel"
    path.write_text(TODAY)
    caffemodel(weights, shapes={"conv1": BLOBS["conv1"], "fc8_flickr": BLOBS["fc"]})
    with pytest.raises(ValueError, match=r"net.caffemodel has no weights for fc; .* does not have: fc8_flickr"):
        caffe.load(path, weights)
    caffemodel(weights, shapes={**BLOBS, "fc": [(6, 36), (6,)]})
    with pytest.raises(ValueError, match=r"layer fc \(InnerProduct, line 11 of .*weight to be \(5, 36\), .* \(6, 36\)"):
        caffe.load(path, weights)
    caffemodel(weights, shapes={**BLOBS, "fc": [(5, 36)]})
    with pytest.raises(ValueError, match=r"layer fc .*expected 2 blobs \(weight, bias\), the weights file has 1"):
        caffe.load(path, weights)
    weights.write_text(TODAY)
    with pytest.raises(ValueError, match=r"it is text without numbers"):
        caffe.load(path, weights)
    whole = caffemodel(weights).read_bytes()
    for content in (b"", whole[:-3], whole[: len(whole) // 2], TODAY.encode(), b"version https://git-lfs"):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=r"net.caffemodel is incomplete or no Caffe model"):
            caffe.load(path, weights)
    net = schema.NetParameter()
    put(net.layer.add(name="conv1").blobs.add(), np.ones((4, 3), np.float32))
    net.layer[0].blobs[0].data.pop()
    weights.write_bytes(net.SerializeToString())
    with pytest.raises(ValueError, match=r"layer conv1: 11 numbers for a blob of the shape \(4, 3\)"):
        caffe.load(path, weights)
    with pytest.raises(ValueError, match=r"net.caffemodel is not text; expected a .prototxt"):
        caffe.load(caffemodel(weights), path)
    with pytest.raises(FileNotFoundError, match="gone"):
        caffe.load(path, tmp_path / "gone")


def test_a_scale_from_the_network_with_a_bias_of_its_own(tmp_path):
    path, weights = tmp_path / "net.prototxt", tmp_path / "net.caffemodel"
    scale = layer("s", "Scale", "scale_param { bias_term: true filler { value: 2 } }", "data factor")
    path.write_text(input_layer(1, 4, 5, 5) + input_layer(4, name="factor") + scale)
    x, factor = torch.randn(2, 4, 5, 5), torch.randn(4)
    bias = caffe.read_caffemodel(caffemodel(weights, shapes={"s": [(4,)]}))["s"][0]
    expected = (x * factor[:, None, None]).add(torch.from_numpy(bias)[:, None, None])
    torch.testing.assert_close(caffe.load(path, weights)(x, factor), expected)
    torch.testing.assert_close(caffe.load(path)(x, factor), x * factor[:, None, None])
