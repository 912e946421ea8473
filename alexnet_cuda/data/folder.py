"""Any labelled pictures: a tree with train/ val/ test/, class folders that are split here, or a CSV of path,label."""

import csv
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DataError
from ..recipe import Recipe
from .imageset import ImageSet, Items, Split, data_folder, for_each_file, open_image, stratified_split

SIZE = None
Tree = list[tuple[Path, int]]  # image files and their labels


def load(recipe: Recipe) -> ImageSet:
    """The pictures under `recipe.data_path`, RGB or, with one input channel, grey.

    With train/, the folders decide: test/ is the test split, or val/ where there is no test/; a missing validation
    split is cut off train/. Without train/, the class folders are split in three with `recipe.split_seed`. A CSV file
    with the columns path (from its own folder) and label does as well, and may have a column split of train, val, test.
    With `recipe.verify` every picture is decoded once before training: damaged ones are an error that lists them, or
    left out and listed with `recipe.skip_corrupt`.
    """
    root = data_folder(recipe, ": a folder of class folders (or of train, val, test), or a CSV")
    if recipe.data == "bike-ship" and (root / "bike_ship").is_dir():  # --data-path names the folder above
        root = root / "bike_ship"
    if root.is_dir():
        classes = _classes(root / "train" if (root / "train").is_dir() else root)
        trees = {name: _tree(root / name, classes) for name in ("train", "val", "test") if (root / name).is_dir()}
        if "train" not in trees:
            trees = {"all": _tree(root, classes)}
    elif root.suffix.lower() == ".csv":
        classes, trees = _table(root)
    else:
        raise DataError(f"{root} is not a folder")

    damaged = _damaged([path for tree in trees.values() for path, _ in tree]) if recipe.verify else {}
    notes = [f"left out: {message}" for message in damaged.values()]
    if damaged and not recipe.skip_corrupt:
        listing = "\n  ".join(damaged.values())
        raise DataError(f"{len(damaged)} damaged image(s); --skip-corrupt leaves them out:\n  {listing}")
    trees = {name: [item for item in tree if item[0] not in damaged] for name, tree in trees.items()}
    train, val, test = trees.get("train"), trees.get("val"), trees.get("test")
    if lacking := set(range(len(classes))) - {label for _, label in (trees["all"] if train is None else train)}:
        raise DataError(f"class {classes[min(lacking)]!r} of {root} has no training image that can be read")
    if train is None:
        test, val, train = _cut(trees["all"], (recipe.test_fraction, recipe.val_fraction), recipe.split_seed)
    if test is None:
        test, val = val, None
    if test is None:
        test, train = _cut(train, (recipe.test_fraction,), recipe.split_seed)
    if val is None:
        val, train = _cut(train, (recipe.val_fraction,), recipe.split_seed)
    decode = functools.partial(read, recipe)
    parts = [tuple(zip(*tree)) or ((), ()) for tree in (train, val, test)]
    splits = [Split(Items(paths, decode), torch.tensor(labels, dtype=torch.int64)) for paths, labels in parts]
    return ImageSet(classes, splits[0], splits[1], splits[2], SIZE, notes)


def read(recipe: Recipe, path: Path) -> Tensor:
    """A picture in its own size, (3, H, W) or (1, H, W) as the network takes it."""
    return open_image(path, "L" if recipe.channels == 1 else "RGB")


def _classes(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(names) < 2:
        found = f"only the class folder {names[0]!r}" if names else "no class folder"
        raise DataError(f"{folder} has {found}, expected one folder for each of two or more classes")
    return names


def _tree(folder: Path, classes: list[str]) -> Tree:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    present = _classes(folder)
    if unknown := [name for name in present if name not in classes]:
        raise DataError(f"{folder / unknown[0]} is a class that the training folder lacks; it has {', '.join(classes)}")
    tree = []
    for name in present:
        found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
        if not found:
            raise DataError(f"{folder / name} holds no image ({' '.join(IMG_EXTENSIONS)})")
        tree += [(path, classes.index(name)) for path in found]
    return tree


def _table(path: Path) -> tuple[list[str], dict[str, Tree]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns, rows = reader.fieldnames or [], list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV: {error}") from error
    if missing := {"path", "label"} - set(columns):
        raise DataError(f"{path} has no column {min(missing)!r}; its columns are {', '.join(columns) or 'none'}")
    for number, row in enumerate(rows, 2):
        if not row["path"] or not row["label"]:
            raise DataError(f"line {number} of {path} lacks a path or a label")
    classes = sorted({row["label"] for row in rows})
    if len(classes) < 2:
        raise DataError(f"{path} has {len(classes)} label(s), expected two or more")
    trees: dict[str, Tree] = {}
    for number, row in enumerate(rows, 2):
        name = row.get("split") or "all"
        if name not in ("train", "val", "test", "all"):
            raise DataError(f"line {number} of {path} has the split {name!r}, expected train, val or test")
        if not (path.parent / row["path"]).is_file():
            raise DataError(f"line {number} of {path} names {path.parent / row['path']}, which is no file")
        trees.setdefault(name, []).append((path.parent / row["path"], classes.index(row["label"])))
    if ("all" in trees and len(trees) > 1) or not trees.keys() & {"all", "train"}:
        raise DataError(f"the column split of {path} must be train, val or test in every line, with train among them")
    return classes, trees


def _damaged(paths: list[Path]) -> dict[Path, str]:
    def check(path: Path) -> str | None:
        try:
            open_image(path, "RGB")
        except DataError as error:
            return str(error)
        return None

    messages = for_each_file(check, paths, "checking images")
    return {path: message for path, message in zip(paths, messages, strict=True) if message}


def _cut(tree: Tree, fractions: Sequence[float], seed: int) -> list[Tree]:
    parts = stratified_split(torch.tensor([label for _, label in tree]), fractions, seed)
    return [[tree[i] for i in part] for part in parts]
