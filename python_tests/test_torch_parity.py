"""Whatever torch's own modules take: the same results, gradients and errors from our operators, from our modules and
from `accelerate`. ALEXNET_CUDA_PROPERTY_EXAMPLES=10000 draws more examples."""

import copy
import os
import warnings

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from alexnet_cuda import accelerate, nn, ops

EXAMPLES = int(os.environ.get("ALEXNET_CUDA_PROPERTY_EXAMPLES", "150"))
many = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

FLOATING = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OTHERS = [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64]
ROUNDING = {torch.float64: 1e-11, torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LAYOUTS = ["contiguous", "contiguous", "channels_last", "sliced", "transposed", "expanded", "flipped"]
SPECIAL = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e4, -1e4, 1e-4]


# ---- what is drawn -------------------------------------------------------------------------------------------------


def in_layout(x, layout):
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return torch.stack([x, x], -1).flatten(-2)[..., ::2]
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded" and x.dim() and x.shape[0]:
        return x[:1].expand(x.shape)
    if layout == "flipped" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x


@st.composite
def inputs(draw, channels, sides, dims, ties=True):
    """A tensor of `channels`, mostly of the usual number of dimensions; its sides are drawn from `sides`."""
    dim = draw(st.sampled_from(dims))
    channels = channels + draw(st.sampled_from([0] * 19 + [1]))
    planes = [draw(sides) for _ in range(dim - 2)]
    batch = draw(st.sampled_from([0, 1, 2, 3]))
    shape = [batch, channels, *planes] if dim != 3 else [channels, *planes, draw(sides)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    if ties and draw(st.booleans()):
        x = torch.randint(-3, 4, shape, generator=generator).float()
    else:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
    dtype = draw(st.sampled_from(FLOATING * 4 + OTHERS))
    if dtype.is_floating_point and ties:
        x = x * draw(st.sampled_from([1, 1, 1, 1e-3, 100]))
        for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3])) if x.numel() else 0):
            x.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(st.sampled_from(SPECIAL))
    x = in_layout(x.to(dtype), draw(st.sampled_from(LAYOUTS)))
    return x.to(draw(st.sampled_from(["cpu"] * 15 + ["meta" if dim in (3, 4) else "cpu"])))


def one_or_two(values):
    return st.one_of(values, values, st.tuples(values, values), st.tuples(values))


@st.composite
def convolutions(draw):
    """(arguments, keywords, input): AlexNet's first layer, those with a Winograd kernel, and any other."""
    kind = draw(st.sampled_from(["first", "winograd", "any"]))
    two = lambda values: st.one_of(values, values, st.tuples(values, values))
    options = dict(bias=draw(st.booleans()))
    sides = st.integers(0, 9)
    if kind == "first":
        arguments = draw(st.sampled_from([1, 3, 3, 4])), draw(st.integers(1, 20)), 11, 4
        options["padding"], sides = draw(two(st.integers(0, 6))), st.integers(1, 30)
    elif kind == "winograd":
        groups, size = draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([3, 5]))
        arguments = 16 * groups * draw(st.integers(1, 2)), 16 * groups * draw(st.integers(1, 2)), size
        options |= dict(groups=groups, padding=draw(two(st.integers(0, size))))
        sides = st.integers(1, 20)
    else:
        groups = draw(st.sampled_from([1, 1, 2, 3]))
        arguments = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3)), draw(two(st.integers(1, 4)))
        padding = draw(st.one_of(two(st.integers(0, 3)), st.sampled_from(["same", "valid"])))
        mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
        options |= dict(groups=groups, padding=padding, padding_mode=mode)
    if kind == "any" or draw(st.integers(0, 9)) == 0:
        options["dilation"] = draw(two(st.integers(1, 2)))
        arguments = *arguments[:3], draw(two(st.integers(1, 3)))
    return arguments, options, draw(inputs(arguments[0], sides, [4, 4, 4, 3, 2, 5]))


@st.composite
def normalisations(draw):
    size = draw(st.sampled_from([5, 5, 3, 1, 2, 4, 9, 40, 0, -1, 2.5]))
    alpha = draw(st.sampled_from([1e-4, 0.3, 1.0, float(size), -0.1, 0.0]))
    beta, k = draw(st.sampled_from([0.75, 0.5, 1.0, 0.0, 2.0, 0.6, -0.5])), draw(st.sampled_from([1.0, 2.0, 0.0, -1.0]))
    channels = draw(st.sampled_from([1, 2, 5, 16, 17, 33]))
    x = draw(inputs(channels, st.integers(0, 4), [4, 4, 3, 2, 5]))
    return (size, alpha, beta, k), {}, x


