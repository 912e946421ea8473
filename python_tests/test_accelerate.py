"""`accelerate` on other people's networks: same outputs and gradients, same names, nothing else touched."""

import copy
import pickle

import pytest
import torch
from helpers import assert_all_close
from network_helpers import outputs_and_gradients
from torch import nn

import alexnet_cuda
from alexnet_cuda import accelerate, ops


def googlenet_v1():
    """The stem of GoogLeNet with its two LRN layers, more pooling, and a classifier."""
    pool = lambda: nn.MaxPool2d(3, 2, ceil_mode=True)
    stem = [nn.Conv2d(3, 16, 7, 2, 3), nn.ReLU(), pool(), nn.LocalResponseNorm(5)]
    stem += [nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.LocalResponseNorm(4, 0.1), pool()]
    head = nn.Flatten(), nn.Linear(8, 5)
    branch = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), nn.Conv2d(24, 8, 1), nn.ReLU())
    return nn.Sequential(*stem, branch, nn.MaxPool2d((3, 3), (2, 2), 1), nn.AdaptiveAvgPool2d(1), *head)


def torchvision_alexnet():
    model = pytest.importorskip("torchvision").models.alexnet(num_classes=5)
    model.classifier = nn.Linear(9216, 5)  # quicker to copy
    return model


def torchvision_googlenet():
    return pytest.importorskip("torchvision").models.googlenet(num_classes=5, aux_logits=False, init_weights=False)


def ours(module):
    return sorted(type(m).__name__ for m in module.modules() if type(m).__module__ == "alexnet_cuda.nn")


