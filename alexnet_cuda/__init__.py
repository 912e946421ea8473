"""AlexNet as it was, fast: CUDA and CPU kernels for its layers, exact networks, and five systems built on them."""

from . import caffe, nn, ops, reference
from ._library import VERSION as __version__
from ._library import build_info
from .accelerate import accelerate
from .model import AlexNet
from .variants import list_variants

__all__ = ["AlexNet", "__version__", "accelerate", "build_info", "caffe", "list_variants", "nn", "ops", "reference"]
