"""The command line, `alexnet-cuda train | evaluate | predict | ...`. Heavy imports wait for their command."""

import io  # noqa: I001 - the order of the commands in --help
import sys

from . import train, inspection, runs, export, compare, networks, check  # noqa: F401
from ._app import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the console script. A letter that the terminal does not know is printed as its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()
