import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, assert_derivatives, assert_matches, exact_lrn, in_layout, memory_format

from alexnet_cuda import ops, reference
from alexnet_cuda._library import build_info, has_kernel
from alexnet_cuda.nn import LocalResponseNorm

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
    ((1, 40, 3, 3), dict(size=5, alpha=0.3, groups=2)),
    ((2, 12, 3, 5), dict(size=5, alpha=0.3, groups=2)),
    ((1, 10, 3, 2), dict(size=4, alpha=0.5, beta=0.6, k=1.5, window="onnx")),
    ((1, 70, 2, 3), dict(size=3, alpha=0.5, beta=0.5, groups=2)),
    ((1, 4, 2, 2), dict(size=1, alpha=0.5)),
    ((1, 20, 2, 3), dict(size=1001, alpha=50.0)),
    ((1, 20, 2, 3), dict(size=18, alpha=0.5, beta=0.6, groups=2, window="onnx")),
]


@pytest.mark.parametrize(("shape", "args"), CASES, ids=str)
def test_matches_float64(shape, args, dtype, layout, device):
    x = in_layout(torch.randn(shape, device=device).to(dtype), layout)
    function = lambda x: ops.local_response_norm(x, **args)
    also = [lambda x: reference.local_response_norm(x, **args)]
    y, (gx,) = assert_matches(function, lambda x: exact_lrn(x, **args), [x], also=also)
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
    permuted = x.movedim(-1, 2)
    torch.testing.assert_close(ops.local_response_norm(permuted, 5, 0.1), y.movedim(-1, 2))


@pytest.mark.parametrize("largest", [300.0, 65504.0])
def test_half_does_not_overflow(largest, device):
    x = torch.full((1, 96, 3, 3), largest, dtype=torch.float16, device=device)
    assert_matches(lambda x: ops.local_response_norm(x, 5), lambda x: exact_lrn(x, 5), [x])


def test_special_values(device):
    x = torch.randn(1, 9, 2, 2, device=device)
    x[0, 4, 0, 0] = torch.nan
    x[0, 4, 0, 1] = torch.inf
    torch.testing.assert_close(ops.local_response_norm(x, 5), F.local_response_norm(x, 5), equal_nan=True)
    zeros = torch.zeros(1, 4, 2, 2, device=device)
    assert ops.local_response_norm(zeros, 3, k=0.0).isnan().all()  # 0 / 0, as in torch
    assert (ops.local_response_norm(zeros, 3) == 0).all()


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_without_k(format, device):
    """Windows of zeros are NaN, those that reach over the edge too, and no other elements are."""
    x = torch.full((1, 16, 1, 2), 65504.0, dtype=torch.float16, device=device)
    x[:, 4:] = 0
    y = ops.local_response_norm(x.to(memory_format=format), 5, 1.0, k=0.0)
    assert y[:, :4].isfinite().all()
    assert y[:, 6:].isnan().all()
    x = torch.randn(1, 16, 1, 2, device=device)
    x[:, :2] = x[:, 14:] = 0
    functions = (lambda x, m=m: m.local_response_norm(x, 5, 1.0, k=0.0) for m in (ops, reference))
    assert_matches(*functions, [x.to(memory_format=format)])


@pytest.mark.skipif("avx512" not in build_info()["CPU kernels"], reason="AVX2's estimate of 1/sqrt takes them for 0")
def test_subnormal_sums_without_k():
    x = torch.full((1, 16, 2, 2), 1e-20)
    expected = F.local_response_norm(x, 5, 1.0, k=0.0)
    torch.testing.assert_close(ops.local_response_norm(x, 5, 1.0, k=0.0), expected, rtol=1e-4, atol=0)


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("args", [c[1] for c in CASES[3:12]], ids=str)
def test_gradients(args, device):
    assert_derivatives(lambda x: ops.local_response_norm(x, **args), [(2, 6, 3, 3)])


def test_converters():
    x = torch.randn(2, 12, 5, 5)
    assert_close(LocalResponseNorm.from_tensorflow()(x), exact_lrn(x, 11, 1.0, 0.5, 1.0, divide_alpha=False))
    within = LocalResponseNorm.from_caffe(5, 1e-4, 0.75, "WITHIN_CHANNEL")
    assert_close(within(x), exact_lrn(x, 5, 1e-4, 0.75, 1.0, across="spatial"))
    assert_close(LocalResponseNorm.from_onnx(4, 0.5)(x), exact_lrn(x, 4, 0.5, window="onnx"))
    with pytest.raises(ValueError, match=r"from_caffe.*odd, got 4"):
        LocalResponseNorm.from_caffe(4)
    with pytest.raises(ValueError, match=r"norm_region.*got 'channels'"):
        LocalResponseNorm.from_caffe(norm_region="channels")
