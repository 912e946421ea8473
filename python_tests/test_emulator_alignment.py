"""Inputs that start one or two elements behind an aligned address, as slices of larger tensors may, for every kernel:
the emulator reports wide accesses to addresses that are no multiples of their width."""

import pytest
import test_emulator as whole
import test_emulator_block as block
import test_emulator_conv2d as conv
from test_emulator import DTYPES, _emulator, layouts

from alexnet_cuda import reference


def cases():
    """The tests of these kernels, each with its first case."""
    for dtype in DTYPES:
        yield whole.test_local_response_norm, (*whole.LRN[0].values, dtype)
        yield whole.test_max_pool2d, (*whole.POOL[0].values, "special", dtype)
        for order in reference.ORDERS:
            yield whole.test_relu_lrn_max_pool2d, (*whole.TAIL[0].values, order, dtype)
    for dtype in ("float32", "tf32", "float16", "bfloat16"):
        for test in (conv.test_conv2d, conv.test_conv2d_weight_grad, conv.test_conv2d_input_grad):
            yield test, (*conv.CONV[0].values, dtype)
    for dtype in DTYPES[1:]:
        yield block.test_block, (*block.BLOCK[1].values, dtype)


@pytest.fixture(params=[1, 2])
def offset(request):
    _emulator.set_offset(request.param)
    yield
    _emulator.set_offset(0)


@pytest.mark.usefixtures("offset")
@layouts
@pytest.mark.parametrize(("test", "arguments"), list(cases()), ids=lambda value: getattr(value, "__name__", "")[5:])
def test_unaligned(test, arguments, channels_last):
    test(*arguments, channels_last)