@st.composite
def poolings(draw):
    sizes = st.sampled_from([3, 3, 2, 1, 4, 5, 16, 0])
    arguments = draw(one_or_two(sizes)), draw(st.one_of(st.none(), one_or_two(st.integers(0, 4))))
    arguments += (draw(one_or_two(st.sampled_from([0, 0, 1, 1, 2, -1]))),)
    options = dict(ceil_mode=draw(st.booleans()), return_indices=draw(st.booleans()))
    options["dilation"] = draw(st.sampled_from([1, 1, 1, (1, 1), 2, (1, 2)]))
    return arguments, options, draw(inputs(draw(st.integers(0, 20)), st.integers(0, 12), [4, 4, 4, 3, 2, 5]))


# ---- what is compared ----------------------------------------------------------------------------------------------


def outcome(function, x, leaves=()):
    """(results, gradients), or the error."""
    x = x.detach().requires_grad_(x.requires_grad)
    try:
        y = function(x)
    except Exception as error:
        return error
    results = y if isinstance(y, tuple) else (y,)
    wanted = [leaf for leaf in (x, *leaves) if leaf.requires_grad]
    if not results[0].requires_grad or x.is_meta:
        return [*results]
    weights = torch.linspace(-1, 1, results[0].numel(), dtype=torch.float64).view(results[0].shape).to(results[0])
    return [*results, *torch.autograd.grad(results[0], wanted, weights)]


def assert_like_torch(ours, torchs, exact, finite_input):
    """Each element of `ours` is torch's, or as near to `exact`, of float64, as twice torch's error allows, and finite
    where `exact` is within the range of the dtype."""
    errors = tuple(type(error) for error in (torchs, exact) if isinstance(error, Exception))
    if isinstance(torchs, Exception) and not isinstance(ours, Exception) and not isinstance(exact, Exception):
        torchs = exact  # torch's kernel does not take these strides or this dtype, only contiguous float64
    if isinstance(torchs, Exception):
        assert isinstance(ours, errors), f"{ours!r} where torch raises {torchs!r}"
        assert str(ours)
        return
    if isinstance(ours, Exception):
        raise AssertionError(f"an error where torch has a result: {ours!r}") from ours
    assert len(ours) == len(torchs)
    # A gradient may be a small difference of terms as large as the results, so one scale serves all.
    largest = max(
        (c[c.isfinite()].abs().max().item() for c in exact if not c.is_meta and c.isfinite().any()), default=0
    )
    for a, b, c in zip(ours, torchs, exact):
        assert (a.shape, a.device) == (b.shape, b.device)
        assert a.dtype == b.dtype or torchs is exact
        if a.is_meta or not a.dtype.is_floating_point:
            assert a.is_meta or a.equal(b)
            continue
        error, torchs_error = (a.double() - c).abs(), (b.double() - c).abs()
        finite = c.to(a.dtype).isfinite()
        spacing = torch.finfo(a.dtype).smallest_normal * torch.finfo(a.dtype).eps  # of subnormal numbers
        near = error <= 2 * torchs_error.nan_to_num(torch.inf) + max(ROUNDING[a.dtype] * largest, spacing)
        same = (a == b) | (a.isnan() & b.isnan()) | (a.double() == c) | (a.isnan() & c.isnan())
        assert (same | near | ~finite).all(), f"{a} where torch has {b} and float64 {c}"
        # torch's bfloat16 convolution, which serves ours where an input is not finite, spreads NaN to other windows.
        spread = b.isnan() & (not finite_input)
        assert (a.isfinite() | ~finite | spread).all(), f"{a} where float64 has {c}"


def check(stock, others, x, needs):
    """Each of `others` beside the module `stock`, with gradients where `needs` says so."""
    floating = x.dtype.is_floating_point
    x = x.detach().requires_grad_(needs and floating)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchs = outcome(stock, x, stock.parameters())
        exact_x = x.detach().double().contiguous().requires_grad_(x.requires_grad) if floating else x
        exact_module = copy.deepcopy(stock).double() if floating else stock
        exact = outcome(exact_module, exact_x, exact_module.parameters())
        for other, leaves in others:
            assert_like_torch(outcome(other, x, leaves), torchs, exact, x.is_meta or bool(x.isfinite().all()))


