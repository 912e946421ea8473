"""Tables of pictures and labels: CSV files as people have them."""

import csv
import io
import os
import re
from collections.abc import Collection, Sequence
from itertools import takewhile
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

from ..errors import DataError
from .scan import Scanner, alike, count, hinted_split, printable, shortened, split_of

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
    is the one whose cells name files. Columns of 0 and 1 may stand for one of labels. Paths count from the table's
    folder; where none is there, they are looked for below it. Without a column split all pictures are in "all". A row
    that occurs twice counts once. Raises DataError, with line numbers, for a file that does not exist, a missing cell,
    or a picture with two labels or splits. `known`: the classes of a trained network.
    """
    text, notes = _text(path)
    rows, names, told = _rows(path, text)
    notes += told
    listed, elsewhere = _pictures(path, rows, names)
    if elsewhere:
        where = f"{count(elsewhere, 'picture')} of {printable(path)} {'are' if elsewhere > 1 else 'is'}"
        notes.append(f"{where} found by name in other folders or with another suffix than the table says")
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
    several = sorted(
        label for label in labels if labels & {part.strip() for part in re.split("[|;,]", label)} - {label}
    )
    notes += [f"the label {label!r} of {printable(path)} is a class: a picture has one label here" for label in several]
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
    """The rows below the header, the index of each column that is known, and notes on the others."""
    rows = _split(path, text)
    if not rows:
        raise DataError(f"{path} has no column 'path'; its columns are none")
    unbalanced = text.count('"') % 2
    for before, row in zip([Row(0, []), *rows], rows):
        if unbalanced and "\n" in "".join(row.cells):
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
    titles, rows = rows[0].cells, rows[1:]
    header, notes = [title.lower().replace(" ", "_") for title in titles], []
    if one_hot := _one_hot(rows, header):
        header.append("label")
        rows = [Row(n, [*cells, next(titles[i] for i in one_hot if float(cells[i]))]) for n, cells in rows]
        classes = shortened([titles[i] for i in one_hot])
        notes.append(
            f"the columns {classes} of {printable(path)} are taken as classes, with 1 where a picture shows one"
        )
    names = _guessed(path, rows, header)
    known = {*names.values(), *one_hot}
    if unread := [title for i, title in enumerate(titles) if i not in known and title not in INDEX]:
        notes.append(f"not read: the columns {shortened(unread)} of {printable(path)}")
    return rows, names, notes


def _one_hot(rows: list[Row], header: list[str]) -> list[int]:
    """The columns beside those of files and splits, if every row has 1 in one of them and 0 in the others."""
    others = [i for i, name in enumerate(header) if name not in (*COLUMNS["path"], *COLUMNS["split"], *INDEX)]
    binary = all(row.cells[i] in ("0", "1", "0.0", "1.0") for row in rows for i in others)
    one_each = binary and all(sum(float(row.cells[i]) for i in others) == 1 for row in rows)
    return others if rows and len(others) > 1 and one_each else []


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
            while len(row.cells) > len(rows[0].cells) and not row.cells[-1]:
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


def _pictures(path: Path, rows: list[Row], names: dict[str, int]) -> tuple[list[Listed], int]:
    """What each row says, and how many pictures do not lie where it says."""
    listed, missing = [], []
    asked_for = dict.fromkeys(cells[names["path"]] for _, cells in rows if cells[names["path"]])
    files = {name: file for name in asked_for if (file := _file(path, name))}
    elsewhere = {} if files else _elsewhere(path, asked_for)
    files |= elsewhere
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
        if name in files:
            listed.append(Listed(line, files[name], label, split))
        else:
            missing.append(f"line {line} of {path} names {path.parent / name}, which is no file")
    if missing:
        raise DataError(missing[0] + (f"; {count(len(missing) - 1, 'other line')} as well" if len(missing) > 1 else ""))
    return listed, len(elsewhere)


def _elsewhere(table: Path, names: Collection[str]) -> dict[str, Path]:
    """The pictures below a table's folder that cells name without their suffix or folder, or by paths of another
    machine: what all these paths begin with is passed over, and the rest must agree. Of several pictures, those lie in
    the folder of the split after which the table is called. Raises DataError where several are left."""
    parts = {name: [part for part in re.split(r"[\\/]+", name.casefold()) if part not in ("", ".")] for name in names}
    parts = {name: own for name, own in parts.items() if own}
    common = len([*takewhile(lambda column: len({*column}) == 1, zip(*(own[:-1] for own in parts.values())))])
    pictures: dict[str, list[Path]] = {}
    for picture in Scanner().pictures(table.parent):
        for key in {picture.name.casefold(), picture.stem.casefold()}:
            pictures.setdefault(key, []).append(picture)
    found, split = {}, hinted_split(table.stem)
    for name, own in parts.items():
        *folders, last = own[common:]
        fitting = [
            p for p in pictures.get(last, []) if [*map(str.casefold, p.parts)][-1 - len(folders) : -1] == folders
        ]
        if len(fitting) > 1 and split:
            fitting = [p for p in fitting if split == hinted_split(p.relative_to(table.parent).parts[0])] or fitting
        if len(fitting) > 1:
            raise DataError(f"{table} names {name}, which may be {fitting[0]} or {fitting[1]}")
        if fitting:
            found[name] = fitting[0]
    return found


def _file(table: Path, name: str) -> Path | None:
    """The file that a cell names, from the table's folder; with the separators of either system."""
    for way in dict.fromkeys((name, name.replace("\\", "/"))):
        try:
            if way and (table.parent / way).is_file():
                return table.parent / way
        except (OSError, ValueError):  # too long, or with a character that no path has
            pass
    return None
