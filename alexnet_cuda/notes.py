"""Notes for the user: what was left out or changed."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape

PLAIN: dict[str, Any] = {"soft_wrap": True, "markup": False}  # prints a path as it is, in one line


def show_notes(notes: Iterable[str], to: Console | None = None) -> None:
    """Prints a line for each note; to stderr if not said otherwise."""
    to = to or Console(stderr=True, highlight=False)
    for note in notes:
        to.print(f"[yellow]{escape(note)}[/]", soft_wrap=True)
