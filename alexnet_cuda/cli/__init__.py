"""The command line, `alexnet-cuda train | evaluate | predict | ...`. Heavy imports wait for their command."""

import os

# torch then asks Linux for 2 MiB pages, which makes a training step on a CPU about a tenth shorter. It reads the
# variable before its first tensor, so it is set before the imports below.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from . import train, runs, export, compare, networks, check  # noqa: I001, F401 - the order of the commands in --help
from ._app import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the console script."""
    app()
