"""The variants in little: all layers and constants, but a quarter of the filters and few units."""

import dataclasses

import torch

from alexnet_cuda import AlexNet
from alexnet_cuda.variants import VARIANTS, Conv, Linear


def narrow(name, classes, **options):
    """A narrow AlexNet with random weights and, in evaluation mode, statistics as after training."""

    def layer(spec):
        if isinstance(spec, Conv):
            return dataclasses.replace(spec, filters=spec.filters // 4)
        return dataclasses.replace(spec, units=spec.units and 64) if isinstance(spec, Linear) else spec

    variant = VARIANTS[name]
    parts = {key: tuple(map(layer, getattr(variant, key))) for key in ("features", "classifier")}
    model = AlexNet(dataclasses.replace(variant, **parts), classes, **options).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.bias.normal_(0, 0.1)
    return model