def built(ours, stock, arguments, options):
    """(torch's module, ours), or None where both refuse the arguments with the same type of error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = stock(*arguments, **options)
        except Exception as error:
            with pytest.raises(type(error)):
                ours(*arguments, **options)
            return None
        return module, ours(*arguments, **options)


def columns(convolution, x):
    """The width of its output, where it has one."""
    try:
        return copy.deepcopy(convolution).to("meta", torch.float32)(x.to("meta", torch.float32)).shape[-1]
    except Exception:  # of an input that does not fit
        return 0


@many
@given(convolutions(), st.sampled_from([True, True, False]), st.booleans(), st.integers(0, 19))
def test_conv2d(case, needs, trained, other):
    arguments, options, x = case
    torch.manual_seed(0)
    if (pair := built(nn.Conv2d, torch.nn.Conv2d, arguments, options)) is None:
        return
    stock, own = pair
    own.load_state_dict(stock.state_dict())
    dtype = torch.float32 if other == 0 or not x.dtype.is_floating_point else x.dtype
    assume((x.numel() and not x.is_meta) or x.dtype == dtype)  # torch looks at no dtype where it does not multiply
    # Two faults of torch's kernels, which serve ours there. A half-precision convolution crashes that is dilated along
    # an axis of one pixel: Conv2d(1, 1, (1, 2), 2, (0, 3), (1, 2)).half() of one pixel. In bfloat16 an output one
    # column wide has wrong rows where the stride is 2: Conv2d(3, 1, 5, (1, 2)) of 12x5 pixels.
    half = dtype in (torch.float16, torch.bfloat16)
    assume(not half or all(size > 1 or step == 1 for size, step in zip(x.shape[-2:], stock.dilation, strict=False)))
    assume(dtype != torch.bfloat16 or columns(stock, x) != 1 or stock.stride[1] == 1)
    modules = [m.to(x.device, dtype).requires_grad_(trained) for m in (stock, own, accelerate(stock))]
    others = [(m, m.parameters()) for m in modules[1:]]
    if stock.padding_mode == "zeros" and stock.dilation == (1, 1):
        weights = stock.weight, stock.bias
        function = lambda x: ops.conv2d(x, *weights, stock.stride, stock.padding, groups=stock.groups)
        others.append((function, [w for w in weights if w is not None]))
    check(stock, [(f, list(leaves)) for f, leaves in others], x, needs)


@many
@given(normalisations(), st.sampled_from([True, True, False]))
def test_local_response_norm(case, needs):
    arguments, options, x = case
    # torch looks at no size where there is nothing to normalise, or where it has failed at the strides before.
    assume(arguments[0] in range(1, 41) or (x.numel() and x.is_contiguous()))
    stock, own = built(nn.LocalResponseNorm, torch.nn.LocalResponseNorm, arguments, options)
    function = lambda x: ops.local_response_norm(x, *arguments)
    check(stock, [(f, ()) for f in (own, accelerate(stock), function)], x, needs)


@many
@given(poolings(), st.sampled_from([True, True, False]))
def test_max_pool2d(case, needs):
    arguments, options, x = case
    stock, own = built(nn.MaxPool2d, torch.nn.MaxPool2d, arguments, options)
    others = [own, accelerate(stock)]
    if options.pop("dilation") in (1, (1, 1)):
        others.append(lambda x: ops.max_pool2d(x, *arguments, **options))
    check(stock, [(f, ()) for f in others], x, needs)


@st.composite
def networks(draw):
    """Two or three layers with what is usual between them, and images that fit them."""
    channels = 3
    first = torch.nn.Conv2d(3, draw(st.sampled_from([8, 16, 32])), 11, 4, draw(st.integers(0, 3)))
    layers, channels = [first, torch.nn.ReLU(inplace=draw(st.booleans()))], first.out_channels
    for kind in draw(st.lists(st.sampled_from(["lrn", "pool", "conv"]), min_size=1, max_size=3)):
        if kind == "lrn":
            layers.append(torch.nn.LocalResponseNorm(draw(st.integers(1, 6)), 0.2, draw(st.sampled_from([0.5, 0.75]))))
        elif kind == "pool":
            layers.append(torch.nn.MaxPool2d(3, draw(st.integers(1, 2)), 1, ceil_mode=draw(st.booleans())))
        else:
            filters = draw(st.sampled_from([16, 24, 32]))
            layers.append(torch.nn.Conv2d(channels, filters, draw(st.sampled_from([3, 5])), padding=2))
            channels = filters
    x = draw(inputs(3, st.integers(11, 60), [4], ties=False))
    return torch.nn.Sequential(*layers), x


@many
@given(networks(), st.sampled_from([True, False]))
def test_small_networks(case, needs):
    """In float64 with gradients: elsewhere rounding may choose between the maxima of a window."""
    network, x = case
    if x.dtype.is_floating_point:
        network = network.to(x.device, x.dtype)
    network.requires_grad_(needs and x.dtype == torch.float64)
    ours = accelerate(network)
    check(network, [(ours, list(ours.parameters()))], x, needs and x.dtype == torch.float64)
