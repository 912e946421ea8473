"""The command line, `alexnet-cuda train | evaluate | predict | ...`. Heavy imports wait for their command."""

from . import train, runs, export, import_caffe, compare, networks, check  # noqa: I001, F401 - the order of the commands in --help
from ._app import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the console script."""
    app()
