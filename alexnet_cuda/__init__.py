"""AlexNet as it was, fast: CUDA and CPU kernels for its layers, exact networks, and five systems built on them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import nn, ops, reference
from ._library import build_info
from ._version import VERSION as __version__
from .accelerate import accelerate
from .model import AlexNet
from .variants import list_variants

if TYPE_CHECKING:
    from . import caffe

__all__ = ["AlexNet", "__version__", "accelerate", "build_info", "caffe", "list_variants", "nn", "ops", "reference"]


def __getattr__(name: str) -> Any:
    """`caffe` is loaded when it is used, since it needs protobuf."""
    if name == "caffe":
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
