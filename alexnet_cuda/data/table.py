"""Tables of pictures and labels: CSV files as people have them."""

import csv
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

from ..errors import DataError
from .scan import alike, count, printable, shortened, split_of

MISSING = ("nan", "na", "n/a", "null", "<na>", "#n/a", "nil", "?")  # what programs write for no value
Tree = list[tuple[Path, int]]  # image files and their labels
SUFFIXES = (".csv", ".tsv", ".txt")
COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img", "img_path",
             "picture", "photo", "name", "image_name", "id", "image_id"),
    "label": ("label", "class", "category", "target", "class_name", "label_name", "labels", "species", "y"),
    "split": ("split", "set", "subset", "partition", "usage"),
}  # fmt: skip


INDEX = ("", "Unnamed: 0", "index")  # numbers of rows, as pandas writes them


class Row(NamedTuple):
    line: int
    cells: list[str]


class Listed(NamedTuple):
    line: int
    path: Path
    label: str
    split: str


def read_table(path: Path, known: Sequence[str] | None = None) -> tuple[list[str], dict[str, Tree], list[str]]:
    """The class names, the pictures of each split with their labels, and notes, of a table of pictures.

    Encoding and delimiter are found out. The columns are known by their names; without a header, the column of files
    is the one whose cells name files. Paths count from the table's folder. Without a column split all pictures are in
    "all". A row that occurs twice counts once. Raises DataError, with line numbers, for a file that does not exist, a
    missing cell, or a picture with two labels or splits. `known`: the classes of a trained network.
    """
    text, notes = _text(path)
    rows, names, unread = _rows(path, text)
    if unread:
        notes.append(f"not read: the columns {shortened(unread)} of {printable(path)}")
    listed = _pictures(path, rows, names)
    once: dict[str, Listed] = {}
    for row in listed:
        first = once.setdefault(os.path.normpath(row.path), row)
        for key in ("label", "split"):
            if (a := getattr(first, key)) != (b := getattr(row, key)):
                raise DataError(
                    f"lines {first.line} and {row.line} of {path} give {row.path.name} the {key}s {a!r} and {b!r}"
                )
    if len(once) < len(listed):
        notes.append(f"left out: {count(len(listed) - len(once), 'line')} of {printable(path)} that repeat another")
    labels = {row.label for row in once.values()}
    notes += [f"the labels {a!r} and {b!r} of {printable(path)} are two classes" for a, b in alike(labels)]
    empty = sorted(label for label in labels if label.lower() in MISSING)
    notes += [f"the label {label!r} of {printable(path)} is a class" for label in empty]
    classes = sorted(labels) if known is None else list(known)
    if known is None and len(classes) < 2:
        raise DataError(f"{path} has {count(len(classes), 'label')}, expected two or more")
    if unknown := sorted(labels - set(classes)):
        raise DataError(f"{path} has the label {unknown[0]!r}, which training lacks; it has {', '.join(classes)}")
    number, trees = {name: i for i, name in enumerate(classes)}, dict[str, Tree]()
    for row in once.values():
        trees.setdefault(row.split, []).append((row.path, number[row.label]))
    if ("all" in trees and len(trees) > 1) or (known is None and not trees.keys() & {"all", "train"}):
        raise DataError(f"the column split of {path} must be train, val or test in every line, with train among them")
    return classes, trees, notes


