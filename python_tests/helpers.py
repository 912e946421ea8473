"""What the op tests share: inputs in a layout, and comparison with a float64 result."""

import torch

# Relative error allowed against float64: a few roundings of the result's dtype, since sums are in float32.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def in_layout(x, layout):
    """The same values with other strides."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":  # every second column of a wider tensor, with an offset
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "offset":  # channels_last, but it starts one element behind an aligned address
        return x.new_empty(x.numel() + 1)[1:].view(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2).copy_(x)
    if layout == "permuted":
        return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    return x


def assert_close(actual, exact):
    """`actual` is `exact` (float64, of the same but exactly represented inputs) up to the rounding of its dtype."""
    tolerance = TOLERANCE[actual.dtype]
    scale = exact.abs().nan_to_num(0, 0, 0).max().item() if exact.numel() else 0
    torch.testing.assert_close(
        actual.double().cpu(), exact.cpu(), rtol=tolerance, atol=tolerance * scale, equal_nan=True
    )


def forward_and_gradients(function, inputs, grad):
    """(output, gradients of the inputs) with leaves that keep the inputs' strides."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    return y, torch.autograd.grad(y, leaves, grad.to(y))


def saved_bytes(function, *inputs):
    """Bytes that `function` saves for backward, each storage counted once."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(*inputs)
    return sum(storages.values())


def memory_format(x):
    if x.is_contiguous():
        return torch.contiguous_format
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else None
