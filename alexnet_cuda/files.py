"""Writing files so that each is either complete or absent."""

import contextlib
import csv
import io
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import AlexNetError


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path`, which replaces it when the block ends well and vanishes when it does not.

    The bytes are on the disk (fsync) before the name changes, so that a full disk, a kill or a power cut leaves
    either the earlier file or the new one, never a part.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(8)}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a write to an open file names none
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(folder: Path) -> None:
    """Raises AlexNetError where nothing can be written to a folder, or it cannot be made."""
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        reason = "may not be written to" if above.is_dir() else "is a file"
        raise AlexNetError(f"nothing can be written to {folder}: {above} {reason}")


def write_text(path: Path | str, text: str) -> None:
    """Writes `text` to `path`, completely or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, without one at its end that is cut; an empty list if there is no such file."""
    if not path.exists():
        return []
    lines = path.read_bytes().decode("utf-8", "replace").replace("\0", "").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    return [row for row in csv.DictReader(whole) if None not in row.values()]


def read_metrics(folder: Path) -> dict[str, Any]:
    """A run's metrics.json; empty where there is none. Raises AlexNetError where it is damaged."""
    path = folder / "metrics.json"
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise AlexNetError(f"{path} is damaged ({path.stat().st_size} bytes, not JSON); remove it") from error


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """`rows`, which have the same keys, as CSV with the keys as its header; None becomes an empty cell."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
