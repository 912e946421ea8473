"""What is known of picture files once they were decoded: damage, duplicates and changes; remembered between runs."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_folders import recipe, write

from alexnet_cuda.data import folder, load_images, verify
from alexnet_cuda.data.inspection import inspect
from alexnet_cuda.errors import DataError


def test_facts_of_many_files_are_remembered_until_they_change(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verify, "REMEMBERED", 10)
    examined, examine = [], verify.examine
    monkeypatch.setattr(verify, "examine", lambda path: examined.append(path.name) or examine(path))
    write(tmp_path / "data" / "cat", tmp_path / "data" / "dog", count=6)
    first = load_images(recipe(tmp_path / "data"))
    assert len(examined) == 12
    (tmp_path / "data" / "dog" / "3.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"1 damaged image(.|\n)*dog/3.png"):
        load_images(recipe(tmp_path / "data"))
    assert examined[12:] == ["3.png"]
    with pytest.raises(DataError, match=r"1 damaged image(.|\n)*dog/3.png"):
        load_images(recipe(tmp_path / "data"))
    assert len(examined) == 13
    for file in (tmp_path / "cache").rglob("*.json"):
        file.write_text("{")
    assert load_images(recipe(tmp_path / "data", skip_corrupt=True)).classes == first.classes
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1
    assert not any("cache" in str(path) for path in (tmp_path / "data").rglob("*"))


def test_many_damaged_files_are_listed_in_part_and_inspected_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "LISTED", 2)
    write(tmp_path / "cat", tmp_path / "dog", count=9)
    for n in range(4):
        (tmp_path / "cat" / f"{n}.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"4 damaged image(.|\n)*and 2 others, which `alexnet-cuda inspect` lists"):
        load_images(recipe(tmp_path))
    notes = load_images(recipe(tmp_path, skip_corrupt=True)).notes
    assert [note.partition(":")[0] for note in notes].count("left out") == 3
    found = inspect(recipe(tmp_path))
    assert len(found.damaged) == 4
    assert "left out" not in " ".join(found.images.notes)


def test_a_file_that_could_not_be_read_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "REMEMBERED", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path / "data" / "cat", tmp_path / "data" / "dog", count=5)
    read = Path.read_bytes

    def failing(path):
        if path.name == "0.png" and path.parent.name == "cat":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(DataError, match="Permission denied"):
        load_images(recipe(tmp_path / "data"))
    monkeypatch.setattr(Path, "read_bytes", read)
    assert sum(map(sum, load_images(recipe(tmp_path / "data")).counts().values())) == 10


def test_the_same_content_in_train_and_test_is_counted(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / split / "cat", tmp_path / split / "dog", count=8)
    for i in range(3):
        shutil.copy(tmp_path / "train" / "cat" / f"{i}.png", tmp_path / "test" / "cat" / f"copy-{i}.png")
    shutil.copy(tmp_path / "train" / "cat" / "0.png", tmp_path / "train" / "dog" / "copy.png")
    notes = "\n".join(load_images(recipe(tmp_path)).notes)
    assert "same content as a picture of train: 3 pictures of test" in notes
    assert "same content under two labels: 1 time, as" in notes


def test_changed_pictures_are_counted(tmp_path):
    write(tmp_path / "cat", tmp_path / "dog", count=5)
    for i in range(3):
        Image.fromarray(np.full((4, 4), 9000 + i, np.uint16)).save(tmp_path / "cat" / f"deep-{i}.png")
    assert "3 pictures: 16 bits scaled to 8" in load_images(recipe(tmp_path)).notes
