"""Files below a folder: links are followed, system files passed over, and everything that is left out is counted."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

from ..errors import DataError
from .picture import suffixes

# Of Windows, macOS, Synology, QNAP, file systems and Python; names that begin with "." are passed over, too.
LITTER = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "$recycle.bin", "lost+found", "@eadir",
          "system volume information", "#recycle", "#snapshot", "@recycle", "@tmp", "__pycache__"}  # fmt: skip
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
SPLITS = {
    **dict.fromkeys(("train", "training", "trn", "trainval"), "train"),
    **dict.fromkeys(
        ("val", "valid", "validate", "validation", "dev", "devel", "development", "eval", "evaluation"), "val"
    ),
    **dict.fromkeys(("test", "testing", "tst", "holdout"), "test"),
}
# Words that stand beside them, as in test_set, seg_train or ILSVRC2012_img_val.
BESIDE = r"(?:set|data|dataset|images?|imgs?|pictures?|photos?|samples?|split|folder|files?|seg|ilsvrc)"
WORD = re.compile(rf"{BESIDE}*?({'|'.join(sorted(SPLITS, key=len, reverse=True))}){BESIDE}*")
Entries = tuple[list[os.DirEntry], list[os.DirEntry]]  # folders and files


def is_litter(name: str) -> bool:
    return name.startswith((".", "~$", "@__")) or name.lower() in LITTER


def split_of(name: str) -> str | None:
    """The split that a name such as "Training", "valid" or "test_set" stands for: train, val, test, or None."""
    match = WORD.fullmatch("".join(re.findall(r"[^\W\d_]+", name.lower())))
    return SPLITS[match[1]] if match else None


def hinted_split(name: str) -> str | None:
    """The split that one word of a name stands for, as in my_train, XTest or tr."""
    words = (word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name))
    known = {**SPLITS, "tr": "train", "va": "val", "te": "test"}
    return next((known[word] for word in words if word in known), None)


def printable(text: str | Path) -> str:
    """A name in a form that every terminal, font and file takes: bytes that are not UTF-8 and control characters as
    escapes, letters with accents composed as on most systems (NFC)."""
    text = os.fsencode(str(text)).decode("utf-8", "backslashreplace")
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return unicodedata.normalize("NFC", "".join(escaped))


def alike(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of names that may mean the same: they differ in case only, or are the same number."""
    seen: dict[str | float, str] = {}
    pairs = []
    for name in sorted(names):
        try:
            key: str | float = float(name)
        except ValueError:
            key = name.casefold()
        if (other := seen.setdefault(key, name)) != name:
            pairs.append((other, name))
    return pairs


def shortened(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def count(number: int, noun: str, rest: str = "") -> str:
    """ "1 file", "2,000 files that are damaged"."""
    return f"{number:,} {noun}{'s' if number != 1 else ''}{' ' if rest else ''}{rest}"


class Scanner:
    """Lists folders, and counts what it leaves out: see `notes`."""

    def __init__(self) -> None:
        self.suffixes = Counter[str]()  # of files that are no pictures
        self.others = Counter[tuple[str, str]]()  # anything else, by what it is
        self.hidden: list[str] = []  # names of folders that begin with "."
        self.told: list[str] = []  # notes of those who use it
        self._listed: dict[str, Entries] = {}

    def folders(self, folder: Path) -> list[Path]:
        """The folders in a folder, by name."""
        return [folder / entry.name for entry in self._entries(str(folder))[0]]

    def files(self, folder: Path, suffixes: Container[str]) -> list[Path]:
        """The files with one of these suffixes that lie in a folder itself, by name."""
        return [folder / entry.name for entry in self._entries(str(folder))[1] if self._suffix(entry) in suffixes]

    def loose(self, folder: Path) -> list[Path]:
        """The pictures that lie in a folder itself, by name."""
        return self.files(folder, suffixes())

    def pictures(self, folder: Path) -> list[Path]:
        """The pictures at any depth below a folder. A link that leads back to a folder above it is not followed."""
        found: list[str] = []
        above = [os.stat(parent) for parent in folder.absolute().parents]
        self._collect(str(folder), tuple((status.st_dev, status.st_ino) for status in above), found)
        return [Path(path) for path in sorted(found)]

    def count_loose(self, folder: Path) -> None:
        """Counts the pictures that lie in a folder itself among those that are left out."""
        if number := len(self.loose(folder)):
            self.told.append(f"left out: {count(number, 'picture')} in {printable(folder)} itself, outside its folders")

    def notes(self) -> list[str]:
        """What was left out, with counts."""
        kinds = [(n, f"with the suffix {s}" if s else "without a suffix") for s, n in self.suffixes.most_common()]
        notes = [f"left out: {count(n, noun, rest)}" for (noun, rest), n in sorted(self.others.items())]
        if self.hidden:
            notes.append(f"left out: {count(len(self.hidden), 'hidden folder')}: {shortened(sorted(self.hidden))}")
        if kinds:
            listed = [count(kinds[0][0], "file", kinds[0][1]), *(f"{n:,} {kind}" for n, kind in kinds[1:10])]
            rest = sum(n for n, _ in kinds[10:])
            notes.append(f"left out: {', '.join(listed)}{f' and {rest:,} with others' if rest else ''}")
        return [*self.told, *notes]

    def _collect(self, folder: str, above: tuple[tuple[int, int], ...], found: list[str]) -> None:
        status = os.stat(folder)
        own = (status.st_dev, status.st_ino)
        if own in above:
            self.others["link", "to a folder above"] += 1
            return
        folders, files = self._entries(folder, keep=False)
        for entry in files:
            suffix = self._suffix(entry)
            if suffix in suffixes():
                found.append(entry.path)
            else:
                self.suffixes[printable(suffix)] += 1
        for entry in folders:
            self._collect(entry.path, (*above, own), found)

    def _entries(self, folder: str, keep: bool = True) -> Entries:
        """The folders and the files in a folder, by name; with `keep`, listed and counted only once."""
        if folder in self._listed:
            return self._listed[folder]
        folders: list[os.DirEntry] = []
        files: list[os.DirEntry] = []
        try:
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if kind := self._kind(entry):
                        (folders if kind == "folder" else files).append(entry)
        except OSError as error:
            raise DataError(f"{folder} cannot be read: {error.strerror}") from error
        if keep:
            self._listed[folder] = folders, files
        return folders, files

    def _kind(self, entry: os.DirEntry) -> str | None:
        """ "folder" or "file", links followed; None, and counted, for anything else."""
        try:
            if is_litter(entry.name):
                if entry.name.startswith(".") and entry.is_dir():  # perhaps a class
                    self.hidden.append(printable(entry.name))
                else:
                    self.others["hidden or system file", ""] += 1
                return None
            if entry.is_dir():
                return "folder"
            if entry.is_file():
                return "file"
        except OSError:  # a link to itself
            pass
        self.others[("link", "to nothing") if entry.is_symlink() else ("socket, pipe or device", "")] += 1
        return None

    @staticmethod
    def _suffix(entry: os.DirEntry) -> str:
        return os.path.splitext(entry.name)[1].lower()
