"""What a folder of pictures holds: which folders are splits, which are classes, and the pictures of each."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from .flat import flat_labels
from .scan import ARCHIVES, Scanner, alike, count, hinted_split, printable, shortened, split_of
from .table import Tree

ROLES = ("train", "val", "test")
NO_CLASS = ("images", "img", "imgs", "unknown", "unlabeled", "unlabelled")  # the folder of a split without labels


def read_tree(root: Path, found: Scanner, known: Sequence[str] | None = None) -> tuple[list[str], dict[str, Tree]]:
    """The class names, and the pictures of each split with their labels, of a folder of splits or of classes.

    Class folders without splits are the split "all". With `known`, the classes of a trained network, there need be no
    training split, nor all classes. What is left out is counted in `found`. Raises DataError where it is not clear what
    a folder is: no class folder, two folders for one split, a class that the training split lacks.
    """
    while len(inner := found.folders(root)) == 1 and not _is_class_or_split(inner[0], known):
        if not found.folders(inner[0]):
            break
        root = inner[0]
    splits, plain = _splits(root, found, known)
    found.count_loose(root)
    for table in _tables(root, found):
        found.told.append(f"left out: the table {printable(table)}, which --data-path may name")
    if not splits:
        return _read_classes(root, found, known)
    if known is not None and splits.keys() & {"val", "test"}:
        train, where = {}, root
    elif "train" in splits:
        train, where = _class_folders(splits["train"], found, known), splits["train"]
        found.count_loose(where)
        for folder in plain:
            found.told.append(f"left out: the folder {printable(folder)} beside {where.name}/")
    else:
        train, where, others = _named(plain), root, " and ".join(f"{folder.name}/" for folder in splits.values())
        if len(train) < 2:
            raise DataError(f"{root} holds {others} but no training split, as train/")
        found.told.append(f"the class folders beside {others} in {printable(root)} are taken as the training split")
    pictures = {name: _of_class(name, folders, found) for name, folders in train.items()}
    classes = list(known) if known is not None else _classes(pictures, where, found)
    _tell_of_several_folders(pictures, found)
    trees = {"train": _labelled(pictures, classes, where)} if train else {}
    for role in ("val", "test"):
        if role in splits and (tree := _read_split(splits[role], classes, found)):
            trees[role] = tree
    return classes, trees


def _splits(root: Path, found: Scanner, known: Sequence[str] | None) -> tuple[dict[str, Path], list[Path]]:
    """The folders of splits in `root`, in the order of ROLES, and the other folders."""
    named: dict[str | None, list[Path]] = {}
    for folder in found.folders(root):
        named.setdefault(None if printable(folder.name) in (known or ()) else split_of(folder.name), []).append(folder)
    plain = named.pop(None, [])
    hinted = [folder for folder in plain if hinted_split(folder.name)]  # as my_train and my_test
    if known is None and not named and len({hinted_split(folder.name) for folder in hinted}) > 1:
        splits = all(found.folders(folder) for folder in hinted)
        for folder in hinted if splits else []:
            named.setdefault(hinted_split(folder.name), []).append(folder)
            plain.remove(folder)
        names = ", ".join(printable(folder.name) for folder in hinted)
        found.told.append(f"taken as {'splits, not as classes' if splits else 'classes, not as splits'}: {names}")
    if plain and named.keys() == {"train"} and not any(found.folders(folder) for folder in named["train"]):
        plain = sorted(plain + named.pop("train"))  # a vehicle among others
        found.told.append(f"{printable(root)}/train holds pictures beside class folders: it is taken as a class")
    for twins in named.values():
        if len(twins) > 1:
            names = " and ".join(f"{folder.name}/" for folder in twins)
            raise DataError(f"{root} holds {names}, which look like the same split; leave one of them")
    return {role: named[role][0] for role in ROLES if role in named}, plain


def _read_classes(root: Path, found: Scanner, known: Sequence[str] | None) -> tuple[list[str], dict[str, Tree]]:
    """Class folders in `root`, each with pictures or with one more folder for each split."""
    pictures = {name: _of_class(name, folders, found) for name, folders in _named(found.folders(root)).items()}
    classes = list(known) if known is not None else _classes(pictures, root, found)
    tree = _labelled(pictures, classes, root)
    parts: dict[str | None, Tree] = {}
    for item in tree:
        inside = item[0].relative_to(root).parts[1:-1]
        parts.setdefault(split_of(inside[0]) if inside else None, []).append(item)
    rest = parts.pop(None, [])
    if not parts:
        _tell_of_several_folders(pictures, found)
        return classes, {"all": tree}
    if rest or (known is None and "train" not in parts):
        where = f"but {rest[0][0]} does not" if rest else "but none of them is for training"
        one = next(iter(parts.values()))[0][0]
        raise DataError(f"some pictures of {root} lie in folders of splits, as {one}, {where}")
    return classes, {role: parts[role] for role in ROLES if role in parts}


def _read_split(folder: Path, classes: Sequence[str], found: Scanner) -> Tree:
    """The labelled pictures of a validation or test split: class folders, or pictures for which a list has labels."""
    named, name = _class_folders(folder, found, classes), printable(folder.name)
    if not named.keys() & set(classes) and (labels := flat_labels(folder)):
        number = {c: label for label, c in enumerate(classes)}
        flat = found.pictures(folder)
        tree = [(path, number[labels[path.stem]]) for path in flat if labels.get(path.stem) in number]
        if len(tree) < len(flat):
            found.told.append(
                f"left out: {count(len(flat) - len(tree), 'picture')} of {name}/ with no or another class"
            )
        return tree
    inner = found.folders(folder)
    if len(inner) == 1 and not named.keys() & set(classes) and _is_no_class(inner[0].name):
        return _read_split(inner[0], classes, found)
    found.count_loose(folder)
    pictures = {name: [p for f in folders for p in found.pictures(f)] for name, folders in named.items()}
    tree = _labelled(pictures, classes, folder)
    lacking = [name for name in classes if not pictures.get(name)]
    if not tree:
        found.told.append(f"left out: {name}/, which has no class folder with pictures")
    elif lacking:
        found.told.append(f"{name}/ has no picture of {shortened(lacking)}")
    return tree


def _class_folders(folder: Path, found: Scanner, known: Sequence[str] | None) -> dict[str, list[Path]]:
    """The class folders in a split's folder, by name; a folder that only holds the folder of the classes is passed."""
    inner = found.folders(folder)
    if len(inner) == 1 and printable(inner[0].name) not in (known or ()) and found.folders(inner[0]):
        return _class_folders(inner[0], found, known)
    return _named(inner)


