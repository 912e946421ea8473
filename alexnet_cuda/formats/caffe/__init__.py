"""Caffe's files: networks as torch modules, weights for this package's variants, mean images."""

from .files import read_caffemodel, read_mean
from .network import CaffeNet, load
from .weights import LAYERS, MEAN_BGR, load_caffe, state_dict_from_caffe

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
