"""Neighbouring layers as one operator: which ones each network fuses, and that results stay those of the modules."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import assert_all_close
from network_helpers import images, narrow_network, outputs_and_gradients
from torch import nn
from torch.autograd import forward_ad

from alexnet_cuda import AlexNet, _library, fusion, ops
from alexnet_cuda import nn as layers
from alexnet_cuda.variants import LRN, VARIANTS, Conv, Dropout, Linear, MaxPool, ReLU, Variant

TAIL = "relu_lrn_max_pool2d"
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
    "cifar_deep": " ".join(["conv2d"] * 7 + ["linear"]),
}
STEM = Conv(16, 11, 4), ReLU(), LRN(alpha=0.1), MaxPool()
FEATURES = (*STEM, Conv(48, 3, padding=1), ReLU(), Conv(32, 3, 2, groups=2), ReLU())
CLASSIFIER = (Linear(9000), ReLU(), Dropout(), Linear(120), ReLU(), Linear())
SMALL = Variant("small", "", FEATURES, CLASSIFIER, input_size=99, num_classes=3)
CALLS = ["block:relu-lrn-pool", "conv2d+relu", "conv2d+relu", "linear+relu", "linear+relu", "linear"]


@pytest.fixture
def calls(monkeypatch):
    """The operators that fused networks call."""
    names = []

    def noted(name, op):
        def call(*args, **kwargs):
            names.append(name + (f":{kwargs['order']}" if "order" in kwargs else "+relu" * kwargs["relu"]))
            return op(*args, **kwargs)

        return call

    monkeypatch.setattr(fusion, "linear", noted("linear", fusion.linear))
    for name, op in (("conv2d", "conv2d"), ("tail", TAIL), ("block", f"conv2d_{TAIL}")):
        monkeypatch.setattr(ops, op, noted(name, getattr(ops, op)))
    return names


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AlexNet(SMALL).eval()


def unfused(model):
    twin = copy.copy(model)  # of the same parameters
    twin.fused = False
    return twin


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_fused_equals_unfused(variant, training, calls):
    """In float64: in float32, rounding may choose another maximum of two."""
    model = narrow_network(variant, 10).train(training).double()
    results = []
    for run in (model, unfused(model)):
        torch.manual_seed(0)  # for dropout
        results.append(outputs_and_gradients(run, images(model, 2).double(), model.parameters()))
    assert calls == EXPECTED[variant].split()
    assert_all_close(*results, rtol=1e-9, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("n", [0, 1, 7, 8, 40, 129])
def test_scores_are_torchs(n, model, calls, monkeypatch):
    scores = model(images(model, n))
    assert calls == CALLS
    assert scores.is_contiguous()
    monkeypatch.delitem(_library.KERNEL_DTYPES, "cpu", raising=False)
    torch.testing.assert_close(scores, unfused(model)(images(model, n)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 40])
def test_gradients_are_torchs(n, model, calls, monkeypatch):
    """By their norms: a rounding error that moves a maximum or a number past ReLU's zero moves gradients with it."""
    found = outputs_and_gradients(model, images(model, n), model.parameters())
    assert calls == CALLS
    monkeypatch.delitem(_library.KERNEL_DTYPES, "cpu", raising=False)
    for ours, stock in zip(found, outputs_and_gradients(unfused(model), images(model, n), model.parameters())):
        assert (ours - stock).norm() <= 3e-2 * stock.norm()


