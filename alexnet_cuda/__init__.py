"""AlexNet as it was, fast: CUDA and CPU kernels for its layers, exact networks, and five systems built on them."""

import sys
from importlib import import_module
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from ._version import VERSION as __version__

__all__ = ["AlexNet", "__version__", "accelerate", "build_info", "caffe", "list_variants", "nn", "ops", "reference"]

# The command line loads torch only when a command needs it: otherwise `alexnet-cuda --help` would take seconds.
_is_module = sys.argv[0] == "-m" and any(argument.startswith("alexnet_cuda") for argument in sys.orig_argv)
if TYPE_CHECKING or not (_is_module or PurePath(sys.argv[0]).name == "alexnet-cuda"):
    from . import nn, ops, reference
    from ._library import build_info
    from .accelerate import accelerate
    from .model import AlexNet
    from .variants import list_variants

if TYPE_CHECKING:
    from . import caffe


def __getattr__(name: str) -> Any:
    """A module of the package when it is used: `caffe` needs protobuf, and in the command line the others wait too."""
    if name in ("caffe", "nn", "ops", "reference"):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
