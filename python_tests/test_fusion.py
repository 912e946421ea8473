"""Neighbouring layers as one operator: which ones each network fuses, and that results stay those of the modules."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from alexnet_cuda import AlexNet, _library, fusion, ops
from alexnet_cuda.variants import LRN, VARIANTS, Conv, Dropout, Linear, MaxPool, ReLU, Variant

DEEP = "conv2d+relu conv2d+relu conv2d+relu"
HEAD = "linear+relu linear+relu linear"
EXPECTED = {
    "paper": f"block:relu-lrn-pool conv2d tail:relu-lrn-pool {DEEP} {HEAD}",
    "original2012": f"block:lrn-pool-relu conv2d+relu conv2d+relu conv2d+relu conv2d {HEAD}",
    "caffe": f"block:relu-lrn-pool conv2d tail:relu-lrn-pool {DEEP} {HEAD}",
    "caffenet": f"block:relu-pool-lrn conv2d tail:relu-pool-lrn {DEEP} {HEAD}",
    "ungrouped": f"block:relu-lrn-pool conv2d tail:relu-lrn-pool {DEEP} {HEAD}",
    "owt": f"block:lrn-pool-relu conv2d tail:relu-lrn-pool conv2d+relu conv2d+relu conv2d {HEAD}",
    "torchvision": f"conv2d+relu conv2d+relu {DEEP} {HEAD}",
    "tf_slim": f"conv2d+relu conv2d+relu {DEEP} {HEAD}",
    "keras_mnist": f"block:lrn-pool-relu conv2d tail:lrn-pool-relu {DEEP} {HEAD}",
    "flowers_bn": f"conv2d+relu conv2d+relu {DEEP} {HEAD}",
    "cifar": "conv2d tail:relu-lrn-pool conv2d tail:relu-lrn-pool conv2d conv2d conv2d linear+relu linear",
}
STEM = Conv(16, 11, 4), ReLU(), LRN(alpha=0.1), MaxPool()
FEATURES = (*STEM, Conv(48, 3, padding=1), ReLU(), Conv(32, 3, 2, groups=2), ReLU())
CLASSIFIER = (Linear(9000), ReLU(), Dropout(), Linear(120), ReLU(), Linear())
SMALL = Variant("small", "", FEATURES, CLASSIFIER, 0, input_size=99, num_classes=3)
CALLS = ["block:relu-lrn-pool", "conv2d+relu", "conv2d+relu", "linear+relu", "linear+relu", "linear"]


@pytest.fixture
def calls(monkeypatch):
    """The operators that the fused networks call."""
    names = []

    def noted(name, op):
        def call(*args, **kwargs):
            more = f":{kwargs['order']}" if "order" in kwargs else "+relu" if kwargs.get("relu") else ""
            names.append(name + more)
            return op(*args, **kwargs)

        return call

    monkeypatch.setattr(fusion, "linear", noted("linear", fusion.linear))
    for op, name in (
        ("conv2d", "conv2d"),
        ("relu_lrn_max_pool2d", "tail"),
        ("conv2d_relu_lrn_max_pool2d", "block"),
    ):
        monkeypatch.setattr(ops, op, noted(name, getattr(ops, op)))
    return names


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AlexNet(SMALL).eval()


def images(n):
    return torch.randn(n, 3, 99, 99, generator=torch.Generator().manual_seed(1))


def unfused(model, x):
    model.fused = False
    try:
        return model(x)
    finally:
        model.fused = True


def narrow(variant):
    """Hidden linear layers of 64 units, to be quick."""
    hidden = lambda layer: isinstance(layer, Linear) and layer.units == 4096
    return replace(variant, classifier=tuple(replace(n, units=64) if hidden(n) else n for n in variant.classifier))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_fused_equals_unfused(variant, training, calls):
    model = AlexNet(narrow(VARIANTS[variant]), 10).train(training)
    model.double()  # in float32, rounding may choose another maximum of two
    size, results = model.variant.input_size, []
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    for run in (model, lambda x: unfused(model, x)):
        torch.manual_seed(0)  # for dropout
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in model.parameters())])
    assert calls == EXPECTED[variant].split()
    for fused, single in zip(*results, strict=True):
        torch.testing.assert_close(fused, single, rtol=1e-9, atol=1e-10 * single.abs().max().item())


def test_a_second_pass_of_training_uses_updated_weights(calls):
    """The weights times the input scale are not kept."""
    model = AlexNet(replace(SMALL, pixels=True))
    x = images(2)
    before = model(x)
    with torch.no_grad():
        model.features[0].weight.mul_(2)
    assert not torch.allclose(model(x), before)
    torch.testing.assert_close(model(x), unfused(model, x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("n", [0, 1, 7, 8, 40, 129])
def test_scores_are_torchs(n, model, calls, monkeypatch):
    scores = model(images(n))
    assert calls == CALLS
    assert scores.is_contiguous()
    monkeypatch.delitem(_library.KERNEL_DTYPES, "cpu", raising=False)
    torch.testing.assert_close(scores, unfused(model, images(n)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 40])
def test_gradients_are_torchs(n, model, calls, monkeypatch):
    """By their norms: a rounding error that moves a maximum or a number past ReLU's zero moves gradients with it."""
    x = images(n)
    inputs = [x.requires_grad_(), *model.parameters()]
    scores = model(x)
    assert calls == CALLS
    grad = torch.randn_like(scores)
    got = torch.autograd.grad(scores, inputs, grad)
    monkeypatch.delitem(_library.KERNEL_DTYPES, "cpu", raising=False)
    stock = torch.autograd.grad(unfused(model, x), inputs, grad)
    for ours, exact in zip(got, stock, strict=True):
        assert (ours - exact).norm() <= 3e-2 * exact.norm()


@torch.no_grad()
def test_devices(model, device, calls):
    x = images(2)
    expected = unfused(model, x.double().to("cpu") if False else x)
    scores = model.to(device)(x.to(device))
    model.to("cpu")
    assert calls == CALLS
    torch.testing.assert_close(scores.cpu(), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_hooks_and_replaced_layers(model, calls):
    """What has a hook runs by itself, and a hook on `features` or `classifier` gets what torch gives it."""
    x, seen = images(2), []
    expected = unfused(model, x)
    for module, left in (
        (model.features[1], [*CALLS[1:]]),  # the convolution runs by itself, then ReLU, then LRN, then pooling
        (model.features[5], ["block:relu-lrn-pool", "conv2d", *CALLS[2:]]),
        (model.classifier[0], [*CALLS[:3], *CALLS[4:]]),
        (model.features, CALLS[3:]),
        (model.classifier, CALLS[:3]),
    ):
        handle = module.register_forward_hook(lambda *args: seen.append(args[2]))
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        handle.remove()
        assert len(seen) == 1
        assert calls == left
        calls.clear()
        seen.clear()


@torch.no_grad()
def test_replaced_layers(model, calls):
    x, twin = images(2), copy.deepcopy(model)
    twin.features[1] = nn.LeakyReLU(0.5)
    assert not torch.allclose(twin(x), model(x))
