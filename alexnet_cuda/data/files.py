"""Files that are whole or absent: the error of the data layer, and writing through a temporary name."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


class DataError(Exception):
    """Something on disk is missing, damaged or laid out differently than expected; the message names it."""


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path`, which replaces it when the block ends well and vanishes when it does not.

    The bytes are on the disk (fsync) before the name changes, so that a full disk, a kill or a power cut leaves
    either the earlier file or the new one, never a part.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        temporary.chmod(0o666 & ~_umask())
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Writes `text` to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
