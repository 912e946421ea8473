"""Consecutive layers of a network that one operator computes.

The modules are looked at in every call, so a layer that was replaced or has got a hook is always seen.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from . import ops
from .nn import Conv2d, LocalResponseNorm, MaxPool2d, geometry
from .ops.batch_norm import batch_norm
from .ops.conv2d import has_uniform_geometry
from .ops.linear import linear

# Orders of ReLU, LRN and max pooling, and the name that `ops.relu_lrn_max_pool2d` has for them. ReLU and max pooling
# commute, so two orders share a name wherever they are neighbours.
TAILS: dict[tuple[str, ...], str] = {
    ("relu", "lrn", "pool"): "relu-lrn-pool",
    ("relu", "pool", "lrn"): "relu-pool-lrn",
    ("pool", "relu", "lrn"): "relu-pool-lrn",
    ("lrn", "pool", "relu"): "lrn-pool-relu",
    ("lrn", "relu", "pool"): "lrn-pool-relu",
}
Modules = dict[str, Any]  # the modules of a pattern, by kind and in their order


def run(modules: Iterable[nn.Module], x: Tensor, scale: float = 1.0) -> Tensor:
    """Equivalent to `nn.Sequential(*modules)(scale * x)`, to rounding; what matches no pattern runs as it is."""
    chain = list(modules)
    kinds = [kind(module) for module in chain]
    start = 0
    while start < len(chain):
        pattern = tuple(kinds[start : start + 4])
        while pattern and pattern not in PATTERNS:
            pattern = pattern[:-1]
        if scale != 1 and pattern[:1] != ("conv",):
            x, scale = x * scale, 1.0
        if pattern:
            x, scale = PATTERNS[pattern](x, dict(zip(pattern, chain[start:])), scale), 1.0
        else:
            x = chain[start](x)
        start += len(pattern) or 1
    return x


def kind(module: nn.Module) -> str:
    """The module's name in `PATTERNS`, or "" if it must run by itself. That is a module of another class (subclasses
    included), one with hooks or a forward of its own, and one with arguments that the operators do not take."""
    if has_hooks(module) or "forward" in module.__dict__:
        return ""
    if isinstance(module, nn.Conv2d):
        return "conv" if type(module) in (nn.Conv2d, Conv2d) and has_uniform_geometry(module) else ""
    if type(module) is LocalResponseNorm:
        return "lrn" if module.across == "channels" else ""
    if type(module) is MaxPool2d:
        return "pool" if module.dilation in (1, (1, 1)) and not module.return_indices else ""
    if type(module) is nn.BatchNorm2d:
        plain = module.training and module.affine and module.track_running_stats and module.momentum is not None
        return "norm" if plain else ""
    return "relu" if type(module) is nn.ReLU else "linear" if type(module) is nn.Linear else ""


def has_hooks(module: nn.Module) -> bool:
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def _block(x: Tensor, modules: Modules, scale: float) -> Tensor:
    conv, pool = modules["conv"], modules["pool"]
    tail = {kind: module for kind, module in modules.items() if kind != "conv"}
    if conv.kernel_size != (11, 11) or conv.groups != 1:
        return _tail(_conv2d(x, {"conv": conv}, scale), tail)
    window = {f"pool_{name}": value for name, value in _window(pool).items()}
    arguments = {**geometry(conv), **modules["lrn"].arguments(), **window, "order": TAILS[tuple(tail)]}
    return ops.conv2d_relu_lrn_max_pool2d(x, _scaled(conv.weight, scale), conv.bias, **arguments)


def _tail(x: Tensor, modules: Modules, scale: float = 1.0) -> Tensor:
    arguments = {**modules["lrn"].arguments(), **_window(modules["pool"]), "order": TAILS[tuple(modules)]}
    return ops.relu_lrn_max_pool2d(x, **arguments)


def _batch_norm(x: Tensor, modules: Modules, scale: float = 1.0) -> Tensor:
    norm = modules["norm"]
    norm._check_input_dim(x)
    norm.num_batches_tracked.add_(1)
    tensors = norm.running_mean, norm.running_var, norm.weight, norm.bias
    return batch_norm(x, *tensors, norm.momentum, norm.eps, relu="relu" in modules)


def _norm_and_tail(x: Tensor, modules: Modules, scale: float) -> Tensor:
    norm = modules.pop("norm")
    return _tail(_batch_norm(x, {"norm": norm}), modules)


def _conv2d(x: Tensor, modules: Modules, scale: float) -> Tensor:
    conv = modules["conv"]
    weight = _scaled(conv.weight, scale)
    return ops.conv2d(x, weight, conv.bias, **geometry(conv), groups=conv.groups, relu="relu" in modules)


def _linear(x: Tensor, modules: Modules, scale: float) -> Tensor:
    layer = modules["linear"]
    return linear(x, layer.weight, layer.bias, relu="relu" in modules)


def _scaled(weight: Tensor, scale: float) -> Tensor:
    """A scale of the images as one of the weights, which are smaller."""
    return weight if scale == 1 else weight * scale


def _window(pool: Any) -> dict[str, Any]:
    return {name: getattr(pool, name) for name in ("kernel_size", "stride", "padding", "ceil_mode")}


PATTERNS: dict[tuple[str, ...], Callable[[Tensor, Modules, float], Tensor]] = {
    **{("conv", *tail): _block for tail in TAILS},
    **dict.fromkeys(TAILS, _tail),
    **{("norm", *tail): _norm_and_tail for tail in TAILS},
    ("norm", "relu"): _batch_norm,
    ("norm",): _batch_norm,
    ("conv", "relu"): _conv2d,
    ("conv",): _conv2d,
    ("linear", "relu"): _linear,
    ("linear",): _linear,
}
