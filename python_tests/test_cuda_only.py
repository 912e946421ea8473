"""What only a GPU can show: streams, graphs, memory that is not zero, several devices, batches beyond 2^31 elements.

Without a GPU nothing is collected from this file.
"""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from helpers import assert_close

from alexnet_cuda.check import CASES

__test__ = torch.cuda.is_available()
DEVICE = "cuda"
OWN = {case.op: case for case in reversed(CASES) if not case.small and case.shape[0] != 256}  # AlexNet's first of each
FORMATS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs_of(case, dtype, memory_format=torch.contiguous_format):
    x, *weights = case.inputs(dtype)
    return [t.to(DEVICE) for t in (x.contiguous(memory_format=memory_format), *weights)]


def fixed(y):
    """A gradient of y: random numbers, the same at every call."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)


def run(case, inputs, grad=None):
    """The output where nothing is saved for backward, the output where it is, then the gradients of all inputs."""
    with torch.no_grad():
        inference = case.call(*inputs)
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = case.call(*leaves)
    return [inference, y.detach(), *torch.autograd.grad(y, leaves, fixed(y) if grad is None else grad)]


@pytest.fixture(params=product(OWN, DTYPES, FORMATS), ids=str)
def kernel(request):
    """(case, its inputs, their results)"""
    op, dtype, memory_format = request.param
    inputs = inputs_of(OWN[op], dtype, memory_format)
    return OWN[op], inputs, run(OWN[op], inputs)


def same(a, b):
    assert [(s != t).sum().item() for s, t in zip(a, b, strict=True)] == [0] * len(a)


def test_bit_identical(kernel):
    case, inputs, first = kernel
    same(first[:1], first[1:2])
    same(first, run(case, inputs))
    torch.use_deterministic_algorithms(True)
    try:
        same(first, run(case, inputs))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_memory_that_is_not_zero(case):
    """Bytes 0xff, NaN in every dtype, in the blocks that the allocator hands out next to outputs and workspaces."""
    inputs = inputs_of(case, torch.bfloat16)
    first = run(case, inputs)
    torch.cuda.empty_cache()
    sizes = [first[0].numel(), *(t.nbytes for t in first), *(1 << k for k in range(9, 25))]
    blocks = [torch.full((size,), 255, dtype=torch.uint8, device=DEVICE) for size in 3 * sizes]
    del blocks
    same(first, run(case, inputs))


def test_current_stream(kernel):
    """Inputs arrive late on another stream: work on the default stream would read zeros."""
    case, inputs, first = kernel
    late = [torch.zeros_like(x) for x in inputs]
    busy = torch.randn(4096, 4096, device=DEVICE)
    grad = fixed(first[0])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(20):
            busy = busy @ busy * 1e-3
        for a, b in zip(late, inputs):
            a.copy_(b)
        got = run(case, late, grad)
    torch.cuda.synchronize()
    same(first, got)


def test_graph_capture(kernel):
    case, inputs, first = kernel
    static = [torch.zeros_like(x) for x in inputs]
    grad = fixed(first[0])
    with torch.cuda.stream(torch.cuda.Stream()):
        run(case, static, grad)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        got = run(case, static, grad)
    for a, b in zip(static, inputs):
        a.copy_(b)
    captured.replay()
    torch.cuda.synchronize()
    same(first, got)


if torch.cuda.device_count() > 1:

    def test_on_another_device(kernel):
        """The same bits on a device that is not the current one."""
        case, inputs, first = kernel
        same(first, [t.to(DEVICE) for t in run(case, [t.to("cuda:1") for t in inputs])])


@pytest.mark.parametrize(("op", "dtype", "memory_format"), product(OWN, DTYPES, FORMATS), ids=str)
def test_many_images(op, dtype, memory_format):
    """More images than an H100 has multiprocessors, against float64."""
    case = replace(OWN[op], images=133)
    inputs = inputs_of(case, dtype, memory_format)
    results = run(case, inputs)
    wide = [x.double().requires_grad_() for x in inputs]
    exact = case.exact(dtype, *wide)
    for result in results[:2]:
        assert_close(result, exact.detach())
    if "lrn_max_pool" not in op:  # elsewhere rounding may choose another maximum of a window
        for got, want in zip(results[2:], torch.autograd.grad(exact, wide, fixed(results[1]).double())):
            assert_close(got, want)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("op", OWN)
def test_huge_batches(op, memory_format):
    """Offsets beyond 2^31 elements: the first and last images of the batch, against the same images alone."""
    case, dtype = OWN[op], torch.bfloat16
    n = (1 << 31) // math.prod(case.shape) + 6
    x, *weights = inputs_of(replace(case, images=3), dtype, memory_format)
    few = run(case, [x, *weights])
    needed = 4 * n * (x[0].nbytes + 3 * few[0][0].nbytes)  # x, outputs, their gradients, workspaces
    if needed > torch.cuda.mem_get_info()[0]:
        pytest.skip(f"needs {needed >> 30} GiB of free memory")
    many = torch.zeros(n, *case.shape, dtype=dtype, device=DEVICE).contiguous(memory_format=memory_format)
    many[:3] = many[-3:] = x
    leaves = [t.requires_grad_() for t in (many, *weights)]
    with torch.no_grad():
        inference = case.call(*leaves)[-3:].clone()
    y = case.call(*leaves)
    grad = torch.zeros_like(y)
    grad[-3:] = fixed(few[0])
    dx, *gradients = torch.autograd.grad(y, leaves, grad)
    same([y[-3:], y[-3:]], [y[:3], inference])
    assert not dx[:-3].any(), "a gradient reached an image that has none"
    assert_close(y[-3:].detach(), few[0].double())
    for got, want in zip([dx[-3:], *gradients], few[2:]):  # the weight's are sums over another number of slices
        assert (got.double() - want.double()).norm() <= 0.01 * want.double().norm()
    del many, y, grad, dx, leaves, gradients
    torch.cuda.empty_cache()
