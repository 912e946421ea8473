"""torch's own samples and error inputs of the operators that ours take the place of, run on ours."""

import pytest
import torch
from helpers import assert_all_close

from alexnet_cuda import ops

pytest.importorskip("expecttest", reason="torch's list of operators needs it")
with pytest.MonkeyPatch.context() as patch:  # else no later test of the process could set flags, as Lightning does
    patch.setattr(torch.backends, "disable_global_flags", lambda: None)
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.opinfo.core import SampleInput


def conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    assert dilation == 1
    return ops.conv2d(x, weight, bias, stride, padding, groups=groups)


def max_pool2d(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    assert dilation == 1
    return ops.max_pool2d(x, kernel_size, stride, padding, ceil_mode, return_indices)


OURS = {
    "nn.functional.conv2d": conv2d,
    "nn.functional.max_pool2d": max_pool2d,
    "nn.functional.local_response_norm": ops.local_response_norm,
}
INFOS = [info for info in op_db if info.name in OURS]


def run(function, sample):
    """(results, gradients) of a sample, or its error."""
    tensors = [t.detach().clone() if isinstance(t, torch.Tensor) else t for t in (sample.input, *sample.args)]
    leaves = [t.requires_grad_() for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
    try:
        y = function(*tensors, **sample.kwargs)
    except Exception as error:
        return error
    results = y if isinstance(y, tuple) else (y,)
    return [*results, *(torch.autograd.grad(results[0].sum(), leaves) if leaves and results[0].requires_grad else [])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_samples(info, dtype):
    """A type that torch does not take is the same type of error."""
    samples = [sample for sample in info.sample_inputs("cpu", dtype) if sample.kwargs.get("dilation", 1) == 1]
    assert len(samples) >= 10
    for sample in samples[:: 1 + len(samples) // 100]:  # of pooling there are many
        torchs, ours = run(info.op, sample), run(OURS[info.name], sample)
        if isinstance(torchs, Exception):
            assert isinstance(ours, type(torchs)), (ours, torchs, sample)
        else:
            assert_all_close(ours, torchs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("info", [info for info in INFOS if info.error_inputs_func], ids=lambda info: info.name)
def test_error_inputs(info):
    for case in info.error_inputs("cpu"):
        if case.sample_input.kwargs.get("dilation", 1) == 1:
            torchs, ours = (run(function, case.sample_input) for function in (info.op, OURS[info.name]))
            assert isinstance(torchs, Exception)
            assert isinstance(ours, type(torchs)), (ours, torchs)


@pytest.mark.parametrize("bias", [None, torch.ones(2)], ids=["", "bias"])
def test_a_convolution_of_booleans_is_torchs_own_error(bias):
    sample = SampleInput(torch.ones(1, 3, 12, 12, dtype=torch.bool), args=(torch.ones(2, 3, 3, 3), bias))
    torchs, ours = run(torch.nn.functional.conv2d, sample), run(conv2d, sample)
    assert (type(ours), str(ours)) == (type(torchs), str(torchs))
