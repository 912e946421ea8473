"""AlexNet as it was, fast: CUDA and CPU kernels for its layers, exact networks, and five systems built on them."""

__version__ = "0.1.0"

from . import nn, ops, reference
from ._library import build_info
from .accelerate import accelerate
from .model import AlexNet
from .variants import list_variants

__all__ = ["AlexNet", "accelerate", "build_info", "list_variants", "nn", "ops", "reference"]
