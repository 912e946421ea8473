"""KernelBench's AlexNet: without LRN, its dropout is 0."""

import torch
from torch import nn

from alexnet_cuda import accelerate, fusion

batch_size = 1024


class Model(nn.Sequential):
    def __init__(self, *_):
        super().__init__(
            *(nn.Conv2d(3, 96, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(96, 256, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(256, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 384, 3, 1, 1), nn.ReLU()),
            *(nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten()),
            *(nn.Linear(9216, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000)),
        )


class ModelNew(Model):
    def __init__(self, *_):
        super().__init__()
        accelerate(self, inplace=True)

    def forward(self, x):
        return fusion.run(self, x)


def get_inputs():
    return [torch.rand(batch_size, 3, 224, 224)]


def get_init_inputs():
    return [1000]
