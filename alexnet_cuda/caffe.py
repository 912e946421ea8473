"""`formats.caffe` under its short name."""

from .formats.caffe import (
    LAYERS,
    MEAN_BGR,
    CaffeNet,
    load,
    load_caffe,
    read_caffemodel,
    read_mean,
    state_dict_from_caffe,
)

__all__ = [
    "LAYERS",
    "MEAN_BGR",
    "CaffeNet",
    "load",
    "load_caffe",
    "read_caffemodel",
    "read_mean",
    "state_dict_from_caffe",
]
