"""Any labelled pictures: a tree of splits or of class folders, or a table of paths and labels."""

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DataError, RecipeError
from ..recipe import Recipe
from ..sources import data_path
from .imageset import ImageSet, Items, Split
from .layout import read_tree
from .picture import open_image
from .scan import ARCHIVES, Scanner, count, printable, split_of
from .table import SUFFIXES, Tree, read_table
from .verify import Facts, examine_all, notes_on, notes_on_duplicates

SIZE = None
INSIDE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")  # where the pictures of ImageNet lie in its download
LISTED = 50  # damaged files that a message names


@dataclass
class Survey:
    """What lies at `root`: class names, the pictures of each split with their labels, notes for the user, and what is
    known of each file, if it was decoded."""

    root: Path
    classes: list[str]
    trees: dict[str, Tree]
    notes: list[str]
    facts: dict[Path, Facts] = field(default_factory=dict)

    @property
    def training(self) -> Tree:
        """The pictures of the training split, or all where there are no splits."""
        return self.trees.get("all") or self.trees.get("train", [])

    @property
    def damaged(self) -> list[str]:
        """Why files cannot be read."""
        return [printable(facts.error) for facts in self.facts.values() if facts.error]


def load(recipe: Recipe) -> ImageSet:
    """The pictures under `recipe.data_path`, RGB or, with one input channel, grey.

    With a training folder (train, Training, train_set, ...) the folders decide: the test folder is the test split, or
    the validation folder where there is none; a missing validation split is cut off the training one. Class folders
    without splits are split in three. A CSV file with the columns path (from its own folder) and label does as well,
    and may have a column split. A picture's split depends on its path and `recipe.split_seed` alone, so that other
    pictures can be added. With `recipe.verify` every picture is decoded once before training: damaged ones are an error
    that lists them, or left out and listed with `recipe.skip_corrupt`.
    """
    found = survey(recipe)
    if lacking := set(range(len(found.classes))) - {label for _, label in found.training}:
        name = found.classes[min(lacking)]
        raise DataError(f"class {name!r} of {found.root} has no training image that can be read")
    found.notes += _left_out(found)
    return image_set(found, recipe)


def image_set(found: Survey, recipe: Recipe) -> ImageSet:
    """The splits of what was found, with the missing ones cut off the training split."""
    trees = {name: tree for name, tree in found.trees.items() if name != "all"}
    if "test" not in trees and "val" in trees:
        trees["test"] = trees.pop("val")
    fractions = {"test": recipe.test_fraction, "val": recipe.val_fraction}
    missing = {name: fraction for name, fraction in fractions.items() if name not in trees}
    trees |= cut(found.training, found.root, missing, recipe.split_seed)
    train, val, test = (_split(recipe, trees[name]) for name in ("train", "val", "test"))
    notes = found.notes + notes_on_duplicates(trees, found.classes, found.facts)
    return ImageSet(found.classes, train, val, test, SIZE, notes)


def load_test(recipe: Recipe, classes: Sequence[str]) -> ImageSet:
    """The pictures under `recipe.data_path` as new ones for a network with these classes: all are the test split; or
    those of the test folder, or else of the validation folder, where there is one. Damaged pictures are left out."""
    found = survey(recipe.replace({"skip_corrupt": True}), classes)
    found.notes += _left_out(found)
    name = next((name for name in ("test", "val", "train", "all") if found.trees.get(name)), None)
    if name is None:
        raise DataError(f"{found.root} holds no picture of the classes {', '.join(classes[:10])}")
    if name in ("train", "all"):
        number = count(len(found.trees[name]), "picture")
        found.notes.append(
            f"all {number} of {printable(found.root)} are tested, also any that the network learned from"
        )
    none = _split(recipe, [])
    return ImageSet(list(classes), none, none, _split(recipe, found.trees[name]), SIZE, found.notes)


def read(recipe: Recipe, path: Path) -> Tensor:
    """A picture, (3, H, W) or (1, H, W) as the network takes it, in its own size unless it is very long, or much larger
    than any crop needs."""
    edge = max(recipe.train_short_side, recipe.test_short_side)
    return open_image(path, "L" if recipe.channels == 1 else "RGB", edge=edge)


