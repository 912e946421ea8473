"""`formats.caffe` under its short name."""

from .formats.caffe import LAYERS, MEAN_BGR, load_caffe, read_caffemodel, state_dict_from_caffe

__all__ = ["LAYERS", "MEAN_BGR", "load_caffe", "read_caffemodel", "state_dict_from_caffe"]
