"""What the tests of networks share."""

import torch


def images(model, n=1):
    shape = n, model.in_channels, *[model.variant.input_size] * 2
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def assert_all_close(found, expected, rtol, atol):
    """atol relative to the largest expected value of each tensor."""
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=rtol, atol=atol * exact.abs().max().item())


def outputs_and_gradients(run, x, parameters):
    """The output, and the gradients of the sum of its squares by x and the parameters."""
    leaves = [x.clone().requires_grad_(), *parameters]
    for leaf in leaves:
        leaf.grad = None
    y = run(leaves[0])
    y.square().sum().backward()
    return [y, *(leaf.grad for leaf in leaves)]
