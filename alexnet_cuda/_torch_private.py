"""What the operators use of torch's private interfaces, each with the reason why no public one does."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Runs an operator below autograd, as torch's own Python layer for registered operators does. That layer takes longer
# than a pooling of one image; ops/_registration.py says where it is bypassed.
below_autograd = torch._C._AutoDispatchBelowAutograd


def transforms_active() -> bool:
    """Whether this runs inside torch.vmap, a transform of torch.func, or a level of forward-mode differentiation. There
    is no public question; operators registered with torch.library are not differentiable in the last two."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def differentiating() -> bool:
    """The same without torch.vmap, for which our operators have a batching rule."""
    if forward_ad._current_level >= 0:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_all_functorch_interpreters

    return not all(isinstance(level, VmapInterpreter) for level in retrieve_all_functorch_interpreters())


def has_onednn_linear() -> bool:
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and bool(torch.backends.mkldnn.enabled)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """x @ weight.T + bias, optionally with ReLU, in oneDNN. The public F.linear runs float32 in MKL, which on some CPUs
    reads the weights of fully connected layers at half the speed of memory."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu" if relu else "none", [], "")
