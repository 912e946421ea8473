"""3x3 and 5x5 convolutions on the CPU, their transposes and weight gradients, against float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import in_layout, memory_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alexnet_cuda import later_layers

pytestmark = pytest.mark.skipif(not later_layers.has_winograd(), reason="no CPU kernels")
_op = torch.ops.alexnet_cuda
# channels, filters, groups, kernel size, padding, height, width: blocks of filters and tiles filled in part
SIZES = [
    (96, 256, 2, 5, 2, 27, 27),
    (32, 48, 1, 3, 1, 13, 13),
    (48, 16, 1, 3, 0, 3, 11),
    (160, 96, 2, 3, 2, 1, 6),
    (16, 80, 1, 5, 4, 1, 1),
    (96, 96, 3, 5, 0, 9, 6),
]


def tensors(images, channels, filters, groups, size, padding, height, width):
    """x, weight, bias and the gradient of the output, small enough for every sum to be of one order."""
    generator = torch.Generator().manual_seed(images * height + filters)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    out = height + 2 * padding - size + 1, width + 2 * padding - size + 1
    return (
        draw(images, channels, height, width).relu(),
        draw(filters, channels // groups, size, size) / size / (channels // groups) ** 0.5,
        draw(filters),
        draw(images, filters, *out),
    )


def close(got, exact):
    """The largest error, not every element's: a tile's numbers share one."""
    result, finite = got
    assert finite
    assert result.shape == exact.shape
    if exact.numel():
        error, scale = (t.abs().max().item() for t in (result - exact, exact))
        assert error <= 5e-6 * scale, f"{error:.2g} of {scale:.2g}"


def check(images, sizes, layout="channels_last"):
    """The convolution, its transpose (the gradient of x) and the weight gradient."""
    _, _, groups, size, padding, *_ = sizes
    x, weight, bias, grad = tensors(images, *sizes)
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    exact = F.conv2d(*leaves, bias.double(), padding=padding, groups=groups)
    grad_x, grad_weight = torch.autograd.grad(exact, leaves, grad.double())
    x, grad = in_layout(x, layout), in_layout(grad, layout)
    got = _op._winograd_conv2d(x, weight, bias, padding, groups, False, False)
    close(got, exact.detach())
    close(_op._winograd_conv2d(x, weight, bias, padding, groups, False, True), exact.detach().relu())
    without = F.conv2d(*(t.detach() for t in leaves), padding=padding, groups=groups)
    close(_op._winograd_conv2d(x, weight, None, padding, groups, False, False), without)
    close(_op._winograd_conv2d(grad, weight, None, padding, groups, True, False), grad_x)
    close(_op._winograd_conv2d_weight_grad(grad, x, size, padding, groups), grad_weight)
    return got[0]


def check_sizes():
    """In a process of its own for another instruction set."""
    for sizes in SIZES:
        check(3, sizes)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("images", [0, 1, 3, 33])
def test_against_float64(images, sizes):
    check(images, sizes)


@pytest.mark.parametrize("sizes", SIZES[:2])
def test_layouts(sizes, layout):
    y = check(2, sizes, layout)
    channels_last = layout in ("channels_last", "offset")
    assert memory_format(y) == (torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_other_instruction_sets(level):
    code = f"import {Path(__file__).stem} as tests; tests.check_sizes()"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "ALEXNET_CUDA_CPU_LEVEL": level}
    run = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    if "does not support" in run.stderr:
        pytest.skip(f"this CPU has no {level}")
    assert run.returncode == 0, run.stderr


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_sizes(data):
    draw = lambda *values: data.draw(st.sampled_from(values))
    size, groups = draw(3, 5), draw(1, 2, 3)
    padding = data.draw(st.integers(0, size - 1))
    least = max(1, size - 2 * padding)
    height, width = (data.draw(st.integers(least, 14)) for _ in range(2))
    channels, filters = (groups * 16 * data.draw(st.integers(1, 5)) for _ in range(2))
    threads = torch.get_num_threads()
    torch.set_num_threads(draw(1, 2, 3))
    try:
        check(data.draw(st.integers(1, 9)), (channels, filters, groups, size, padding, height, width),
              draw("contiguous", "channels_last", "sliced", "permuted"))  # fmt: skip
    finally:
        torch.set_num_threads(threads)


def test_any_number_of_threads_gives_the_same_bits():
    threads, outcomes = torch.get_num_threads(), []
    x, weight, bias, grad = tensors(9, *SIZES[0])
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            outcomes.append((_op._winograd_conv2d(x, weight, bias, 2, 2, False, False)[0],
                             _op._winograd_conv2d_weight_grad(grad, x, 5, 2, 2)[0]))  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in outcomes[1:] for a, b in zip(outcomes[0], other))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e25, -3e38])
def test_numbers_that_are_not_finite_or_huge_are_found(value):
    """Wherever in a tile they are."""
    sizes = 16, 16, 1, 3, 1, 7, 7
    x, weight, bias, grad = tensors(2, *sizes)
    for place in range(49):
        y, c = divmod(place, 7)
        for changed in (x, grad):
            before = changed[1, 5, y, c].clone()
            changed[1, 5, y, c] = value
            if changed is x:
                assert not _op._winograd_conv2d(x, weight, bias, 1, 1, False, False)[1]
            else:
                assert not _op._winograd_conv2d(grad, weight, None, 1, 1, True, False)[1]
            assert not _op._winograd_conv2d_weight_grad(grad, x, 3, 1, 1)[1]
            changed[1, 5, y, c] = before
    assert _op._winograd_conv2d(x, weight, bias, 1, 1, False, False)[1]
    weight[3, 2, 1, 0] = value
    assert not _op._winograd_conv2d(x, weight, bias, 1, 1, False, False)[1]


X, W = torch.zeros(2, 32, 9, 9), torch.zeros(64, 16, 3, 3)
GRAD, REST = torch.zeros(2, 64, 9, 9), (1, 2, False, False)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((X[0], W, None, *REST), "expected x to be 4-D"),
        ((X, W[0], None, *REST), "expected weight to be 4-D"),
        ((X.double(), W.double(), None, *REST), "expected x to be float32"),
        ((X, W.half(), None, *REST), "expected weight to have the same dtype as x"),
        ((X[:, :24], W, None, *REST), "expected groups to cut the 24 channels into multiples of 16, got 2"),
        ((X, W[:24], None, *REST), "expected groups to cut the 24 filters into multiples of 16, got 2"),
        ((X, W, None, 1, 0, False, False), "groups .* got 0"),
        ((X, W[..., 1:, 1:], None, *REST), "expected kernel_size to be 3 or 5, got 2"),
        ((X, W[..., 1:], None, *REST), "weight does not have the size"),
        ((X, W, None, 3, *REST[1:]), r"expected padding to be in \[0, 3\), got 3"),
        ((X, W, None, -1, *REST[1:]), r"expected padding to be in \[0, 3\), got -1"),
        ((X[:, :, :0], W, None, 0, *REST[1:]), "an input of 0x9 is too small"),
        ((X, W[:, :8], None, *REST), "weight does not have the size"),
        ((X, W, None, 1, 2, True, False), "weight does not have the size"),
        ((X, W, torch.zeros(63), *REST), "bias does not have the size"),
        ((X, W, torch.zeros(64).half(), *REST), "expected bias to have the same dtype"),
    ],
)
def test_bad_arguments(args, words):
    with pytest.raises(RuntimeError, match=f"_winograd_conv2d: .*{words}"):
        _op._winograd_conv2d(*args)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((GRAD[0], X, 3, 1, 2), "expected grad to be 4-D"),
        ((GRAD[1:], X, 3, 1, 2), "grad does not have the size"),
        ((GRAD[..., 1:], X, 3, 1, 2), "grad does not have the size"),
        ((GRAD.half(), X, 3, 1, 2), "expected grad to have the same dtype"),
        ((GRAD, X, 4, 1, 2), "expected kernel_size to be 3 or 5, got 4"),
        ((GRAD, X, 3, 1, 4), "expected groups to cut the 32 channels"),
    ],
)
def test_bad_arguments_of_the_weight_gradient(args, words):
    with pytest.raises(RuntimeError, match=f"_winograd_conv2d_weight_grad: .*{words}"):
        _op._winograd_conv2d_weight_grad(*args)