@torch.no_grad()
def test_devices(device, model, calls):
    x = images(model, 2)
    scores = copy.deepcopy(model).to(device)(x.to(device))
    assert calls == CALLS
    expected = copy.deepcopy(model).double()(x.double())
    torch.testing.assert_close(scores.double().cpu(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_module_with_a_hook_runs_by_itself(model, calls):
    """A hook on `features` or `classifier` leaves nothing fused in it."""
    x, seen = images(model, 2), []
    expected = unfused(model)(x)
    for module, left in (
        (model.features[1], ["conv2d", *CALLS[1:]]),
        (model.features[4], [CALLS[0], *CALLS[2:]]),
        (model.features[5], [CALLS[0], "conv2d", *CALLS[2:]]),
        (model.classifier[1], [*CALLS[:3], "linear", *CALLS[4:]]),
        (model.features, CALLS[3:]),
        (model.classifier, CALLS[:3]),
    ):
        handle = module.register_forward_hook(lambda *args: seen.append(args[2]))
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        handle.remove()
        assert (len(seen), calls) == (1, left)
        calls.clear()
        seen.clear()


@torch.no_grad()
def test_replaced_modules_are_seen(model, calls):
    class Own(nn.ReLU):
        pass

    x, twin = images(model, 2), copy.deepcopy(model)
    expected = unfused(model)(x)
    for relu in (Own(), nn.ReLU()):
        twin.features[1] = relu
        torch.testing.assert_close(twin(x), expected, rtol=1e-4, atol=1e-5)
    relu.forward = lambda x: x.clamp(-1, 1)
    assert not torch.allclose(twin(x), expected)
    assert calls == ["conv2d", *CALLS[1:], *CALLS, "conv2d", *CALLS[1:]]
    twin.features[1] = nn.LeakyReLU(0.5)
    assert not torch.allclose(twin(x), expected)
    twin.classifier = nn.Linear(twin.classifier[0].in_features, 2)
    assert twin(x).shape == (2, 2)


@torch.no_grad()
def test_input_scale():
    """The first convolution's weights take it, afresh in every call; a hook on the features sees scaled images."""
    model, seen = AlexNet(replace(SMALL, pixels=True)).eval(), []
    x = images(model)
    model(x)
    model.features[0].weight.mul_(2)
    torch.testing.assert_close(model(x), unfused(model)(x), rtol=1e-4, atol=1e-5)
    model.features.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x)
    torch.testing.assert_close(seen[0], x * model.input_scale)


def test_which_modules_can_be_fused():
    conv, lrn, pool = nn.Conv2d, layers.LocalResponseNorm, layers.MaxPool2d
    kinds = {
        "conv": [conv(8, 8, 3, padding=1, groups=2), layers.Conv2d(3, 8, 11, 4, ceil_mode=True)],
        "lrn": [lrn(5, window="onnx")],
        "pool": [pool(3, 2)],
        "relu": [nn.ReLU(inplace=True)],
        "linear": [nn.Linear(2, 2)],
        "": [
            *(conv(8, 8, 3, padding="same"), conv(8, 8, 3, padding=1, padding_mode="reflect"), conv(8, 8, 3, (1, 2))),
            *(conv(8, 8, 3, dilation=2), conv(8, 8, 3, padding=(1, 0)), nn.ConvTranspose2d(8, 8, 3)),
            *(lrn(5, across="spatial"), nn.LocalResponseNorm(5), pool(3, return_indices=True), pool(3, dilation=2)),
            *(nn.ReLU6(), nn.Dropout()),
        ],
    }
    for kind, modules in kinds.items():
        assert [fusion.kind(module) for module in modules] == [kind] * len(modules)


@pytest.mark.parametrize("tail", fusion.TAILS, ids="-".join)
@pytest.mark.parametrize("geometry", [(6, 11, 4, 0, 1), (6, 11, 4, 0, 3), (12, 5, 1, 2, 3)], ids=str)
def test_every_order_of_every_block(tail, geometry, calls):
    """First layers, and convolutions for which there is no operator that goes on to LRN and pooling."""
    filters, kernel_size, stride, padding, groups = geometry
    conv = layers.Conv2d(3, filters, kernel_size, stride, padding, groups=groups, ceil_mode=True)
    lrn = layers.LocalResponseNorm(4, 0.5, 0.75, 2.0, groups=3, window="onnx", divide_alpha=False)
    modules = {"relu": nn.ReLU(), "lrn": lrn, "pool": layers.MaxPool2d(3, 2, 1, ceil_mode=True)}
    chain = nn.Sequential(conv, *(modules[kind] for kind in tail)).double()
    x, order = torch.randn(2, 3, 40, 43, dtype=torch.float64), fusion.TAILS[tail]
    torch.testing.assert_close(fusion.run(chain, x, 1.5), chain(1.5 * x))
    assert calls == ([f"block:{order}"] if kernel_size == 11 and groups == 1 else ["conv2d", f"tail:{order}"])
    torch.testing.assert_close(fusion.run(chain[1:], x, 1.5), chain[1:](1.5 * x))
    assert calls[-1] == f"tail:{order}"


def test_transforms_and_precisions(model):
    x = images(model, 2)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(x).float(), expected, rtol=5e-2, atol=5e-2)
        with torch.backends.mkldnn.flags(enabled=False):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.vmap(model)(x[None])[0], expected, rtol=1e-4, atol=1e-5)
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(model(forward_ad.make_dual(x, x))).tangent is not None
    weights = dict(model.named_parameters())
    found = torch.func.grad(lambda w: torch.func.functional_call(model, w, x).square().sum())(weights)
    assert_all_close(found.values(), outputs_and_gradients(model, x, model.parameters())[2:], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("variant", ["cifar", "original2012"])
def test_compile_and_export_without_graph_breaks(variant):
    model = narrow_network(variant, 10)
    x = images(model, 2)
    torch.compiler.reset()
    expected = model(x)
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.testing.assert_close(program.module()(x[:1]), expected[:1], rtol=1e-4, atol=1e-4)