def _named(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Folders by their printable names, which two of them may share."""
    named: dict[str, list[Path]] = {}
    for folder in folders:
        named.setdefault(printable(folder.name).strip(), []).append(folder)
    return named


def _of_class(name: str, folders: Sequence[Path], found: Scanner) -> list[Path]:
    before = found.suffixes.copy()
    paths = [path for folder in folders for path in found.pictures(folder)]
    if not paths and (others := found.suffixes - before):
        kinds = ", ".join(kind or "no suffix" for kind in others)
        raise DataError(f"{folders[0]} holds no image that can be read, only {count(others.total(), 'file')} ({kinds})")
    if not paths:
        found.told.append(f"left out: the class {name}, whose folder holds no picture")
    return paths


def _labelled(pictures: dict[str, list[Path]], classes: Sequence[str], where: Path) -> Tree:
    for name, paths in pictures.items():
        if paths and name not in classes:
            meant = difflib.get_close_matches(name.lower(), [c.lower() for c in classes], 1)
            hint = f"; did you mean {next(c for c in classes if c.lower() == meant[0])!r}?" if meant else ""
            raise DataError(
                f"{where / name} is a class that the training folder lacks; it has {shortened(classes)}{hint}"
            )
    return [(path, label) for label, name in enumerate(classes) for path in pictures.get(name, ())]


def _tell_of_several_folders(pictures: dict[str, list[Path]], found: Scanner) -> None:
    """Perhaps the folders that were taken as classes are something else, as fold_1 and fold_2."""
    inner = {name: sorted({path.parent for path in paths}) for name, paths in pictures.items()}
    below = {tuple(folder.name for folder in folders) for folders in inner.values()}
    if len(inner) > 1 and len(below) == 1 and len(names := min(below)) > 1:
        found.told.append(
            f"each of the class folders {shortened(sorted(inner))} holds the folders {shortened(names)}: where those "
            "are the classes, call the folders above them train/, val/ and test/"
        )
        return
    if several := [folders for folders in inner.values() if len(folders) > 1]:
        pair = " and ".join(map(printable, several[0][:2]))
        found.told.append(f"of {len(several)} of {len(inner)} classes the pictures lie in several folders, as {pair}")


def _tables(folder: Path, found: Scanner) -> list[Path]:
    return found.files(folder, (".csv", ".tsv"))


def _remedy(folder: Path, found: Scanner) -> str:
    """What may help where a folder has no classes."""
    if tables := _tables(folder, found):
        return f"; --data-path {tables[0]} reads that table"
    if archives := found.files(folder, ARCHIVES):
        return f"; {archives[0].name} must be unpacked first"
    if found.hidden:
        return f"; names that begin with a dot are passed over, as {found.hidden[0]}"
    return "; a CSV with the columns path and label can name their classes" if found.loose(folder) else ""


def _classes(pictures: dict[str, list[Path]], folder: Path, found: Scanner) -> list[str]:
    names = sorted(name for name, paths in pictures.items() if paths)
    if len(names) < 2:
        has = f"only the class folder {names[0]!r}" if names else "no class folder with pictures"
        expected = f"expected one folder for each of two or more classes{_remedy(folder, found)}"
        raise DataError(f"{folder} has {has}, {expected}")
    found.told += [f"the class folders {a!r} and {b!r} are two classes" for a, b in alike(names)]
    return names


def _is_no_class(name: str) -> bool:
    return split_of(name) is not None or name.lower() in NO_CLASS


def _is_class_or_split(folder: Path, known: Sequence[str] | None) -> bool:
    return split_of(folder.name) is not None or printable(folder.name) in (known or ())
