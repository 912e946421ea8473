"""Labels of splits whose pictures lie side by side in one folder, as ImageNet and Tiny ImageNet are downloaded."""

import xml.etree.ElementTree as ET
from pathlib import Path

from ..errors import DataError

KAGGLE, TINY, DEVKIT = "LOC_val_solution.csv", "val_annotations.txt", "ILSVRC2012_devkit_t12/data"


def flat_labels(folder: Path) -> dict[str, str]:
    """The class of each picture, by the picture's name without suffix, from a list that lies in `folder` or up to four
    folders above it; an empty dictionary where there is none.

    Lists: LOC_val_solution.csv and Annotations/CLS-LOC/val/*.xml (ImageNet from Kaggle), ILSVRC2012_devkit_t12/data
    (ImageNet), val_annotations.txt (Tiny ImageNet). Raises DataError where a list is damaged.
    """
    annotations = f"Annotations/CLS-LOC/{folder.name}"
    for above in (folder, *folder.absolute().parents[:4]):
        for name, read in ((TINY, _tiny), (KAGGLE, _kaggle), (DEVKIT, _devkit), (annotations, _annotations)):
            path = above / name
            if path.exists():
                try:
                    return read(path)
                except Exception as error:  # XML, MATLAB files and cut lines raise different types
                    raise DataError(f"{path} cannot be read as the labels of {folder}: {error}") from error
    return {}


def _tiny(path: Path) -> dict[str, str]:
    """Lines of name, class and box, separated by tabs."""
    lines = (line.split("\t") for line in path.read_text().splitlines())
    return {Path(name).stem: label for name, label, *_ in lines}


def _kaggle(path: Path) -> dict[str, str]:
    """Lines of "name,class box class box ..." below a header."""
    lines = (line.split(",") for line in path.read_text().splitlines()[1:] if line.strip())
    return {name: boxes.split()[0] for name, boxes in lines}


def _annotations(path: Path) -> dict[str, str]:
    """One XML file for each picture."""
    labels = {file.stem: ET.parse(file).findtext("object/name") for file in path.glob("*.xml")}
    return {name: label for name, label in labels.items() if label}


def _devkit(path: Path) -> dict[str, str]:
    """The numbers of the classes in the order of the pictures, and a MATLAB file that names them."""
    from scipy.io import loadmat

    rows = loadmat(path / "meta.mat", squeeze_me=True)["synsets"]
    names = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows if int(row["num_children"]) == 0}
    numbers = (path / "ILSVRC2012_validation_ground_truth.txt").read_text().split()
    return {f"ILSVRC2012_val_{i:08d}": names[int(number)] for i, number in enumerate(numbers, 1)}
