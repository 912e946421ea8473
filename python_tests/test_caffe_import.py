"""import-caffe: a run folder whose predictions are those of OpenCV on the same two files and pictures."""

import json

import numpy as np
import onnx
import pytest
from caffe_helpers import input_layer, layer
from caffe_nets import draw_weights, opencv, text_of
from PIL import Image
from training_helpers import cli

from alexnet_cuda.demo import network
from alexnet_cuda.formats.caffe import schema
from alexnet_cuda.weights import load_weights

pytest.importorskip("cv2")
EDGE = 40
BODY = (
    layer("conv1", "Convolution", "convolution_param { num_output: 16 kernel_size: 5 stride: 2 }")
    + layer("relu1", "ReLU", "", "conv1", "conv1")
    + layer("norm1", "LRN", "lrn_param { local_size: 3 alpha: 0.01 }", "conv1")
    + layer("pool1", "Pooling", "pooling_param { kernel_size: 3 stride: 2 }", "norm1")
    + layer("fc8", "InnerProduct", "inner_product_param { num_output: 6 }", "pool1")
)
DEPLOY = 'name: "Tiny Net"\n' + input_layer(1, 3, EDGE, EDGE) + BODY + layer("prob", "Softmax", "", "fc8")
TRAIN_VAL = (
    'name: "Tiny Net"\nlayer { name: "data" type: "Data" top: "data" top: "label" include { phase: TEST } '
    f"transform_param {{ crop_size: {EDGE} scale: 0.5 mirror: true %s }} }}\n{BODY}"
    + layer("accuracy", "Accuracy", "", "fc8 label")
    + layer("loss", "SoftmaxWithLoss", "", "fc8 label")
)
MEAN = (104, 117, 123)
ATOL = 1e-5  # of probabilities, which are printed with six digits


@pytest.fixture
def files(tmp_path):
    prototxt, caffemodel = tmp_path / "deploy.prototxt", tmp_path / "net.caffemodel"
    prototxt.write_text(DEPLOY)
    draw_weights(prototxt, caffemodel)
    return prototxt, caffemodel


@pytest.fixture
def pictures(tmp_path):
    """Four pictures of the network's size, in two classes, and one that is resized and cropped."""
    rng, paths = np.random.default_rng(0), []
    for i in range(4):
        paths.append(tmp_path / "pictures" / "test" / "ab"[i % 2] / f"{i}.png")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (EDGE, EDGE, 3), np.uint8)).save(paths[-1])
    return paths


def expected(files, paths, mean=MEAN, scale=1.0):
    """OpenCV's probabilities (N, classes) for pictures of the network's size."""
    run, rows = opencv(*files), []
    mean = np.reshape(mean, (3, 1, 1)) if np.ndim(mean) == 1 else mean
    for path in paths:
        bgr = np.asarray(Image.open(path).convert("RGB"), np.float32)[..., ::-1].transpose(2, 0, 1)
        rows.append(run((scale * (bgr - mean))[None].astype(np.float32))[0])
    return np.concatenate(rows)


def predicted(run, paths):
    rows = json.loads(cli("predict", *paths, "--run", run, "--top", 6, "--json"))
    return np.array([[entry["probability"] for entry in sorted(row["top"], key=lambda e: e["class"])] for row in rows])


def with_centre(folder, edge):
    """A picture of this edge, and its centre of the network's size."""
    large, centre = folder / "large.png", folder / "centre.png"
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (edge, edge, 3), np.uint8)).save(large)
    start = (edge - EDGE) // 2
    Image.open(large).crop((start, start, start + EDGE, start + EDGE)).save(centre)
    return large, centre


def test_every_command_takes_the_run(files, pictures, tmp_path):
    run, names = tmp_path / "run", tmp_path / "classes.txt"
    names.write_text("a\nb\nc\nd\ne\nf\n")
    options = "--output", run, "--classes", names, "--mean", "104,117,123", "--json"
    facts = json.loads(cli("import-caffe", *files, *options))
    assert (facts["network"], facts["classes"], facts["input"]) == ("caffe/Tiny-Net", 6, [3, EDGE, EDGE])
    np.testing.assert_allclose(facts["mean"], np.divide(MEAN[::-1], 255))
    np.testing.assert_allclose(predicted(run, pictures), expected(files, pictures), atol=ATOL)

    model, recipe, classes = load_weights(run)
    assert classes == list("abcdef")
    assert set(model.state_dict()) == {f"net.{name}.{kind}" for name in ("conv1", "fc8") for kind in ("weight", "bias")}
    for name in "cdef":
        (tmp_path / "pictures" / "test" / name).mkdir()
        Image.open(pictures[0]).save(tmp_path / "pictures" / "test" / name / "x.png")
    (tmp_path / "pictures" / "test").rename(tmp_path / "pictures" / "val")
    (tmp_path / "pictures" / "train").symlink_to("val")
    figures = json.loads(cli("evaluate", "--run", run, "--data-path", tmp_path / "pictures", "--json"))
    moved = sorted((tmp_path / "pictures" / "val").rglob("*.png"))
    right = expected(files, moved).argmax(1) == ["abcdef".index(path.parent.name) for path in moved]
    assert figures["test/accuracy"] == pytest.approx(right.mean(), abs=1e-6)

    answer = network.predict(network.load(run), moved[0])
    assert max(answer.top.values()) == pytest.approx(expected(files, moved[:1]).max(), abs=1e-5)
    exported = json.loads(cli("export", "--run", run, "--output", tmp_path / "tiny.onnx", "--json"))
    assert exported["nodes"]["LRN"] == 1
    assert exported["difference"] < 1e-5
    about = {entry.key: entry.value for entry in onnx.load(tmp_path / "tiny.onnx").metadata_props}
    assert json.loads(about["preprocessing"])["short_side"] == EDGE
    cli("export", "--run", run, "--format", "torch")
    cli("export", "--run", run, "--format", "safetensors", "--output", tmp_path / "copy.safetensors")
    np.testing.assert_array_equal(predicted(tmp_path / "copy.safetensors", moved), predicted(run, moved))
    assert "exists" in cli("import-caffe", *files, "--output", run, code=1)
    options = "--variant", recipe.variant, "--output", tmp_path / "trained"
    assert "cannot be trained" in cli("train", "digits", *options, code=2)


