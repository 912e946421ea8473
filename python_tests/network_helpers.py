"""What the tests of networks share."""

from dataclasses import replace

import torch

from alexnet_cuda import AlexNet
from alexnet_cuda.variants import Conv, Linear, get_variant


def narrow_network(name, classes, **options):
    """The variant with a quarter of the filters and few units, random weights and statistics as after training."""

    def layer(spec):
        if isinstance(spec, Conv):
            return replace(spec, filters=spec.filters // 4)
        return replace(spec, units=spec.units and 64) if isinstance(spec, Linear) else spec

    variant = get_variant(name)
    parts = {key: tuple(map(layer, getattr(variant, key))) for key in ("features", "classifier")}
    model = AlexNet(replace(variant, **parts), classes, **options).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.bias.normal_(0, 0.1)
    return model


def images(model, n=1):
    shape = n, model.in_channels, *[model.variant.input_size] * 2
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def outputs_and_gradients(run, x, parameters):
    """The output, and the gradients of the sum of its squares by x and the parameters."""
    leaves = [x.clone().requires_grad_(), *parameters]
    for leaf in leaves:
        leaf.grad = None
    y = run(leaves[0])
    y.square().sum().backward()
    return [y, *(leaf.grad for leaf in leaves)]
