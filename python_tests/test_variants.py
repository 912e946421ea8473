"""The table of variants: counts, constants and start values against the sources named in `variants`."""

from pathlib import Path

import pytest
import torch

import alexnet_cuda
from alexnet_cuda import AlexNet
from alexnet_cuda.variants import LRN, VARIANTS, BatchNorm, Conv, Linear, MaxPool, ReLU, get_variant

COUNTS = {
    "paper": (60_965_224, 0, 1000),
    "original2012": (60_965_224, 0, 1000),
    "caffe": (60_965_224, 0, 1000),
    "caffenet": (60_965_224, 0, 1000),
    "ungrouped": (62_378_344, 0, 1000),
    "owt": (61_100_840, 0, 1000),
    "torchvision": (61_100_840, 0, 1000),
    "tf_slim": (50_303_912, 0, 1000),
    "keras_mnist": (21_622_154, 0, 10),
    "flowers_bn": (24_815_697, 19_136, 17),
    "cifar": (1_124_026, 1_184, 10),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_and_output(name):
    variant = get_variant(name)
    with torch.device("meta"):
        model = AlexNet(name).eval()
        images = torch.empty(2, variant.channels, variant.input_size, variant.input_size)
    statistics = sum(b.numel() for key, b in model.named_buffers() if "running" in key)
    parameters = sum(p.numel() for p in model.parameters())
    assert (parameters, statistics, model.num_classes) == COUNTS[name]
    assert (variant.parameters, variant.running_statistics, variant.num_classes) == COUNTS[name]
    assert model(images).shape == (2, variant.num_classes)


@pytest.mark.parametrize(
    ("classes", "ungrouped", "grouped"), [(2, 58_289_538, 56_876_418), (10, 58_322_314, 56_909_194)]
)
def test_counts_with_other_classes(classes, ungrouped, grouped):
    with torch.device("meta"):
        counts = [sum(p.numel() for p in AlexNet(name, classes).parameters()) for name in ("ungrouped", "paper")]
    assert counts == [ungrouped, grouped]


def test_list_variants():
    assert list(alexnet_cuda.list_variants()) == list(COUNTS)
    assert all(line and "\n" not in line for line in alexnet_cuda.list_variants().values())


def order(name):
    names = {Conv: "conv", ReLU: "relu", LRN: "lrn", MaxPool: "pool", BatchNorm: "bn"}
    return " ".join(names[type(layer)] for layer in VARIANTS[name].features)


DEEP = "conv relu conv relu conv relu pool"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("paper", f"conv relu lrn pool conv relu lrn pool {DEEP}"),
        ("caffe", f"conv relu lrn pool conv relu lrn pool {DEEP}"),
        ("caffenet", f"conv relu pool lrn conv relu pool lrn {DEEP}"),
        ("ungrouped", f"conv relu lrn pool conv relu lrn pool {DEEP}"),
        ("original2012", "conv lrn pool relu conv relu lrn lrn pool conv relu conv relu conv pool relu"),
        ("owt", "conv lrn pool relu conv relu lrn pool conv relu conv relu conv pool relu"),
        ("torchvision", f"conv relu pool conv relu pool {DEEP}"),
        ("tf_slim", f"conv relu pool conv relu pool {DEEP}"),
        ("keras_mnist", "conv lrn relu pool conv lrn relu pool conv relu conv relu conv relu"),
        ("flowers_bn", "conv relu pool bn conv relu pool bn conv relu bn conv relu bn conv relu pool bn"),
        ("cifar", "conv bn relu lrn pool conv bn relu lrn pool conv bn relu conv bn relu conv bn relu pool"),
    ],
)
def test_layer_order(name, expected):
    assert order(name) == expected


def factors(name):
    """What multiplies the sum of squares, in each LRN of the variant, with k, beta and groups."""
    lrns = [layer for layer in VARIANTS[name].features if isinstance(layer, LRN)]
    elements = [n.size if n.across == "channels" else n.size**2 for n in lrns]
    return [(n.alpha / (e if n.divide_alpha else 1), n.k, n.beta, n.groups) for n, e in zip(lrns, elements)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("paper", [(1e-4, 2, 0.75, 1)] * 2),
        ("original2012", [(2e-5, 2, 0.75, 2)] * 2 + [(4e-5, 1, 0.75, 1)]),
        ("caffe", [(2e-5, 1, 0.75, 1)] * 2),
        ("caffenet", [(2e-5, 1, 0.75, 1)] * 2),
        ("ungrouped", [(1e-4, 2, 0.75, 1)] * 2),
        ("owt", [(2e-5, 2, 0.75, 1)] * 2),
        ("keras_mnist", [(1.0, 1, 0.5, 1)] * 2),
    ],
)
def test_lrn_constants(name, expected):
    assert factors(name) == [pytest.approx(lrn) for lrn in expected]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("paper", "0.01/0 0.01/1 0.01/0 0.01/1 0.01/1 0.01/1 0.01/1 0.01/0"),
        ("original2012", "0.01/0 0.01/1 0.03/0 0.03/1 0.03/1 0.01/1 0.01/1 0.01/0"),
        ("caffe", "0.01/0 0.01/0.1 0.01/0 0.01/0.1 0.01/0.1 0.005/0.1 0.005/0.1 0.01/0"),
        ("caffenet", "0.01/0 0.01/1 0.01/0 0.01/1 0.01/1 0.005/1 0.005/1 0.01/0"),
        ("owt", "0.01/0 0.01/1 0.03/0 0.03/1 0.03/1 0.01/1 0.01/1 0.01/-7"),
    ],
)
def test_start_values(name, expected):
    layers = [
        layer for layer in (*VARIANTS[name].features, *VARIANTS[name].classifier) if isinstance(layer, Conv | Linear)
    ]
    assert " ".join(f"{layer.init.std:g}/{layer.init.bias:g}" for layer in layers) == expected

    modules = [m for m in AlexNet(name, 100).modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    for module, layer in zip(modules, layers, strict=True):
        assert module.weight.std().item() == pytest.approx(layer.init.std, rel=0.05)
        assert (module.bias == layer.init.bias).all()


@pytest.mark.parametrize(
    ("name", "size", "remains"),
    [
        ("paper", 227, 6),
        ("original2012", 224, 6),
        ("owt", 224, 6),
        ("torchvision", 224, 6),
        ("tf_slim", 224, 5),
        ("keras_mnist", 224, 1),
        ("flowers_bn", 224, 2),
        ("cifar", 32, 4),
        ("paper", 224, 5),
        ("paper", 50, 0),
    ],
)
def test_feature_size(name, size, remains):
    assert get_variant(name).feature_size(size, size) == (remains, remains)


def test_unknown_variant():
    with pytest.raises(ValueError, match="no variant is called 'papre'; the variants are paper, original2012, caffe"):
        AlexNet("papre")


def test_the_documented_table_has_every_variant():
    rows = (Path(__file__).parents[1] / "docs" / "variants.md").read_text()
    for name, (parameters, statistics, _) in COUNTS.items():
        row = next(line for line in rows.splitlines() if line.startswith(f"| `{name}` "))
        assert f"{parameters:,}" in row
        assert not statistics or f"{statistics:,}" in row