def test_the_data_layer_becomes_the_preprocessing(files, tmp_path):
    prototxt, run = tmp_path / "train_val.prototxt", tmp_path / "run"
    prototxt.write_text(TRAIN_VAL % "mean_value: 104 mean_value: 117 mean_value: 123")
    cli("import-caffe", prototxt, files[1], "--output", run)
    recipe = load_weights(run)[1]
    assert (recipe.flip, recipe.input_size, recipe.std) == (True, EDGE, pytest.approx((2 / 255,)))
    large, centre = with_centre(tmp_path, recipe.test_short_side)
    np.testing.assert_allclose(predicted(run, [large]), expected(files, [centre], scale=0.5), atol=ATOL)


def test_a_mean_image(files, pictures, tmp_path):
    image = np.random.default_rng(1).uniform(0, 255, (3, EDGE + 8, EDGE + 8)).astype(np.float32)
    blob = schema.BlobProto(num=1, channels=3, height=EDGE + 8, width=EDGE + 8, data=image.ravel())
    (tmp_path / "mean.binaryproto").write_bytes(blob.SerializeToString())
    prototxt, run = tmp_path / "train_val.prototxt", tmp_path / "run"
    prototxt.write_text(TRAIN_VAL % 'mean_file: "data/somewhere/mean.binaryproto"')
    facts = json.loads(cli("import-caffe", prototxt, files[1], "--output", run, "--json"))
    assert (facts["mean"], facts["short_side"]) == ("an image", EDGE + 8)
    large, centre = with_centre(tmp_path, EDGE + 8)
    middle = image[:, 4:-4, 4:-4]
    np.testing.assert_allclose(predicted(run, [large]), expected(files, [centre], middle, 0.5), atol=ATOL)
    (tmp_path / "mean.binaryproto").unlink()
    message = cli("import-caffe", prototxt, files[1], "--output", tmp_path / "other", code=1)
    assert "mean image data/somewhere/mean.binaryproto, which is not there; name it with --mean" in message


def test_a_first_layer_that_is_no_convolution(pictures, tmp_path):
    """The channels are then turned in each pass, and two runs of one network do not share anything."""
    files = tmp_path / "deploy.prototxt", tmp_path / "net.caffemodel"
    scale = layer("first", "Scale", "", "data", "scaled")
    files[0].write_text(DEPLOY.replace(BODY, scale + BODY.replace('bottom: "data"', 'bottom: "scaled"')))
    draw_weights(*files)
    cli("import-caffe", *files, "--output", tmp_path / "run")
    np.testing.assert_allclose(predicted(tmp_path / "run", pictures), expected(files, pictures, (0, 0, 0)), atol=ATOL)


def test_what_is_no_classifier_is_a_sentence(files, tmp_path):
    prototxt, classes = tmp_path / "other.prototxt", tmp_path / "two.txt"
    classes.write_text("a\nb\n")
    assert "names 2 classes, the network has 6" in cli(
        "import-caffe", *files, "--output", tmp_path / "run", "--classes", classes, code=1
    )
    fcn = text_of("fcn").replace("num_output: 4096", "num_output: 4")
    prototxt.write_text(fcn.replace("dim: 500 dim: 500", "dim: 60 dim: 60"))
    draw_weights(prototxt, tmp_path / "fcn.caffemodel")
    message = cli("import-caffe", prototxt, tmp_path / "fcn.caffemodel", "--output", tmp_path / "run", code=1)
    assert "expected scores (N, classes), its output score is (1, 21, 60, 60)" in message
    prototxt.write_text(DEPLOY.replace(f"dim: {EDGE} dim: {EDGE}", f"dim: {EDGE} dim: {EDGE + 1}"))
    assert "square pictures" in cli("import-caffe", prototxt, files[1], "--output", tmp_path / "run", code=1)
    for mean in ("grey", "nan,0,0"):
        values = [*files, "--output", tmp_path / "run", "--mean", mean]
        assert "numbers such as 104,117,123" in cli("import-caffe", *values, code=1)
    classes.write_bytes(b"\xe9\n" * 6)
    assert "not UTF-8" in cli("import-caffe", *files, "--output", tmp_path / "run", "--classes", classes, code=1)
    assert not (tmp_path / "run").exists()
