import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, forward_and_gradients, in_layout, memory_format, saved_bytes

from alexnet_cuda import ops, reference
from alexnet_cuda._library import build_info, has_kernel
from alexnet_cuda.nn import LocalResponseNorm


def exact(x, size, alpha=1e-4, beta=0.75, k=1.0, *, groups=1, divide_alpha=True, window="torch", across="channels"):
    """The formula element by element, in float64."""
    x = x.double().cpu()
    front = size // 2 if window == "torch" else (size - 1) // 2
    sums = torch.zeros_like(x)
    if across == "channels":
        width = x.shape[1] // groups
        for c in range(x.shape[1]):
            first = c - c % width
            low, high = max(first, c - front), min(first + width, c - front + size)
            sums[:, c] = (x[:, low:high] ** 2).sum(1)
    else:
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                rows = slice(max(0, i - front), i - front + size)
                columns = slice(max(0, j - front), j - front + size)
                sums[:, :, i, j] = (x[:, :, rows, columns] ** 2).sum((2, 3))
    elements = size if across == "channels" else size * size
    return x / (k + alpha / (elements if divide_alpha else 1) * sums) ** beta


CASES = [
    ((2, 96, 13, 13), dict(size=5, alpha=1e-4, k=2.0)),
    ((2, 96, 5, 7), dict(size=5, alpha=0.5, k=2.0, groups=2)),
    ((1, 10, 3, 17), dict(size=3, alpha=2.0, beta=1.0)),
    ((3, 7, 4, 3), dict(size=4, alpha=1.0, beta=0.5)),
    ((3, 7, 4, 3), dict(size=4, alpha=1.0, beta=0.6, window="onnx")),
    ((2, 6, 5, 5), dict(size=2, alpha=0.3, groups=3, window="onnx")),
    ((2, 24, 6, 5), dict(size=11, alpha=1.0, beta=0.5, divide_alpha=False)),
    ((1, 3, 2, 2), dict(size=16, alpha=1.0)),
    ((2, 1, 3, 3), dict(size=5, alpha=1.0)),
    ((2, 5, 9, 8), dict(size=5, alpha=1e-3, across="spatial")),
    ((2, 3, 4, 5), dict(size=4, alpha=1.0, beta=1.5, across="spatial")),
    ((2, 3, 4, 5), dict(size=4, alpha=1.0, across="spatial", window="onnx")),
]


@pytest.mark.parametrize(("shape", "args"), CASES, ids=str)
def test_matches_float64(shape, args, dtype, layout, device):
    x = in_layout(torch.randn(shape, device=device).to(dtype), layout)
    grad = torch.randn(shape).to(dtype).double()
    y, (gx,) = forward_and_gradients(lambda x: ops.local_response_norm(x, **args), [x], grad)
    want, (want_gx,) = forward_and_gradients(lambda x: exact(x, **args), [x.double().cpu()], grad)
    assert y.dtype == dtype
    assert_close(y, want)
    assert_close(gx, want_gx)
    assert_close(reference.local_response_norm(x, **args), want)
    if layout in ("contiguous", "channels_last") and has_kernel(x):
        assert memory_format(y) == memory_format(gx) == memory_format(x)


@pytest.mark.parametrize("size", range(1, 8))
def test_is_torchs(size, device):
    x = torch.randn(2, 9, 4, 5, device=device)
    torch.testing.assert_close(ops.local_response_norm(x, size, 0.1), F.local_response_norm(x, size, 0.1))


@pytest.mark.parametrize(
    "shape", [(3, 8, 11), (2, 8, 3, 4, 5), (2, 8, 3, 1, 2, 2), (0, 8, 5, 5), (2, 8, 0, 5)], ids=str
)
def test_other_shapes(shape, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    y = ops.local_response_norm(x, 5, 0.1)
    torch.testing.assert_close(y, reference.local_response_norm(x, 5, 0.1))
    y.sum().backward()
    assert x.grad.shape == shape


def test_permuted_5d(device):
    x = torch.randn(2, 8, 3, 4, 5, device=device).permute(0, 1, 4, 2, 3)
    torch.testing.assert_close(ops.local_response_norm(x, 5), F.local_response_norm(x.contiguous(), 5))


@pytest.mark.parametrize("largest", [300.0, 6e4])
def test_half_does_not_overflow(largest, device):
    x = torch.full((1, 96, 3, 3), largest, dtype=torch.float16, device=device, requires_grad=True)
    y = ops.local_response_norm(x, 5)
    y.sum().backward()
    want, (want_gx,) = forward_and_gradients(lambda x: exact(x, 5), [x.double().cpu()], torch.ones(1, 96, 3, 3))
    assert_close(y, want)
    assert_close(x.grad, want_gx)


def test_special_values(device):
    x = torch.randn(1, 9, 2, 2, device=device)
    x[0, 4, 0, 0] = torch.nan
    x[0, 4, 0, 1] = torch.inf
    torch.testing.assert_close(ops.local_response_norm(x, 5), F.local_response_norm(x, 5), equal_nan=True)
    zeros = torch.zeros(1, 4, 2, 2, device=device)
    assert ops.local_response_norm(zeros, 3, k=0.0).isnan().all()  # 0 / 0, as in torch
    assert (ops.local_response_norm(zeros, 3) == 0).all()


@pytest.mark.skipif("avx512" not in build_info()["CPU kernels"], reason="AVX2's estimate of 1/sqrt takes them for 0")
def test_subnormal_sums_without_k():
    x = torch.full((1, 16, 2, 2), 1e-20)
    expected = F.local_response_norm(x, 5, 1.0, k=0.0)
    torch.testing.assert_close(ops.local_response_norm(x, 5, 1.0, k=0.0), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("args", [c[1] for c in CASES[3:]], ids=str)
def test_gradients(args, device):
    if device == "cuda":
        pytest.skip("float64 has no CUDA kernel")
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.local_response_norm(x, **args), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: ops.local_response_norm(x, **args), x)


def test_opcheck(device, kernels):
    for format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 6, 4, 5, device=device).contiguous(memory_format=format).requires_grad_()
        args = (5, 2, 1e-2, 0.75, 2.0, 1, False)
        torch.library.opcheck(torch.ops.alexnet_cuda.local_response_norm.default, (x, *args))
        torch.library.opcheck(
            torch.ops.alexnet_cuda._local_response_norm_backward.default, (torch.randn_like(x), x, *args)
        )


