"""The table of variants: counts, constants and start values against the sources named in `variants`."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import alexnet_cuda
from alexnet_cuda import AlexNet
from alexnet_cuda.variants import CHANGES, LRN, VARIANTS, BatchNorm, Conv, Linear, MaxPool, ReLU, get_variant

DEEP, POOL_BN = "conv relu conv relu conv relu pool", "conv relu pool bn"
LRN_FIRST, BATCH_NORM = "conv lrn pool relu conv relu lrn", "conv bn relu lrn pool conv bn relu lrn pool"
LRN_POOL, POOL_LRN = "conv relu lrn pool conv relu lrn pool", "conv relu pool lrn conv relu pool lrn"
CIFAR_DEEP = (
    "conv bn relu conv pool bn relu lrn conv bn relu conv pool bn relu lrn conv bn relu conv pool bn relu "
    "conv bn relu pool"
)
# Parameters, running statistics, classes, side of the last feature maps, and the order of the layers before them.
NETWORKS = {
    "paper": (60_965_224, 0, 1000, 6, f"{LRN_POOL} {DEEP}"),
    "original2012": (60_965_224, 0, 1000, 6, f"{LRN_FIRST} lrn pool conv relu conv relu conv pool relu"),
    "caffe": (60_965_224, 0, 1000, 6, f"{LRN_POOL} {DEEP}"),
    "caffenet": (60_965_224, 0, 1000, 6, f"{POOL_LRN} {DEEP}"),
    "ungrouped": (62_378_344, 0, 1000, 6, f"{LRN_POOL} {DEEP}"),
    "owt": (61_100_840, 0, 1000, 6, f"{LRN_FIRST} pool conv relu conv relu conv pool relu"),
    "torchvision": (61_100_840, 0, 1000, 6, f"conv relu pool conv relu pool {DEEP}"),
    "tf_slim": (50_303_912, 0, 1000, 5, f"conv relu pool conv relu pool {DEEP}"),
    "keras_mnist": (21_622_154, 0, 10, 1, "conv lrn relu pool conv lrn relu pool conv relu conv relu conv relu"),
    "flowers_bn": (24_815_697, 19_136, 17, 2, f"{POOL_BN} {POOL_BN} conv relu bn conv relu bn {POOL_BN}"),
    "cifar": (1_124_026, 1_184, 10, 4, f"{BATCH_NORM} conv bn relu conv bn relu conv bn relu pool"),
    "cifar_deep": (1_977_546, 2_368, 10, 1, CIFAR_DEEP),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_counts_sizes_and_order(name):
    variant, (parameters, statistics, classes, side, order) = get_variant(name), NETWORKS[name]
    size = variant.input_size
    with torch.device("meta"):
        model, two = AlexNet(name).eval(), AlexNet(name, 2)
        scores = model(torch.empty(2, variant.channels, size, size))
    assert scores.shape == (2, classes)
    assert sum(p.numel() for p in model.parameters()) == parameters == variant.parameters
    running = sum(b.numel() for key, b in model.named_buffers() if "running" in key)
    assert running == statistics == variant.running_statistics
    assert model.num_classes == classes == variant.num_classes
    per_class = model.classifier[-1].in_features + 1
    assert sum(p.numel() for p in two.parameters()) == parameters - (classes - 2) * per_class
    assert variant.feature_size(size, size) == (side, side)
    names = {Conv: "conv", ReLU: "relu", LRN: "lrn", MaxPool: "pool", BatchNorm: "bn"}
    assert " ".join(names[type(layer)] for layer in variant.features) == order


def test_list_variants():
    assert list(alexnet_cuda.list_variants()) == list(NETWORKS)
    assert all(line and "\n" not in line for line in alexnet_cuda.list_variants().values())


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
    """What multiplies the sum of squares, in each LRN of the variant, with k, beta and groups."""
    lrns = [layer for layer in VARIANTS[name].features if isinstance(layer, LRN)]
    elements = [n.size if n.across == "channels" else n.size**2 for n in lrns]
    found = [(n.alpha / (e if n.divide_alpha else 1), n.k, n.beta, n.groups) for n, e in zip(lrns, elements)]
    assert found == [pytest.approx(lrn) for lrn in expected]


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
    variant = get_variant(name)
    hidden = [replace(part, units=part.units and 64) if type(part) is Linear else part for part in variant.classifier]
    variant = replace(variant, classifier=tuple(hidden))  # to be quick
    layers = [layer for layer in (*variant.features, *variant.classifier) if isinstance(layer, Conv | Linear)]
    assert " ".join(f"{layer.init.std:g}/{layer.init.bias:g}" for layer in layers) == expected
    modules = [m for m in AlexNet(variant, 100).modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    for module, layer in zip(modules, layers, strict=True):
        assert module.weight.std().item() == pytest.approx(layer.init.std, rel=0.05)
        assert (module.bias == layer.init.bias).all()


@torch.no_grad()
def test_dirac_filters_pass_one_channel_each_and_the_others_are_drawn():
    torch.manual_seed(0)
    convs = [layer for layer in AlexNet("cifar_deep").features if isinstance(layer, torch.nn.Conv2d)]
    x = torch.randn(2, 32, 5, 5)
    assert convs[1](x).shape == (2, 64, 5, 5)
    assert torch.equal(convs[1](x)[:, :32], x)
    assert convs[1].weight[32:].std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.05)
    assert torch.equal(convs[4].weight, torch.nn.init.dirac_(torch.empty(256, 256, 3, 3)))


def test_unknown_variant():
    with pytest.raises(ValueError, match="unknown variant 'papre'; did you mean paper"):
        AlexNet("papre")
    with pytest.raises(ValueError, match="unknown change of cifar 'no-lnr'; did you mean no-lrn"):
        AlexNet("cifar:tanh,no-lnr")


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_leaves_the_rest_as_it_is(name, change):
    plain, changed = get_variant(name), get_variant(f"{name}:{change}")
    gone = {"tanh": ReLU, "no-lrn": LRN, "no-bn": BatchNorm, "plain-pooling": MaxPool(3, 2)}[change]
    for place in ("features", "classifier"):
        before, after = getattr(plain, place), getattr(changed, place)
        assert gone not in [layer if isinstance(layer, MaxPool) else type(layer) for layer in after]
        if change in ("no-lrn", "no-bn"):
            before = [layer for layer in before if type(layer) is not gone]
        same = [new == old for new, old in zip(after, before, strict=True)]
        kept = [not (type(old) is gone or (type(old) is MaxPool and change == "plain-pooling")) for old in before]
        if change == "no-bn":  # convolutions get their biases
            kept = [kept_ and getattr(old, "bias", True) for kept_, old in zip(kept, before)]
        assert same == kept
    with torch.device("meta"):
        model = AlexNet(changed.name, 3)
        scores = model.eval()(torch.empty(1, model.in_channels, changed.input_size, changed.input_size))
    assert scores.shape == (1, 3)


def test_changes_add_up_and_are_counted():
    changed = get_variant("cifar:no-bn,tanh,plain-pooling")
    with torch.device("meta"):
        model = AlexNet(changed)
    assert sum(p.numel() for p in model.parameters()) == changed.parameters == 1_124_026 - 1_184 // 2
    assert (changed.running_statistics, changed.name) == (0, "cifar:no-bn,tanh,plain-pooling")
    kinds = [type(module).__name__ for module in model.features]
    assert kinds[:4] == ["Conv2d", "Tanh", "LocalResponseNorm", "MaxPool2d"]


def test_the_documented_table_has_every_variant():
    rows = (Path(__file__).parents[1] / "docs" / "variants.md").read_text().splitlines()
    for name, (parameters, statistics, *_) in NETWORKS.items():
        row = next(line for line in rows if line.startswith(f"| `{name}` "))
        assert f"{parameters:,}" in row
        assert not statistics or f"{statistics:,}" in row
