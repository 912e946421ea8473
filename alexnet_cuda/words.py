"""How the commands write what they say: shares, and names that do not exist."""

import difflib
import math
from collections.abc import Iterable

MISSING = "\N{EN DASH}"


def percent(share: float, digits: int = 2) -> str:
    """0.7083 as "70.83 %"; what is not finite as a dash."""
    return f"{100 * share:.{digits}f} %" if math.isfinite(share) else MISSING


def three_digits(value: float) -> str:
    """An integer whole, another number rounded to three digits."""
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def closest(wrong: str, known: Iterable[str]) -> str | None:
    """The name that was probably meant: one that is spelled alike, or that begins with what was written."""
    names = list(known)
    alike = difflib.get_close_matches(wrong, names, 1) or [name for name in names if wrong and name.startswith(wrong)]
    return alike[0] if alike else None


def unknown(what: str, wrong: object, known: Iterable[str]) -> str:
    """A sentence: the name that was probably meant, or where there is none, all names."""
    names = list(known)
    meant = closest(str(wrong), names)
    return f"unknown {what} {wrong!r}; " + (f"did you mean {meant}?" if meant else f"choose from {', '.join(names)}")
