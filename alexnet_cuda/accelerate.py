"""Our kernels in any network."""

import copy
from typing import TypeVar

import torch

from . import nn
from .ops.conv2d import is_supported

Module = TypeVar("Module", bound=torch.nn.Module)


def accelerate(module: Module, inplace: bool = False) -> Module:
    """Let `module` and everything in it use this package's kernels where it has one; results agree to rounding.

    Exchanged are torch.nn.LocalResponseNorm; MaxPool2d without dilation; and Conv2d without dilation, padded with
    zeros: 11x11 with stride 4 on 1, 3 or 4 channels, and 3x3 and 5x5 with stride 1 between multiples of 16 channels,
    for which there is a kernel on a CPU in float32 (faster in channels_last). Parameters, buffers, hooks, names and
    `state_dict` stay what they are, since the exchanged modules only change their class to a subclass; other subclasses
    of the three are left alone. A second call changes nothing.

    Args:
        module: any module.
        inplace: change `module` itself; otherwise a deep copy of it.

    Returns: the changed module.

    Raises: TypeError if `module` is not a torch.nn.Module.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"accelerate: expected module to be a torch.nn.Module, got {type(module).__name__}")
    if not inplace:
        module = copy.deepcopy(module)
    for child in module.modules():
        if type(child) is torch.nn.LocalResponseNorm:
            child.__class__ = nn.LocalResponseNorm
        elif type(child) is torch.nn.MaxPool2d and child.dilation in (1, (1, 1)):
            child.__class__ = nn.MaxPool2d
        elif type(child) is torch.nn.Conv2d and is_supported(child):
            child.__class__ = nn.Conv2d
    return module
