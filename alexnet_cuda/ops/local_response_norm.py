"""local_response_norm: forward, backward, and a second derivative composed of torch's own operators."""

import math

from torch import Tensor

from .. import reference
from .._library import has_kernel
from ._registration import _op, call, empty, gradient_fake, needs_grad, register, save_first, second_order


def _lrn_reference(x, size, front, alpha, beta, k, groups, spatial):
    window, across = "torch" if front == size // 2 else "onnx", "spatial" if spatial else "channels"
    return reference.local_response_norm(
        x, size, alpha, beta, k, groups=groups, divide_alpha=False, window=window, across=across
    )


def _lrn_backward(ctx, grad):
    (x,) = ctx.saved_tensors
    gradient = call(_op._local_response_norm_backward, needs_grad(grad, x), grad, x, *ctx.args)
    return (gradient, *[None] * len(ctx.args))


def _lrn_backward_backward(ctx, grad_grad):
    gradients = second_order(lambda x: _lrn_reference(x, *ctx.args), *ctx.saved_tensors, grad_grad)
    return (*gradients, *[None] * len(ctx.args))


register("local_response_norm", lambda x, *args: empty(x, x.shape), save_first(1), _lrn_backward, (0,))
register("_local_response_norm_backward", gradient_fake, save_first(2), _lrn_backward_backward, (0, 1))


def local_response_norm(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, *,
    groups: int = 1, divide_alpha: bool = True, window: str = "torch", across: str = "channels",
) -> Tensor:  # fmt: skip
    """Local response normalisation: y_c = x_c / (k + A * sum of x_j^2 over the window of c)^beta.

    Equivalent to `torch.nn.functional.local_response_norm(x, size, alpha, beta, k)`, but the squares are summed in
    float32 whatever the dtype, only x is saved for backward, and the backward is deterministic.

    Args:
        x: (N, C, ...), at least 3-D; 4-D for `across="spatial"`. The output keeps its dtype and memory format.
        size: number of channels in the window, cut off at the first and last channel.
        groups: windows do not cross the borders of this many equal groups of channels (the 2012 net's two columns).
        divide_alpha: A = alpha / size as in torch, Caffe, ONNX and the 2012 code; False: A = alpha as in the paper's
            text (section 3.3) and `tf.nn.lrn`.
        window: the side that an even window leans to. "torch": size // 2 channels before c; "onnx" (ONNX LRN, cuDNN):
            (size - 1) // 2.
        across: "channels", or "spatial" for Caffe's WITHIN_CHANNEL: size x size windows in the plane, A = alpha /
            size^2.

    Raises:
        errors.ArgumentError (a ValueError and RuntimeError): x has too few dimensions, size is not positive, groups
            does not divide the channels, or window or across is unknown. TypeError: x is not a tensor, size is not an
            integer, or x is of integers and an argument is one that torch does not have.
    """
    op = "local_response_norm"
    reference.check_tensor(op, x)
    front, scale = reference.lrn_constants(op, x.shape, size, alpha, groups, divide_alpha, window, across)
    if not has_kernel(x) or not reference.lrn_has_kernel(alpha, beta, k):
        return reference.local_response_norm(
            x, size, alpha, beta, k, groups=groups, divide_alpha=divide_alpha, window=window, across=across
        )
    four = x if x.dim() == 4 else x.reshape(*x.shape[:2], math.prod(x.shape[2:-1]), x.shape[-1])
    y = call(_op.local_response_norm, needs_grad(x), four, size, front, scale, beta, k, groups, across == "spatial")
    return y if x.dim() == 4 else y.reshape(x.shape)  # one image reshaped loses its memory format
