"""What is known of every picture file once it was decoded: size, mode, content, damage; remembered between runs."""

import contextlib
import functools
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import __version__ as pillow

from ..errors import DataError
from ..files import write_text
from .imageset import for_each_file
from .picture import decode, on_white, reason
from .scan import count, printable
from .table import Tree

REMEMBERED = 500  # files of a data set, at least, whose facts are written down
VERSION = [2, pillow]  # of the facts; other ones are not read


class Facts(NamedTuple):
    """Of one file: a digest of its bytes, mode, width, height, what the reader changes, and why it cannot be read."""

    digest: str
    mode: str = ""
    width: int = 0
    height: int = 0
    changes: Sequence[str] = ()
    error: str = ""


def examine(path: Path) -> Facts:
    """Reads and decodes one file; tells also of a picture that shows nothing."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return Facts("", error=f"{path} cannot be read as an image: {reason(error)}")
    digest = blake2b(data, digest_size=16).hexdigest()
    try:
        picture = decode(io.BytesIO(data), edge=256, name=str(path))
    except DataError as error:
        return Facts(digest, error=str(error))
    seen = np.asarray(on_white(picture.image))
    blank = ["one colour all over"] if seen.size and (seen == seen[0, 0]).all() else []
    return Facts(digest, picture.mode, *picture.size, picture.changes + blank)


def examine_all(root: Path, paths: Sequence[Path]) -> dict[Path, Facts]:
    """The facts of every file, with a progress bar where there are many. Those of a large data set are remembered, in
    the user's cache folder, until a file's size or time of change is another one."""
    cache = _cache(root) if len(paths) >= REMEMBERED else None
    known = _remembered(cache) if cache else {}
    stamps = {path: _stamp(path) for path in paths}
    facts: dict[Path, Facts] = {}
    for path in paths:
        entry = known.get(str(path))
        if entry and entry[0] == stamps[path]:
            facts[path] = Facts(*entry[1])
    new = [path for path in paths if path not in facts]
    try:
        for_each_file(functools.partial(_examine_into, facts), new, "checking images")
    finally:
        if cache and new and facts:
            entries = {str(path): [stamps[path], fact] for path, fact in facts.items() if fact.digest}  # it was read
            with contextlib.suppress(OSError, UnicodeEncodeError):  # a disk without room costs time, not the run
                cache.parent.mkdir(parents=True, exist_ok=True)
                write_text(cache, json.dumps({"version": VERSION, "facts": entries}))
    return {path: facts[path] for path in paths}


def notes_on(facts: Iterable[Facts]) -> list[str]:
    """How many pictures are changed when they are read, and how."""
    changes = Counter(change for fact in facts for change in fact.changes)
    return [f"{count(number, 'picture')}: {change}" for change, number in changes.most_common()]


def notes_on_duplicates(trees: Mapping[str, Tree], classes: Sequence[str], facts: Mapping[Path, Facts]) -> list[str]:
    """How many files have the same content as another one, above all as one of the training split."""
    where: dict[str, list[tuple[str, int, Path]]] = {}
    for name, tree in trees.items():
        for path, label in tree:
            if path in facts and facts[path].digest:
                where.setdefault(facts[path].digest, []).append((name, label, path))
    repeated = [files for files in where.values() if len(files) > 1]
    notes = []
    for name in (name for name in trees if name != "train"):
        number = sum(split == name for files in repeated if any(f[0] == "train" for f in files) for split, *_ in files)
        if number:
            notes.append(f"same content as a picture of train: {count(number, 'picture')} of {name}")
    if more := sum(len(files) - 1 for files in repeated):
        notes.append(f"same content as another file: {count(more, 'file')} in all")
    torn = [files for files in repeated if len({label for _, label, _ in files}) > 1]
    if torn:
        (_, a, one), (_, b, other) = next((f, g) for f, g in zip(torn[0], torn[0][1:]) if f[1] != g[1])
        pair = f"{printable(one)} ({classes[a]}) and {printable(other)} ({classes[b]})"
        notes.append(f"same content under two labels: {count(len(torn), 'time')}, as {pair}")
    return notes


def _examine_into(facts: dict[Path, Facts], path: Path) -> None:
    facts[path] = examine(path)


def _cache(root: Path) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alexnet_cuda" / "pictures"
    return folder / f"{blake2b(os.fsencode(root.absolute()), digest_size=12).hexdigest()}.json"


def _remembered(cache: Path) -> dict[str, list]:
    try:
        content = json.loads(cache.read_text())
        return content["facts"] if content["version"] == VERSION else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _stamp(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError:
        return [0, 0]
    return [status.st_size, status.st_mtime_ns]
