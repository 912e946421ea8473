"""The command line, `alexnet-cuda train | evaluate | predict | ...`. Heavy imports wait for their command."""

import functools
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._app import app

# torch then asks Linux for 2 MiB pages, which makes a training step on a CPU about a tenth shorter. It reads the
# variable before its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__all__ = ["app", "main"]
STOPPED = "stopped before the end, by Ctrl-C"


def __getattr__(name: str) -> Any:
    """`app` with its commands is imported when it is used, so that `main` can answer a Ctrl-C that comes before."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import train, download, inspection, runs, export, import_caffe, compare, networks, check  # noqa: I001, F401 - in --help's order
    from ._app import app

    return app


def main() -> None:
    """Entry point of the console script. A letter that the terminal does not know is printed as its code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # which nohup and the like replace
        signal.signal(signal.SIGINT, functools.partial(_on_interrupt, os.getpid()))
    show = warnings.showwarning
    warnings.showwarning = lambda message, kind, *where: _show(show, message, kind, *where)
    try:
        __getattr__("app")(prog_name="alexnet-cuda")
    except KeyboardInterrupt:
        print(f"error: {STOPPED}", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left that another Ctrl-C could stop


def _on_interrupt(process: int, number: int, frame: FrameType | None) -> None:
    """Ctrl-C. During an import nothing is being written, and a KeyboardInterrupt may get lost, as where torch loads
    numpy: the process ends here. At any other time it is raised."""
    while frame is not None and os.getpid() == process:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, f"error: {STOPPED}\n".encode())
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _show(show: Callable, message: Warning | str, kind: type[Warning], *where: Any) -> None:
    """A warning of this package as one line, others as Python shows them."""
    if str(where[0]).startswith(os.path.dirname(os.path.dirname(__file__))):
        print(f"warning: {message}", file=sys.stderr)
    else:
        show(message, kind, *where)
