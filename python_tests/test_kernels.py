"""The choice between our kernels and torch's: every value, who decides, and that results stay the same."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch

from alexnet_cuda import AlexNet, _library, accelerate, ops
from alexnet_cuda import kernels as choice
from alexnet_cuda.variants import LRN, Conv, Linear, MaxPool, ReLU, Variant

TAIL = (ReLU(), LRN(alpha=0.1), MaxPool())
SMALL = Variant("small", "", (Conv(16, 11, 4), *TAIL, Conv(8, 3), *TAIL), (Linear(),), 0, input_size=99, num_classes=3)
BLOCK, REST = "conv2d_relu_lrn_max_pool2d", "relu_lrn_max_pool2d"
VALUES = {  # to the functions of ops that run
    "auto": [BLOCK, REST],
    "all": [BLOCK, REST],
    "none": [],
    "conv2d": ["conv2d"],
    REST: [REST, REST],
    f"{BLOCK}, max_pool2d": [BLOCK, "max_pool2d"],
    "local_response_norm,conv2d": ["conv2d", *["local_response_norm"] * 2],
}


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    monkeypatch.setattr(choice, "_chosen", {})


@pytest.fixture
def called(monkeypatch, kernels):
    """Names of the functions of ops, as they are called."""
    names = []

    def note(name, function):
        return lambda *args, **kwargs: (names.append(name), function(*args, **kwargs))[1]

    for name in choice.OPERATORS:
        monkeypatch.setattr(ops, name, note(name, getattr(ops, name)))
    return names


def network(kernels=None):
    torch.manual_seed(0)
    return AlexNet(SMALL, kernels=kernels)


@pytest.mark.parametrize("value", VALUES)
def test_values(value, called, device):
    x = torch.randn(2, 3, 99, 99, device=device)
    expected = network("none").to(device)(x)
    assert called == []
    y = network(value).to(device)(x)
    assert called == VALUES[value]
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("value", "expected", "of_stock"),
    [
        (None, ["conv2d"], ["conv2d"]),
        ("none", [], []),
        ("max_pool2d", ["max_pool2d"] * 2, ["max_pool2d"]),
        ("auto", [BLOCK, REST], ["conv2d", "max_pool2d"]),
    ],
)
def test_the_network_decides_before_the_environment(value, expected, of_stock, called, monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "conv2d")
    x, stock = torch.randn(1, 3, 99, 99), torch.nn.Sequential(torch.nn.Conv2d(3, 4, 11, 4), torch.nn.MaxPool2d(3, 2))
    network(value)(x)
    assert called == expected
    accelerate(stock, kernels=value)(x)
    assert called == expected + of_stock


@pytest.mark.parametrize("value", ["", "al", "all,none", "conv2d,", "conv3d", 1])
def test_an_unknown_value_is_refused(value, monkeypatch):
    for make in (network, lambda value: accelerate(torch.nn.MaxPool2d(3, 2), kernels=value)):
        with pytest.raises(ValueError, match=r"kernels: expected auto, all, none, wgmma, or some of conv2d, .* got"):
            make(value)
    if value and isinstance(value, str):
        monkeypatch.setenv(choice.VARIABLE, value)
        with pytest.raises(ValueError, match=rf"ALEXNET_CUDA_KERNELS: expected auto, .* got '{value}'"):
            network()


@pytest.mark.parametrize("value", [None, "wgmma"])
def test_wgmma_is_auto_for_a_process_or_a_network(value, called, monkeypatch):
    if value is None:
        monkeypatch.setenv(choice.VARIABLE, "wgmma")
    network(value)(torch.randn(1, 3, 99, 99))
    assert called == VALUES["auto"]


@pytest.mark.parametrize("value", [None, "auto", "wgmma"])
def test_an_exported_network_keeps_its_choice_of_wgmma(value, kernels):
    model, x = network(value), torch.randn(1, 3, 99, 99)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x))
    (block,) = [node for node in program.graph.nodes if node.target == getattr(torch.ops.alexnet_cuda, BLOCK).default]
    assert block.args[-1] == (value == "wgmma")


@pytest.mark.parametrize(
    ("capability", "built", "said"),
    [
        ((9, 0), "80-real 90a-real", "first block by wgmma"),
        ((9, 0), "80-real 90-real", "wgmma needs 9.0 and code for 90a"),
        ((10, 0), "80-real 90a-real 100-real", "wgmma needs 9.0 and code for 90a"),
    ],
)
def test_info_says_whether_wgmma_takes_effect(capability, built, said, monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "wgmma")
    monkeypatch.setitem(_library.WHY_NOT, "cuda", "")
    monkeypatch.setattr(_library, "build_info", lambda: {"CUDA architectures": built})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    names, why = choice.decide(None, "cuda", 0)
    assert names == choice.OPERATORS
    assert why.endswith(f"; {said}")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_the_choice(copied, called):
    model, x = network("max_pool2d"), torch.randn(1, 3, 99, 99)
    twin = copied(model)
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
    assert called == ["max_pool2d"] * 4
    assert twin.kernels == "max_pool2d"
    other = network("all")
    other.load_state_dict(model.state_dict())
    assert other.kernels == "all"
    assert "kernels='max_pool2d'" in repr(model)


@pytest.mark.parametrize("value", [None, "none", "conv2d,max_pool2d", "wgmma"])
def test_compile(value):
    model, x = network(value), torch.randn(1, 3, 99, 99)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((9, 0), "80-real 90a-real", True),
        ((8, 6), "80-real 90a-real", True),
        ((7, 5), "80-real 90a-real", False),
        ((10, 0), "80-real 90a", False),  # "a" is for 9.0 alone, PTX as well
        ((8, 0), "86-real", False),
        ((12, 1), "100-real 120", True),
        ((13, 0), "100-real 120", True),
        ((13, 0), "100-real 120-real", False),
        ((10, 3), "100f", True),
        ((12, 0), "100f", False),
        ((9, 0), "80-virtual", True),
        ((9, 0), "native", True),
    ],
)
def test_a_gpu_without_machine_code_uses_torch(capability, built, runs, monkeypatch):
    monkeypatch.setitem(_library.WHY_NOT, "cuda", "")
    monkeypatch.setattr(_library, "build_info", lambda: {"CUDA architectures": built})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    names, why = choice.decide(None, "cuda", 0)
    assert names == (choice.OPERATORS if runs else ())
    assert why == f"compute capability {capability[0]}.{capability[1]}, compiled for {built}"


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        (227, "one kernel for 64 filters (157 KB) and 96 filters (199 KB) in 227 KB of shared memory"),
        (163, "one kernel for 64 filters (157 KB) in 163 KB of shared memory"),
        (99, "one kernel for no number of filters in 99 KB of shared memory"),
    ],
)
def test_info_says_where_the_first_block_fits(memory, said, monkeypatch):
    if _library.WHY_NOT["cuda"] and not _library.EMULATED:
        pytest.skip(f"no CUDA kernels: {_library.WHY_NOT['cuda']}")
    properties = SimpleNamespace(shared_memory_per_block_optin=memory << 10)
    monkeypatch.setitem(_library.WHY_NOT, "cuda", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(_library, "build_info", lambda: {"CPU kernels": "", "CUDA architectures": "90a"})
    assert choice.describe()["first block on cuda:0"] == said


def test_describe(monkeypatch, kernels):
    assert choice.describe()["our kernels on cpu"].startswith("conv2d, conv2d_relu_lrn_max_pool2d, ")
    monkeypatch.setenv(choice.VARIABLE, "max_pool2d")
    rows = choice.describe()
    assert rows[choice.VARIABLE] == "max_pool2d"
    assert rows["our kernels on cpu"] == "max_pool2d (ALEXNET_CUDA_KERNELS is max_pool2d)"
