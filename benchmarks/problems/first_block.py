"""AlexNet's first block."""

import torch
from torch import nn

from alexnet_cuda import accelerate, fusion

batch_size = 256


class Model(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 96, 11, 4), nn.ReLU(), nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0), nn.MaxPool2d(3, 2)
        )


class ModelNew(Model):
    def __init__(self):
        super().__init__()
        accelerate(self, inplace=True)

    def forward(self, x):
        return fusion.run(self, x)


def get_inputs():
    return [64 * torch.rand(batch_size, 3, 227, 227) - 32]


def get_init_inputs():
    return []
