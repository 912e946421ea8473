"""The command line, `alexnet-cuda train | evaluate | predict | ...`. Heavy imports wait for their command."""

import io
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

# torch then asks Linux for 2 MiB pages, which makes a training step on a CPU about a tenth shorter. It reads the
# variable before its first tensor, so it is set before the imports below.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from . import train, download, inspection, runs, export, import_caffe, compare, networks, check  # noqa: I001, F401 - in --help's order
from ._app import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the console script. A letter that the terminal does not know is printed as its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    show = warnings.showwarning
    warnings.showwarning = lambda message, kind, *where: _show(show, message, kind, *where)
    app(prog_name="alexnet-cuda")


def _show(show: Callable, message: Warning | str, kind: type[Warning], *where: Any) -> None:
    """A warning of this package as one line, others as Python shows them."""
    if str(where[0]).startswith(os.path.dirname(os.path.dirname(__file__))):
        print(f"warning: {message}", file=sys.stderr)
    else:
        show(message, kind, *where)
