"""AlexNet's layers after the first: the same scores as torch's own, and only where nobody else has a say."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from alexnet_cuda import AlexNet, later_layers, set_kept_memory
from alexnet_cuda.variants import LRN, Conv, Dropout, Linear, MaxPool, ReLU, Variant

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch without oneDNN")
winograd = pytest.mark.skipif(not later_layers.has_winograd(), reason="no CPU kernels")
STEM = Conv(16, 11, 4), ReLU(), LRN(alpha=0.1), MaxPool()
FEATURES = (*STEM, Conv(48, 3, padding=1), ReLU(), Conv(32, 3, 2, groups=2), ReLU())
CLASSIFIER = (Linear(9000), ReLU(), Dropout(), Linear(120), ReLU(), Linear())
SMALL = Variant("small", "", FEATURES, CLASSIFIER, 0, input_size=99, num_classes=3)
CALLS = ["Conv2d", "ReLU"], ["Conv2d", "ReLU"], ["Linear", "ReLU"], ["Linear", "ReLU"]


@pytest.fixture
def calls(monkeypatch):
    """The modules of each call of later_layers.run."""
    names, run = [], later_layers.run
    monkeypatch.setattr(
        later_layers, "run", lambda modules, x: (names.append([type(m).__name__ for m in modules]), run(modules, x))[1]
    )
    return names


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AlexNet(SMALL).eval()


def images(n):
    return torch.randn(n, 3, 99, 99, generator=torch.Generator().manual_seed(1))


def expected(model, x):
    model.kernels = "none"
    try:
        return model(x)
    finally:
        model.kernels = None


def assert_all_close(got, expected):
    for ours, stock in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-5 * stock.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("n", [0, 1, 7, 8, 40, 129])
def test_scores(n, model, calls):
    scores = model(images(n))
    assert calls == list(CALLS)
    assert scores.is_contiguous()
    stock = expected(model, images(n))
    assert len(calls) == len(CALLS)
    torch.testing.assert_close(scores, stock, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_layers_without_bias(calls):
    layers = [nn.Linear(1024, 1024, bias=False), nn.ReLU()]
    conv = [nn.Conv2d(8, 8, 3, bias=False), nn.ReLU()]
    for n in (3, 9):
        x = torch.randn(n, 1024)
        torch.testing.assert_close(later_layers.run(layers, x), layers[0](x).relu(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(later_layers.run(layers[:1], x), layers[0](x), rtol=1e-4, atol=1e-5)
        x = torch.randn(n, 8, 9, 9)
        torch.testing.assert_close(later_layers.run(conv, x), conv[0](x).relu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 40])
def test_gradients(n, model, calls):
    """By their norms: a rounding error that moves a maximum or a number past ReLU's zero moves gradients with it."""
    x = images(n)
    inputs = [x.requires_grad_(), *model.parameters()]
    scores = model(x)
    assert calls == list(CALLS)
    grad = torch.randn_like(scores)
    got = torch.autograd.grad(scores, inputs, grad)
    stock = torch.autograd.grad(expected(model, x), inputs, grad)
    for ours, exact in zip(got, stock, strict=True):
        assert (ours - exact).norm() <= 3e-2 * exact.norm()


def test_gradients_of_one_layer():
    """Of whatever needs one; of the gradients again; and of a sum, whose gradient has no memory of its own."""
    layer, x = nn.Linear(1024, 1100), torch.randn(9, 1024)
    for needs in [(True, True, True), (False, True, False), (True, False, False), (False, False, True)]:
        leaves = x, layer.weight, layer.bias
        wanted = [leaf.requires_grad_(need) for leaf, need in zip(leaves, needs)]
        wanted = [leaf for leaf in wanted if leaf.requires_grad]
        for loss in (lambda y: y.sum(), lambda y: y.square().sum()):
            got = torch.autograd.grad(loss(later_layers.run([layer], x)), wanted)
            stock = torch.autograd.grad(loss(layer(x)), wanted)
            assert_all_close(got, stock)
    leaves = [leaf.requires_grad_() for leaf in (x, layer.weight, layer.bias)]
    seconds = []
    for y in (later_layers.run([layer], x), layer(x)):
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    assert_all_close(*seconds)


@winograd
def test_gradients_of_a_convolution():
    """Of whatever needs one, of the gradients again, and where numbers are not finite."""
    layer, x = nn.Conv2d(32, 64, 5, padding=2, groups=2), torch.randn(9, 32, 12, 12)
    assert later_layers.length([layer], x) == 1
    leaves = x, layer.weight, layer.bias
    for needs in [(True, True, True), (False, True, False), (True, False, False), (False, False, True)]:
        wanted = [leaf.requires_grad_(need) for leaf, need in zip(leaves, needs)]
        wanted = [leaf for leaf in wanted if leaf.requires_grad]
        for loss in (lambda y: y.sum(), lambda y: y.square().sum()):
            got = torch.autograd.grad(loss(later_layers.run([layer, nn.ReLU()], x)), wanted)
            stock = torch.autograd.grad(loss(layer(x).relu()), wanted)
            assert_all_close(got, stock)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    seconds = []
    for y in (later_layers.run([layer], x), layer(x)):
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    assert_all_close(*seconds)
    with torch.no_grad():
        x[3, 7, 5, 2], x[8, 20, 0, 11] = torch.inf, 1e30
    ours, stock = later_layers.run([layer, nn.ReLU()], x), layer(x).relu()
    assert torch.equal(ours, stock) or torch.allclose(ours, stock, equal_nan=True)
    for got, expected in zip(torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(stock.sum(), leaves)):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3, equal_nan=True)