def test_compile(device):
    x = torch.randn(2, 6, 4, 5, device=device, requires_grad=True)
    compiled = torch.compile(lambda x: ops.local_response_norm(x, 5, 0.1).square().sum(), fullgraph=True)
    (got,) = torch.autograd.grad(compiled(x), x)
    (want,) = torch.autograd.grad(ops.local_response_norm(x, 5, 0.1).square().sum(), x)
    torch.testing.assert_close(got, want)


def test_vmap_and_func_grad(device):
    x = torch.randn(3, 2, 6, 4, 5, device=device)
    function = lambda x: ops.local_response_norm(x, 5, 0.1)
    torch.testing.assert_close(torch.vmap(function)(x), torch.stack([function(one) for one in x]))
    gradient = torch.func.grad(lambda x: function(x).square().sum())
    torch.testing.assert_close(torch.vmap(gradient)(x), torch.stack([gradient(one) for one in x]))


def test_autocast_keeps_half(device):
    with torch.autocast(device, torch.bfloat16):
        assert ops.local_response_norm(torch.randn(1, 8, 4, 4, device=device).bfloat16(), 5).dtype == torch.bfloat16


def test_saves_only_its_input(device, kernels):
    x = torch.randn(2, 96, 13, 13, device=device, requires_grad=True)
    assert saved_bytes(lambda x: ops.local_response_norm(x, 5), x) == x.nbytes
    with torch.no_grad():
        assert saved_bytes(lambda x: ops.local_response_norm(x, 5), x) == 0


def test_deterministic(device):
    x = torch.randn(4, 96, 13, 13, device=device, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [torch.autograd.grad(ops.local_response_norm(x, 5).square().sum(), x)[0] for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert runs[0].equal(runs[1])
    assert runs[0].equal(runs[2])


@pytest.mark.parametrize(
    ("x", "args", "error", "words"),
    [
        (torch.zeros(4, 4), dict(size=5), ValueError, "x.*3-D.*got 2-D"),
        (torch.zeros(1, 4, 4), dict(size=5, across="spatial"), ValueError, "x.*4-D.*got 3-D"),
        (torch.zeros(1, 4, 4, 4), dict(size=0), ValueError, "size.*got 0"),
        (torch.zeros(1, 4, 4, 4), dict(size=2.5), ValueError, "size.*got 2.5"),
        (torch.zeros(1, 4, 4, 4), dict(size=5, groups=3), ValueError, "groups.*4 channels.*got 3"),
        (torch.zeros(1, 4, 4, 4), dict(size=5, window="left"), ValueError, "window.*got 'left'"),
        (torch.zeros(1, 4, 4, 4), dict(size=5, across="rows"), ValueError, "across.*got 'rows'"),
        (torch.zeros(1, 4, 4, 4, dtype=torch.int64), dict(size=5), TypeError, "x.*floating.*got torch.int64"),
        ([1.0], dict(size=5), TypeError, "x.*Tensor.*got list"),
    ],
)
@pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])
def test_bad_input(x, args, error, words, module):
    with pytest.raises(error, match=f"local_response_norm: expected {words}"):
        module.local_response_norm(x, **args)


def test_converters():
    x = torch.randn(2, 12, 5, 5)
    assert_close(LocalResponseNorm.from_tensorflow()(x), exact(x, 11, 1.0, 0.5, 1.0, divide_alpha=False))
    assert_close(
        LocalResponseNorm.from_caffe(5, 1e-4, 0.75, "WITHIN_CHANNEL")(x),
        exact(x, 5, 1e-4, 0.75, 1.0, across="spatial"),
    )
    assert_close(LocalResponseNorm.from_onnx(4, 0.5)(x), exact(x, 4, 0.5, window="onnx"))
    with pytest.raises(ValueError, match=r"from_caffe.*odd, got 4"):
        LocalResponseNorm.from_caffe(4)
    with pytest.raises(ValueError, match=r"norm_region.*got 'channels'"):
        LocalResponseNorm.from_caffe(norm_region="channels")
