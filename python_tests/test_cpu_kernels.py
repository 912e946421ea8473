"""What only the CPU kernels have: instruction-set levels, threads and forked workers."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import forward_and_gradients
from test_winograd_conv2d import check_sizes
from torch.utils.data import DataLoader

from alexnet_cuda import ops, reference

pytestmark = pytest.mark.usefixtures("kernels")

# Sizes that leave vectors, blocks of channels and rows partly filled at every level.
SHAPES = [(2, 96, 13, 19), (1, 5, 7, 3), (3, 50, 17, 21)]
LRN = {"size": 5, "alpha": 0.1, "k": 2.0}


def cases():
    """(op, inputs, arguments) of every op in both layouts."""
    torch.manual_seed(0)
    for shape in SHAPES:
        for fmt in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape).to(memory_format=fmt)
            image = torch.randn(shape[0], 3, 47, 59).to(memory_format=fmt)
            filters = torch.randn(shape[1], 3, 11, 11) / 20, torch.randn(shape[1])
            yield "local_response_norm", (x,), LRN
            yield "local_response_norm", (x,), {"size": 4, "alpha": 0.1, "beta": 0.6, "across": "spatial"}
            yield "max_pool2d", (x,), {}
            yield "relu_lrn_max_pool2d", (x,), LRN
            yield "relu_lrn_max_pool2d", (x,), {**LRN, "order": "relu-pool-lrn", "ceil_mode": True}
            yield "conv2d", (image, *filters), {"padding": 2}
            wide = torch.randn(9, 32, 13, 15).to(memory_format=fmt), torch.randn(64, 16, 5, 5) / 20, torch.randn(64)
            yield "conv2d", wide, {"stride": 1, "padding": 2, "groups": 2}
            yield "conv2d_relu_lrn_max_pool2d", (image, *filters), LRN


def test_one_image_keeps_its_strides():
    """Not only its layout, which says nothing of the batch's stride: torch's next layer goes by the strides."""
    for name, inputs, arguments in cases():
        x = inputs[0][:1].clone()
        fmt = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        y = getattr(ops, name)(x, *inputs[1:], **arguments)
        assert y.stride() == torch.empty(y.shape, memory_format=fmt).stride(), name


@pytest.mark.parametrize(("name", "arguments"), [("local_response_norm", LRN), ("max_pool2d", {})])
def test_large_results_are_those_of_parts(name, arguments):
    """32 MiB are written past the caches, half of that is not."""

    def run(x):
        y, (grad,) = forward_and_gradients(partial(getattr(ops, name), **arguments), [x])
        return y, grad

    x = torch.randn(8, 256, 64, 64).to(memory_format=torch.channels_last)
    for whole, *parts in zip(run(x), *map(run, x.chunk(2))):
        assert torch.equal(whole, torch.cat(parts))


def results(module, given=None):
    """The output and the gradients of every case."""
    for name, inputs, arguments in given or list(cases()):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = getattr(module, name)(*leaves, **arguments)
        yield name, [y.detach(), *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).view(y.shape))]


def check_against_reference():
    """Run in a process of its own, since the level is chosen once."""
    for (name, ours), (_, expected) in zip(results(ops), results(reference)):
        for a, b in zip(ours, expected):
            tolerance = 2e-5 * max(1.0, b.abs().max().item())
            torch.testing.assert_close(a, b, rtol=2e-5, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
    check_sizes()


def run_level(level):
    code = f"import {Path(__file__).stem} as tests; tests.check_against_reference()"
    environment = {**os.environ, "ALEXNET_CUDA_CPU_LEVEL": level}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True).stderr


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_every_level_agrees_with_the_reference(level):
    error = run_level(level)
    if "does not support" in error:
        pytest.skip(f"this CPU has no {level}")
    assert "Error" not in error, error


def test_unknown_level_is_refused():
    assert "expected baseline, avx2 or avx512, got avx1024" in run_level("avx1024")


def test_any_number_of_threads_gives_the_same_bits():
    before = torch.get_num_threads()
    outcomes = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outcomes.append([t for _, tensors in results(ops) for t in tensors])
    finally:
        torch.set_num_threads(before)
    for other in outcomes[1:]:
        assert all(map(torch.equal, outcomes[0], other))


def pooled(images):
    return ops.relu_lrn_max_pool2d(torch.stack(images), 5)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_use_the_kernels_after_the_parent_did(method, workers):
    images = list(torch.randn(8, 96, 27, 27))  # enough work for every thread of the parent
    expected = pooled(images)
    loader = DataLoader(images, 4, num_workers=workers, collate_fn=pooled, multiprocessing_context=method, timeout=120)
    assert torch.equal(torch.cat(list(loader)), expected)


def test_python_threads_at_the_same_time():
    given = list(cases())
    expected = list(results(ops, given))
    with ThreadPoolExecutor(4) as pool:
        for outcome in pool.map(lambda _: list(results(ops, given)), range(8)):
            for (name, tensors), (_, others) in zip(expected, outcome, strict=True):
                assert all(map(torch.equal, tensors, others)), name
