"""Batch normalisation in training, with ReLU, on a CPU: parity with torch in float64 and with torch itself."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alexnet_cuda import fusion
from alexnet_cuda._library import KERNEL_DTYPES
from alexnet_cuda.ops.batch_norm import batch_norm

pytestmark = pytest.mark.skipif("cpu" not in KERNEL_DTYPES, reason="no CPU kernels")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def case(shape, dtype=torch.float32, mean=1.0):
    torch.manual_seed(0)
    x = (2 * torch.randn(shape) + mean).to(dtype).contiguous(memory_format=torch.channels_last)
    tensors = [x, torch.rand(shape[1]), torch.randn(shape[1])]
    return [t.requires_grad_() for t in tensors], torch.randn_like(x)


def results(function, tensors, grad, dtype, **options):
    """y, the running averages and the gradients."""
    averages = torch.zeros(tensors[1].shape, dtype=dtype), torch.ones(tensors[1].shape, dtype=dtype)
    y = function(tensors[0], *averages, *tensors[1:], **options)
    return [y, *averages, *torch.autograd.grad(y, tensors, grad.to(y.dtype))]


def torchs(x, mean, var, weight, bias, momentum=0.1, eps=1e-5, relu=False):
    y = F.batch_norm(x, mean, var, weight, bias, True, momentum, eps)
    return y.relu() if relu else y


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(3, 16, 5, 7), (2, 48, 17, 19), (70, 112, 2, 2), (1, 32, 1, 2)])
def test_agrees_with_float64(shape, dtype, relu):
    tensors, grad = case(shape, dtype)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    ours = results(batch_norm, tensors, grad, torch.float32, relu=relu, momentum=0.3, eps=1e-3)
    theirs = results(torchs, doubles, grad.double(), torch.float64, relu=relu, momentum=0.3, eps=1e-3)
    assert ours[0].dtype == dtype
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    for own, other in zip(ours, theirs, strict=True):
        assert (own.double() - other).abs().max() <= TOLERANCE[dtype] * max(1, other.abs().max())


def test_a_large_mean_costs_no_precision():
    tensors, grad = case((4, 32, 20, 20), mean=100.0)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    ours, theirs = results(batch_norm, tensors, grad, torch.float32), results(torchs, doubles, grad, torch.float64)
    for own, other in zip(ours, theirs, strict=True):
        assert (own.double() - other).abs().max() <= 1e-5 * max(1, other.abs().max())  # of the mean in float32


def test_nan_and_infinity_are_as_in_torch():
    tensors, grad = case((2, 48, 6, 6))
    with torch.no_grad():
        tensors[0][0, 3, 1, 1], tensors[0][1, 20, 2, 2] = torch.nan, torch.inf
    ours, theirs = (results(f, tensors, grad, torch.float32, relu=True) for f in (batch_norm, torchs))
    for own, other in zip(ours, theirs, strict=True):
        assert own.isfinite().equal(other.isfinite())


def test_second_derivatives():
    tensors, grad = case((2, 16, 4, 5))
    doubles = [t.detach().double().requires_grad_() for t in tensors]

    def second(function, tensors, dtype):
        first = results(function, tensors, grad.to(dtype).requires_grad_(), dtype, relu=True)
        y = function(tensors[0], *first[1:3], *tensors[1:], relu=True)
        grads = torch.autograd.grad(y, tensors, grad.to(dtype), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)

    pairs = zip(second(batch_norm, tensors, torch.float32), second(torchs, doubles, torch.float64), strict=True)
    for own, other in pairs:
        torch.testing.assert_close(own.double(), other, rtol=1e-4, atol=1e-4)


def test_opcheck_and_compile():
    tensors, grad = case((2, 16, 4, 5))
    op = torch.ops.alexnet_cuda
    torch.library.opcheck(op.batch_norm.default, (*tensors, 1e-5, True))
    _, mean, var = op.batch_norm(*[t.detach() for t in tensors], 1e-5, True)
    saved = [*[t.detach() for t in tensors], mean, var]
    torch.library.opcheck(op._batch_norm_backward.default, (grad, *saved, 1e-5, True))
    compiled = torch.compile(lambda *a: batch_norm(*a, relu=True), fullgraph=True, backend="aot_eager")
    for own, other in zip(results(compiled, tensors, grad, torch.float32),
                          results(torchs, tensors, grad, torch.float32, relu=True), strict=True):  # fmt: skip
        torch.testing.assert_close(own, other)


def test_results_do_not_depend_on_threads():
    tensors, grad = case((9, 48, 31, 33))
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(results(batch_norm, tensors, grad, torch.float32, relu=True))
    torch.set_num_threads(threads)
    assert all(a.equal(b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_what_has_no_kernel_is_torchs():
    for change in (lambda x: x.double(), lambda x: x.contiguous(), lambda x: x[:, :15], lambda x: x[:1, :, :1, :1]):
        (x, weight, bias), _ = case((2, 16, 4, 5))
        x = change(x.detach())
        weight, bias = (t.detach()[: x.shape[1]].to(x.dtype) for t in (weight, bias))
        averages = [torch.zeros_like(weight), torch.ones_like(weight)]
        ours, theirs = copy.deepcopy(averages), copy.deepcopy(averages)
        if x.numel() > x.shape[1]:
            assert batch_norm(x, *ours, weight, bias, relu=True).equal(torchs(x, *theirs, weight, bias, relu=True))
            assert ours[1].equal(theirs[1])
        else:
            with pytest.raises(ValueError, match="more than 1 value"):
                batch_norm(x, *ours, weight, bias)


def test_float64_is_refused_by_the_kernel():
    (x, weight, bias), _ = case((2, 16, 3, 3), torch.float64)
    with pytest.raises(RuntimeError, match="batch_norm: expected float32, float16 or bfloat16, got float64"):
        torch.ops.alexnet_cuda.batch_norm(x.detach(), weight.detach(), bias.detach(), 1e-5, False)


def test_networks_use_it_in_training_alone():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.BatchNorm2d(32), nn.ReLU()).to(memory_format=torch.channels_last)
    plain, x = copy.deepcopy(layers), case((2, 32, 6, 6))[0][0].detach()
    with torch.profiler.profile() as profile:
        y = fusion.run(layers, x)
    assert "alexnet_cuda::batch_norm" in {event.key for event in profile.key_averages()}
    torch.testing.assert_close(y, plain(x))
    torch.testing.assert_close(layers.state_dict(), plain.state_dict())  # running averages and their count
    assert fusion.run(layers.eval(), x).equal(layers(x))
