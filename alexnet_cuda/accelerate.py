"""Our kernels in any network."""

import copy
from typing import TypeVar

import torch

from . import nn
from .ops.conv2d import is_supported

Module = TypeVar("Module", bound=torch.nn.Module)


def accelerate(module: Module, inplace: bool = False, verbose: bool = False) -> Module:
    """Let `module` and everything in it use this package's kernels where it has one; results agree to rounding.

    Exchanged are torch.nn.LocalResponseNorm; MaxPool2d without dilation; and Conv2d without dilation, padded with
    zeros: 11x11 with stride 4 on 1, 3 or 4 channels, and 3x3 and 5x5 with stride 1 between multiples of 16 channels,
    for which there is a kernel on a CPU in float32 (faster in channels_last). Parameters, buffers, hooks, names and
    `state_dict` stay what they are, since the exchanged modules only change their class to a subclass; other subclasses
    of the three are left alone. A second call changes nothing.

    Args:
        module: any module.
        inplace: change `module` itself; otherwise a deep copy of it.
        verbose: print a line for each module of the three kinds: that it was exchanged, or why not.

    Returns: the changed module.

    Raises: TypeError if `module` is not a torch.nn.Module.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"accelerate: expected module to be a torch.nn.Module, got {type(module).__name__}")
    if not inplace:
        module = copy.deepcopy(module)
    for name, child in module.named_modules():
        kind = next((kind for kind in EXCHANGED if isinstance(child, kind)), None)
        if kind is None:
            continue
        left = _why_not(child, kind)
        if not left:
            child.__class__ = EXCHANGED[kind]
        if verbose:
            print(f"{name or 'the module'}, {kind.__name__}: {f'left, {left}' if left else 'exchanged'}")
    return module


EXCHANGED: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.LocalResponseNorm: nn.LocalResponseNorm,
    torch.nn.MaxPool2d: nn.MaxPool2d,
    torch.nn.Conv2d: nn.Conv2d,
}


def _why_not(module: torch.nn.Module, kind: type[torch.nn.Module]) -> str:
    """Why a module of one of the three kinds is not exchanged; "" if it is."""
    if isinstance(module, EXCHANGED[kind]):
        return "it is this package's already"
    if type(module) is not kind:
        return f"{type(module).__name__} is a subclass"
    if isinstance(module, torch.nn.MaxPool2d) and module.dilation not in (1, (1, 1)):
        return f"dilation {module.dilation}"
    if isinstance(module, torch.nn.Conv2d) and not is_supported(module):
        return f"there is no kernel for {module.extra_repr()}"
    return ""