def survey(recipe: Recipe, known: Sequence[str] | None = None) -> Survey:
    """What lies under `recipe.data_path`; see `load`. known: the classes of a trained network."""
    root = data_path(recipe)
    if recipe.data == "bike-ship" and (root / "bike_ship").is_dir():  # --data-path names the folder above
        root = root / "bike_ship"
    root = next((root / name for name in INSIDE if (root / name).is_dir()), root)
    if root.is_dir():
        scanner = Scanner()
        classes, trees = read_tree(root, scanner, known)
        notes = scanner.notes()
    elif root.suffix.lower() in SUFFIXES:
        classes, trees, notes = read_table(root, known)
        root = root.parent
    else:
        unpack = "; unpack it first" if root.suffix.lower() in ARCHIVES else ""
        raise DataError(f"{root} is a file, expected a folder of pictures or a table ({', '.join(SUFFIXES)}){unpack}")
    found = Survey(root, classes, trees, notes)
    if recipe.verify:
        found.facts = examine_all(root, [path for tree in trees.values() for path, _ in tree])
        found.notes += notes_on(found.facts.values())
        if found.damaged and not recipe.skip_corrupt:
            listing = "\n  ".join(_listed(found.damaged))
            raise DataError(f"{len(found.damaged)} damaged image(s); --skip-corrupt leaves them out:\n  {listing}")
        whole = {path for path, facts in found.facts.items() if not facts.error}
        found.trees = {name: [item for item in tree if item[0] in whole] for name, tree in trees.items()}
    else:
        found.notes.append("without --verify, damaged pictures and duplicates are not looked for")
    return found


def require_outside(folder: Path, recipe: Recipe) -> None:
    """RecipeError where pictures that are written to `folder` would become a class of the data set."""
    if recipe.data != "folder" or recipe.data_path is None:
        return
    root, folder = Path(recipe.data_path).resolve(), folder.resolve()
    inside = root.is_dir() and root in (folder, *folder.parents)
    if inside and not any(split_of(path.name) for path in root.iterdir()):
        raise RecipeError(f"{folder} lies in the data folder {root}: name a folder outside with --output")


def cut(tree: Tree, root: Path, fractions: Mapping[str, float], seed: int) -> dict[str, Tree]:
    """The splits that `fractions` ask for, and the rest as train. A picture's place depends on its path below `root`
    and the seed, not on the other pictures; but a class of more pictures than splits has one in each."""
    parts: dict[str, Tree] = {name: [] for name in (*fractions, "train")}
    by_class: dict[int, list[tuple[float, int]]] = {}
    for index, (path, label) in enumerate(tree):
        by_class.setdefault(label, []).append((_place(os.path.relpath(path, root), seed), index))
    for places in by_class.values():
        places.sort()
        spare, begin, below = len(places) - len(fractions), 0, 0.0
        for name, fraction in fractions.items():
            below += fraction
            number = sum(place < below for place, _ in places) - begin
            number = min(max(number, 1), spare, len(places) - 1 - begin) if fraction and spare > 0 else 0
            parts[name] += [tree[index] for _, index in places[begin : begin + number]]
            begin += number
        parts["train"] += [tree[index] for _, index in places[begin:]]
    order = {path: index for index, (path, _) in enumerate(tree)}
    return {name: sorted(part, key=lambda item: order[item[0]]) for name, part in parts.items()}


def _place(path: str, seed: int) -> float:
    """A number of 0 to 1 that looks random and depends on both."""
    key = f"{seed}/{printable(path)}".encode()
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big") / 2**64


def _split(recipe: Recipe, tree: Tree) -> Split:
    labels = torch.tensor([label for _, label in tree], dtype=torch.int64)
    return Split(Items([path for path, _ in tree], functools.partial(read, recipe)), labels)


def _listed(damaged: list[str]) -> list[str]:
    """The first of them, and the number of the others."""
    others = len(damaged) - LISTED
    more = [f"and {count(others, 'other')}, which `alexnet-cuda inspect` lists"] if others > 0 else []
    return damaged[:LISTED] + more


def _left_out(found: Survey) -> list[str]:
    return [f"left out: {message}" for message in _listed(found.damaged)]