def _text(path: Path) -> tuple[str, list[str]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if data[:4] == b"PK\3\4":
        raise DataError(f"{path} is a spreadsheet or an archive, expected text; save the table as CSV")
    marks = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    encoding = next((name for mark, name in marks.items() if data.startswith(mark)), "utf-8")
    if encoding == "utf-8" and 4 * data[:200].count(0) > len(data[:200]):
        encoding = "utf-16-be" if data[0] == 0 else "utf-16-le"
    try:
        text, notes = data.decode(encoding), []
    except UnicodeDecodeError:
        if encoding != "utf-8":
            raise DataError(f"{path} cannot be read as {encoding}; save it as UTF-8") from None
        text, notes = data.decode("cp1252", "replace"), [f"{printable(path)} is not UTF-8; it was read as Windows-1252"]
    if "\0" in text:
        raise DataError(f"line {text[: text.index(chr(0))].count(chr(10)) + 1} of {path} holds a NUL byte")
    return text, notes


def _rows(path: Path, text: str) -> tuple[list[Row], dict[str, int], list[str]]:
    """The rows below the header, the index of each column that is known, and the names of the others."""
    rows = _split(path, text)
    if not rows:
        raise DataError(f"{path} has no column 'path'; its columns are none")
    for before, row in zip([Row(0, []), *rows], rows):
        if text.count('"') % 2 and "\n" in "".join(row.cells):
            raise DataError(f"line {before.line + 1} of {path} opens a quote that does not close")
    width = len(rows[0].cells)
    if uneven := [row for row in rows if len(row.cells) > width]:
        lines = ", ".join(str(row.line) for row in uneven[:5])
        raise DataError(
            f"line {lines} of {path} has {len(uneven[0].cells)} cells, expected {width}; quote a cell with a delimiter"
        )
    rows = [Row(line, cells + [""] * (width - len(cells))) for line, cells in rows]
    if any(_file(path, cell) for cell in rows[0].cells):
        return rows, _guessed(path, rows, [""] * width), []
    names = _guessed(path, rows[1:], [cell.lower().replace(" ", "_") for cell in rows[0].cells])
    return rows[1:], names, [c for i, c in enumerate(rows[0].cells) if i not in names.values() and c not in INDEX]


def _split(path: Path, text: str) -> list[Row]:
    """Rows of cells without blanks around them, by the delimiter that gives most rows the same number of cells."""
    skipped = 0
    if text[:4].lower() == "sep=":  # Excel's own line
        text, skipped = text.partition("\n")[2], 1
    while text.startswith("#") and not re.match(r".*[,;\t|]", text):  # a remark, not names of columns
        text, skipped = text.partition("\n")[2], skipped + 1
    best: list[Row] = []
    for delimiter in (",", ";", "\t", "|", " "):
        try:
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
            rows = [Row(reader.line_num + skipped, [cell.strip() for cell in cells]) for cells in reader]
        except csv.Error as error:
            raise DataError(f"{path} cannot be read as CSV: {error}") from error
        rows = [row for row in rows if any(row.cells)]
        for row in rows:
            while rows and len(row.cells) > len(rows[0].cells) and not row.cells[-1]:
                row.cells.pop()
        width = len(rows[0].cells) if rows else 0
        if width > 1 and all(len(row.cells) == width for row in rows):
            return rows
        if not best or (width > len(best[0].cells) and delimiter != " "):
            best = rows
    return best


def _guessed(path: Path, rows: list[Row], header: list[str]) -> dict[str, int]:
    """The index of the columns path, label and, where there is one, split."""
    names = {key: next((header.index(n) for n in known if n in header), None) for key, known in COLUMNS.items()}
    free = [i for i in range(len(header)) if i not in names.values()]
    if names["path"] is None:
        names["path"] = next((i for i in free if rows and any(_file(path, row.cells[i]) for row in rows[:20])), None)
        free = [i for i in free if i != names["path"]]
    if names["label"] is None and len(free) == 1 and names["path"] is not None:
        names["label"] = free[0]
    for key in ("path", "label"):
        if names[key] is None:
            columns = shorten(", ".join(filter(None, header)), 100) or "none"
            raise DataError(
                f"{path} has no column {key!r}; its columns are {columns}; a first line path,label names them"
            )
    return {key: index for key, index in names.items() if index is not None}


def _pictures(path: Path, rows: list[Row], names: dict[str, int]) -> list[Listed]:
    listed, missing = [], []
    for line, cells in rows:
        if any("\n" in cells[names[key]] for key in ("path", "label")):
            raise DataError(f"a quote that opens above line {line} of {path} closes on another line")
        name, label = cells[names["path"]], printable(cells[names["label"]])
        if not name or not label:
            raise DataError(f"line {line} of {path} lacks a path or a label")
        asked = cells[names["split"]] if "split" in names else ""
        split = split_of(asked) if asked else "all"
        if split is None:
            raise DataError(f"line {line} of {path} has the split {asked!r}, expected train, val or test")
        file = _file(path, name)
        if file is None:
            missing.append(f"line {line} of {path} names {path.parent / name}, which is no file")
        else:
            listed.append(Listed(line, file, label, split))
    if missing:
        raise DataError(missing[0] + (f"; {count(len(missing) - 1, 'other line')} as well" if len(missing) > 1 else ""))
    return listed


def _file(table: Path, name: str) -> Path | None:
    """The file that a cell names, from the table's folder; with the separators of either system."""
    for way in dict.fromkeys((name, name.replace("\\", "/"))):
        try:
            if way and (table.parent / way).is_file():
                return table.parent / way
        except (OSError, ValueError):  # too long, or with a character that no path has
            pass
    return None