@pytest.mark.parametrize(
    ("build", "size", "exchanged"),
    [
        (torchvision_alexnet, 127, ["Conv2d"] * 5 + ["MaxPool2d"] * 3),
        (torchvision_googlenet, 64, ["Conv2d"] * 17 + ["MaxPool2d"] * 13),
        (googlenet_v1, 65, ["LocalResponseNorm"] * 2 + ["MaxPool2d"] * 4),
    ],
)
def test_same_outputs_and_gradients(build, size, exchanged):
    torch.manual_seed(0)
    model = build().eval()
    faster = accelerate(model)
    assert ours(faster) == ours(copy.deepcopy(faster)) == exchanged
    assert ours(model) == []
    assert list(faster.state_dict()) == list(model.state_dict())

    x = torch.randn(2, 3, size, size)
    expected, found = (outputs_and_gradients(net, x, net.parameters()) for net in (model, faster))
    assert_all_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_3x3_and_5x5_convolutions(format, bias):
    """The same outputs, gradients and strides as torch's."""
    conv = nn.Conv2d(32, 64, 5, padding=2, groups=2, bias=bias)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), conv, nn.ReLU(), nn.Conv2d(64, 16, 3), nn.MaxPool2d(2))
    model = model.to(memory_format=format)
    faster = accelerate(model)
    assert ours(faster) == ["Conv2d", "Conv2d", "MaxPool2d"]
    x = torch.randn(4, 3, 20, 23).contiguous(memory_format=format)
    expected, found = (outputs_and_gradients(net, x, net.parameters()) for net in (model, faster))
    assert [t.stride() for t in found] == [t.stride() for t in expected]
    assert_all_close(found, expected, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(faster.eval()(x), model.eval()(x), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_where_such_convolutions_are_torchs(kernels):
    """There the results are the same bits, elsewhere the same to rounding."""
    conv = nn.Conv2d(32, 32, 3, padding=1)
    x, ours = torch.randn(2, 32, 20, 20), accelerate(conv)
    for images, by_torch in ((x, False), (x[..., :2], True)):  # so few outputs that the weights would cost more
        with torch.profiler.profile() as profile:
            y = ours(images)
        assert ("aten::convolution" in {event.name for event in profile.events()}) is by_torch
        assert y.equal(conv(images)) or not by_torch
    torch._dynamo.reset()  # other tests have compiled Conv2d.forward, and Dynamo does it a limited number of times
    for wrap in (lambda f: f, torch.vmap, lambda f: torch.compile(f, backend="eager", fullgraph=True)):
        torch.testing.assert_close(wrap(ours)(x), wrap(conv)(x), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).equal(conv(x))
    assert copy.deepcopy(ours).double()(x.double()).equal(copy.deepcopy(conv).double()(x.double()))
    with pytest.raises(ValueError, match=r"conv2d: expected weight to be \(filters, 16, height, width\)"):
        ours(x[:, :16])


def test_root_in_place_twice_with_hooks_and_weights():
    pool, calls = nn.MaxPool2d(3, 2), []
    pool.register_forward_hook(lambda *_: calls.append(1))
    assert type(accelerate(pool)) is alexnet_cuda.nn.MaxPool2d
    assert type(pool) is nn.MaxPool2d
    assert accelerate(pool, inplace=True) is pool
    assert type(pool) is alexnet_cuda.nn.MaxPool2d
    assert type(accelerate(pool, inplace=True)) is alexnet_cuda.nn.MaxPool2d
    pool(torch.randn(1, 1, 7, 7))
    assert calls == [1]
    conv = nn.Conv2d(3, 8, 11, 4)
    weight = conv.weight
    assert accelerate(conv).weight is not weight
    assert accelerate(conv, inplace=True).weight is weight
    with pytest.raises(TypeError, match=r"expected module to be a torch\.nn\.Module, got Tensor"):
        accelerate(torch.ones(1))


class OwnPool(nn.MaxPool2d):
    pass


def test_leaves_the_rest_alone():
    conv = nn.Conv2d
    for module in (
        *(nn.MaxPool2d(3, 2, dilation=2), OwnPool(3, 2)),
        *(conv(3, 8, 11, 1), conv(2, 8, 11, 4), conv(4, 8, 11, 4, groups=2), conv(3, 8, 11, 4, dilation=2)),
        *(conv(3, 8, 11, 4, padding="valid"), conv(3, 8, 11, 4, padding=2, padding_mode="reflect")),
        *(conv(32, 24, 3, padding=1), conv(32, 32, 3, 2, padding=1), conv(32, 32, 3, padding="same")),
        *(conv(96, 256, 5, padding=2, groups=4), conv(32, 32, 3, padding=3), conv(32, 32, 3, padding=(1, 0))),
        *(conv(32, 32, 3, padding=1, padding_mode="reflect"), conv(32, 32, 3, dilation=2), conv(32, 40, 5, padding=2)),
        *(conv(32, 32, 7, padding=3), conv(32, 32, (3, 5), padding=1), conv(24, 32, 3, groups=2)),
    ):
        assert type(accelerate(module)) is type(module), module


def test_torch_fx():
    """Traced after or before: the graph calls our functions, or holds our modules."""
    model = nn.Sequential(nn.Conv2d(3, 8, 11, 4), *googlenet_v1()[3:4], nn.MaxPool2d(2), nn.Conv2d(8, 16, 3)).eval()
    x = torch.randn(2, 3, 51, 53)
    traced = torch.fx.symbolic_trace(accelerate(model))
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert targets == [ops.conv2d, ops.local_response_norm, ops.max_pool2d]
    before = accelerate(torch.fx.symbolic_trace(model))
    assert ours(before) == ["Conv2d", "LocalResponseNorm", "MaxPool2d"]
    with torch.no_grad():
        for net in (traced, before, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
            torch.testing.assert_close(net(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_feature_extractor_of_an_accelerated_network():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model, x = torchvision_alexnet().eval(), torch.randn(2, 3, 127, 127)
    nodes = ["features.2", "features.10", "classifier"]
    results = [extraction.create_feature_extractor(net, nodes)(x) for net in (model, accelerate(model))]
    for name in nodes:
        torch.testing.assert_close(results[1][name], results[0][name], rtol=1e-4, atol=1e-4)


def test_verbose_says_what_was_exchanged_and_why_not(capsys):
    class Own(nn.Conv2d):
        pass

    net = nn.Sequential(
        nn.Conv2d(3, 8, 7), nn.MaxPool2d(3, dilation=2), nn.LocalResponseNorm(5), Own(8, 8, 3), nn.ReLU()
    )
    faster = accelerate(accelerate(net, verbose=True), verbose=True)
    assert capsys.readouterr().out.splitlines()[:5] == [
        "0, Conv2d: left, there is no kernel for 3, 8, kernel_size=(7, 7), stride=(1, 1)",
        "1, MaxPool2d: left, dilation 2",
        "2, LocalResponseNorm: exchanged",
        "3, Conv2d: left, Own is a subclass",
        "0, Conv2d: left, there is no kernel for 3, 8, kernel_size=(7, 7), stride=(1, 1)",
    ]
    assert "(2): alexnet_cuda.LocalResponseNorm(5" in repr(faster)
    assert "(1): MaxPool2d(" in repr(faster)