@winograd
@pytest.mark.parametrize(
    ("layer", "size", "ours"),
    [
        (nn.Conv2d(96, 256, 5, padding=2, groups=2), 27, True),
        (nn.Conv2d(256, 384, 3, padding=1), 13, True),
        (nn.Conv2d(256, 384, 3), 4, False),  # so few outputs that the weights would cost more
        (nn.Conv2d(96, 256, 5, padding=2, groups=4), 27, False),  # 24 channels in a group
        (nn.Conv2d(96, 40, 5, padding=2), 27, False),
        (nn.Conv2d(96, 96, 5, 2, padding=2), 27, False),
        (nn.Conv2d(96, 96, 3, padding=3), 27, False),
        (nn.Conv2d(96, 96, 3, padding=(1, 0)), 27, False),
        (nn.Conv2d(96, 96, (3, 5), padding=1), 27, False),
        (nn.Conv2d(96, 96, 3, dilation=2), 27, False),
        (nn.Conv2d(96, 96, 7), 27, False),
        (nn.Conv2d(96, 96, 5), 4, False),  # torch says that it does not fit
    ],
)
def test_which_convolutions_are_ours(layer, size, ours):
    assert later_layers.by_winograd(layer, torch.empty(1, layer.in_channels, size, size)) == ours


def test_weights_gradients_leave_their_memory_to_the_next():
    """Which still holds the numbers: they were not copied on their way to .grad either."""
    layer, x = nn.Linear(1024, 1100), torch.randn(3, 1024)
    later_layers.run([layer], x).sum().backward()
    gradient = layer.weight.grad.clone()
    layer.zero_grad()
    assert torch.ops.alexnet_cuda._kept_empty_like(layer.weight).equal(gradient)
    before = set_kept_memory(0)
    try:
        assert torch.ops.alexnet_cuda._kept_empty_like(layer.weight).stride() == layer.weight.stride()
    finally:
        set_kept_memory(before)


def test_transforms_and_precisions_are_torchs(model, calls):
    x = images(2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert calls == []
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        model(x)
    assert calls == list(CALLS[:1])  # by our own kernel
    calls.clear()
    with torch.no_grad():
        torch.vmap(model)(x[None])
        model.double()(x.double())
        model.float()
        torch.compile(model, backend="eager", fullgraph=True)(x)
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(model(forward_ad.make_dual(x, x))).tangent is not None
    assert calls == []


@torch.no_grad()
def test_hooks_and_replaced_layers(model, calls):
    x, seen = images(2), []
    for module, left in (
        (model.features[5], CALLS[1:]),
        (model.classifier[0], [*CALLS[:2], CALLS[3]]),
        (model.features, CALLS[2:]),
        (model.classifier, CALLS[:2]),
    ):
        handle = module.register_forward_hook(lambda *args: seen.append(args[2]))
        torch.testing.assert_close(model(x), expected(model, x), rtol=1e-4, atol=1e-5)
        assert len(seen) == 2
        assert calls == list(left)
        handle.remove()
        calls.clear()
        seen.clear()
    linear, model.classifier = model.classifier, nn.Linear(model.classifier[0].in_features, 2)
    assert model(x).shape == (2, 2)
    model.classifier = linear


def test_a_hook_on_the_features_sees_scaled_images():
    """As a module alone would: input_scale times the images."""
    model, seen = AlexNet("paper", 2).eval(), []
    x = torch.randn(1, 3, 227, 227)
    model.features.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
    torch.testing.assert_close(seen[0], x * model.input_scale)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(1023, 1024),  # small
        nn.Linear(1024, 1024).bfloat16(),
        nn.Conv2d(32, 32, 3, padding="same"),
        nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(32, 32, 3, padding=1).double(),
        nn.ConvTranspose2d(32, 32, 3),
    ],
)
def test_other_layers_are_torchs(layer):
    conv = isinstance(layer, nn.modules.conv._ConvNd)
    x = torch.randn(2, layer.in_channels, 9, 9) if conv else torch.randn(2, layer.in_features)
    assert later_layers.length([layer, nn.ReLU()], x) == 0


@torch.no_grad()
def test_a_layer_that_does_not_fit_gets_torchs_message():
    model = AlexNet(SMALL).eval()
    model.classifier[0] = nn.Linear(1000, 9000)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(images(2))
