"""AlexNet: exchange with torchvision, input scale and training, bad input, copies, and its summary."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from network_helpers import images
from torch import nn

from alexnet_cuda import AlexNet
from alexnet_cuda.model import PIXELS_PER_UNIT
from alexnet_cuda.summary import layer_names, model_summary
from alexnet_cuda.variants import VARIANTS

PIXEL_VARIANTS = ("paper", "original2012", "caffe", "caffenet", "owt")


@torch.no_grad()
def test_torchvision_weights_go_both_ways():
    theirs = pytest.importorskip("torchvision").models.alexnet(num_classes=20).eval()
    ours = AlexNet("torchvision", 20).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for size in (224, 193):
        x = torch.randn(2, 3, size, size)
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x), theirs(x))
    ours.reset_parameters()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


def test_input_scale():
    with torch.device("meta"):
        scales = {variant: AlexNet(variant).input_scale for variant in VARIANTS}
        assert AlexNet("paper", input="pixels").input_scale == 1
    assert scales == {variant: PIXELS_PER_UNIT if variant in PIXEL_VARIANTS else 1 for variant in VARIANTS}


def losses_in_training(setting, steps=50):
    """Of the paper's net, until it has learnt a piece of each of scikit-learn's two photographs, normalised."""
    torch.manual_seed(0)
    photographs = pytest.importorskip("sklearn.datasets").load_sample_images().images
    pixels = torch.stack([torch.tensor(photograph[100:327, 200:427]) for photograph in photographs]) / 255
    x = (pixels - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    model = AlexNet("paper", 2, dropout=0, input=setting)
    optimiser = torch.optim.SGD(model.parameters(), lr=5e-4, momentum=0.9, fused=True)
    losses = []
    while len(losses) < steps and min(losses, default=1) > 0.3:
        loss = F.cross_entropy(model(x.permute(0, 3, 1, 2)), torch.arange(2))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_the_papers_net_trains_on_normalised_photographs_and_naively_does_not():
    losses = losses_in_training("normalized")
    assert losses[-1] < 0.3
    assert min(losses_in_training("pixels", len(losses))) > 0.95 * math.log(2)


def test_unbatched_and_empty_batches():
    model = AlexNet("cifar", in_channels=1).eval()
    x = images(model, 2)
    torch.testing.assert_close(model(x[0]), model(x)[0])
    assert model(x[:0]).shape == (0, 10)
    assert model(x.to(memory_format=torch.channels_last)).shape == (2, 10)


def test_layout_on_a_cpu():
    """Features are channels_last whatever the images were, and the scores the same."""
    model, seen = AlexNet("cifar").eval(), []
    model.features[-1].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x = torch.randn(4, 3, 32, 32)
    scores = [model(x.to(memory_format=f)) for f in (torch.contiguous_format, torch.channels_last)]
    assert all(features.is_contiguous(memory_format=torch.channels_last) for features in seen)
    assert torch.equal(*scores)


def test_dropout_is_the_variants_own_unless_given():
    with torch.device("meta"):
        models = AlexNet(), AlexNet("flowers_bn"), AlexNet("flowers_bn", dropout=0.2)
    rates = [[m.p for m in model.modules() if isinstance(m, nn.Dropout)] for model in models]
    assert rates == [[0.5, 0.5], [0.4, 0.4], [0.2, 0.2]]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_classes", 0, "a positive integer"),
        ("in_channels", -1, "a positive integer"),
        ("dropout", 2, "between 0 and 1"),
        ("input", "bytes", "'normalized' or 'pixels'"),
    ],
)
def test_bad_arguments(name, value, expected):
    with pytest.raises(ValueError, match=f"AlexNet: expected {name} to be {expected}, got {value!r}"):
        AlexNet(**{name: value})


@pytest.mark.parametrize("name", ["torchvision", "cifar_deep"])
def test_networks_that_pool_take_larger_images(name):
    with torch.device("meta"):
        assert AlexNet(name, 7).eval()(torch.empty(2, 3, 300, 260)).shape == (2, 7)
    rows, larger = model_summary(name), model_summary(name, 2 * VARIANTS[name].input_size)
    assert larger[0].macs > 4 * rows[0].macs
    assert larger[-1] == rows[-1]


def test_bad_images():
    with torch.device("meta"):
        model, wide = AlexNet(), AlexNet("torchvision")
    cases = [
        (model, (1, 1, 227, 227), r"expected images \(N, 3, H, W\) or \(3, H, W\), got shape \(1, 1, 227, 227\)"),
        (model, (227, 227), r"got shape \(227, 227\)"),
        (model, (1, 3, 224, 224), "made for 227x227 images, got 224x224, of which 5x5 would remain where .* takes 6x6"),
        (model, (1, 3, 40, 300), "got 40x300, of which 0x8 would remain"),
        (wide, (1, 3, 40, 40), "'torchvision' is made for 224x224 images, got 40x40, of which 0x0"),
    ]
    for net, shape, message in cases:
        with pytest.raises(ValueError, match=message):
            net(torch.empty(shape, device="meta"))
    with pytest.raises(TypeError, match="expected a floating-point image"):
        model(torch.empty(1, 3, 227, 227, dtype=torch.uint8, device="meta"))


def test_copies_and_pickles():
    model = AlexNet("cifar").eval()
    x = images(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        assert twin.variant == model.variant


@pytest.mark.parametrize(
    ("variant", "macs"),
    dict(
        paper=724.4, ungrouped=1135.3, torchvision=714.2, owt=714.2, flowers_bn=743.3, cifar=47.9, cifar_deep=122.7
    ).items(),
)
def test_summary(variant, macs):
    rows = model_summary(variant)
    assert sum(row.parameters for row in rows) == VARIANTS[variant].parameters
    assert round(sum(row.macs for row in rows) / 1e6, 1) == macs
    assert rows[0].name == "features.0"
    assert rows[-1].output_size == (VARIANTS[variant].num_classes,)


def test_layer_names():
    with torch.device("meta"):
        names = {variant: layer_names(AlexNet(variant)) for variant in VARIANTS}
    head = "fc6 relu6 drop6 fc7 relu7 drop7 fc8"
    paper = "conv1 relu1 norm1 pool1 conv2 relu2 norm2 pool2 conv3 relu3 conv4 relu4 conv5 relu5 pool5"
    assert " ".join(names["paper"].values()) == f"{paper} {head}"
    assert list(names["paper"])[::7] == ["features.0", "features.7", "features.14", "classifier.6"]
    assert " ".join(names["keras_mnist"].values()).startswith("conv1 norm1 relu1 pool1 conv2 norm2")
    assert "conv2 relu2 norm2 norm2_2 pool2 conv3" in " ".join(names["original2012"].values())
    assert "conv1 bn1 relu1 norm1 pool1" in " ".join(names["cifar"].values())
    assert "relu5 pool5 avgpool5 drop5 fc6" in " ".join(names["torchvision"].values())
    assert all(len(set(each.values())) == len(each) for each in names.values())
