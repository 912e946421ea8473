"""Folders and tables of pictures as people have them: read as meant, or one sentence; what is left out is told."""

import os
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from alexnet_cuda.data import load_images, load_test_images
from alexnet_cuda.data.imageset import for_each_file
from alexnet_cuda.data.scan import split_of
from alexnet_cuda.errors import DataError
from alexnet_cuda.recipe import Recipe


def recipe(path, **values):
    return Recipe().replace({"data": "folder", "data_path": str(path), **values})


numbers = iter(range(10**9))


def write(*paths, count=None):
    """A picture, unlike all others, at each path; or `count` of them in each folder."""
    files = paths if count is None else [folder / f"{i}.png" for folder in paths for i in range(count)]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        n = next(numbers)
        Image.fromarray(np.array([[n % 256, n // 256 % 256], [n // 65536, 0]], np.uint8)).save(path)


def counts(path, **values):
    return {name: sum(n) for name, n in load_images(recipe(path, **values)).counts().items()}


@pytest.mark.parametrize(
    ("name", "split"),
    [("Training", "train"), ("TRAIN", "train"), ("train_set", "train"), ("seg_train", "train"), ("train2017", "train"),
     ("valid", "val"), ("Validation", "val"), ("dev", "val"), ("val-images", "val"), ("Testing", "test"),
     ("test_data", "test"), ("ILSVRC2012_img_val", "val"), ("trainer", None), ("cat", None), ("contest", None),
     ("testudo", None), ("bullet train", None), ("vale", None), ("Täst", None)],
)  # fmt: skip
def test_names_of_splits(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize(
    "names",
    [
        ("Training", "Validation", "Test"),
        ("train", "valid", "testing"),
        ("TRAIN", "dev", "test_set"),
        ("my_train", "my_val", "myTest"),
        ("tr", "va", "te"),
    ],
)
def test_splits_of_any_name_are_kept(tmp_path, names):
    for name, count in zip(names, (5, 3, 4), strict=True):
        write(tmp_path / name / "cat", tmp_path / name / "dog", count=count)
    images = load_images(recipe(tmp_path))
    assert images.classes == ["cat", "dog"]
    assert images.counts() == {"train": [5, 5], "val": [3, 3], "test": [4, 4]}


def test_splits_inside_the_classes_and_one_folder_deeper(tmp_path):
    for name in ("cat", "dog"):
        for split, count in (("train", 6), ("Test", 2)):
            write(tmp_path / "a" / name / split, count=count)
            write(tmp_path / "b" / "archive" / f"seg_{split}" / f"seg_{split}" / name, count=count)
    assert counts(tmp_path / "a")["test"] == counts(tmp_path / "b")["test"] == 4
    write(tmp_path / "a" / "cat", count=1)
    with pytest.raises(DataError, match="lie in folders of splits"):
        load_images(recipe(tmp_path / "a"))


def test_a_folder_that_looks_like_a_split_is_no_class(tmp_path):
    for name in ("val", "test"):
        write(tmp_path / name / "cat", tmp_path / name / "dog", count=3)
    with pytest.raises(DataError, match="holds val/ and test/ but no training split"):
        load_images(recipe(tmp_path))
    write(tmp_path / "cat", tmp_path / "dog", count=4)
    images = load_images(recipe(tmp_path))
    assert images.counts() == {"train": [4, 4], "val": [3, 3], "test": [3, 3]}
    assert any("are taken as the training split" in note for note in images.notes)
    (tmp_path / "testing").mkdir()
    with pytest.raises(DataError, match="test/ and testing/, which look like the same split"):
        load_images(recipe(tmp_path))


def test_a_train_among_other_vehicles_is_a_class(tmp_path):
    write(tmp_path / "steam train" / "old", tmp_path / "bullet train", count=4)
    assert load_images(recipe(tmp_path)).classes == ["bullet train", "steam train"]
    write(tmp_path / "bus", tmp_path / "train", count=5)
    images = load_images(recipe(tmp_path))
    assert images.classes == ["bullet train", "bus", "steam train", "train"]
    assert any("taken as a class" in note for note in images.notes)
    write(tmp_path / "new" / "train", tmp_path / "new" / "bus", count=2)
    assert load_test_images(recipe(tmp_path / "new"), images.classes).counts()["test"] == [0, 2, 0, 2]


def test_what_is_left_out_is_counted(tmp_path):
    write(tmp_path / "cat", tmp_path / "dog" / "more" / "deep", count=6)
    write(tmp_path / "cat" / ".ipynb_checkpoints" / "0.png", tmp_path / "@eaDir" / "0.png", tmp_path / "loose.png")
    for name in ("cat/._0.png", "cat/.DS_Store", "dog/Thumbs.db", "__MACOSX/cat/._0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for i in range(16):
        (tmp_path / "dog" / f"{i}.heic").write_bytes(b"x")
    (tmp_path / "dog" / "README").write_text("x")
    (tmp_path / "cat" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "cat" / "self.png").symlink_to("self.png")
    (tmp_path / "cat" / "loop").symlink_to(tmp_path)
    (tmp_path / "bird").mkdir()
    os.mkfifo(tmp_path / "dog" / "pipe.png")
    images = load_images(recipe(tmp_path))
    assert images.classes == ["cat", "dog"]
    assert sum(map(sum, images.counts().values())) == 12
    notes = "\n".join(images.notes)
    for note in (
        "left out: 16 files with the suffix .heic, 1 without a suffix",
        "left out: 2 links to nothing",
        "left out: 1 link to a folder above",
        "left out: 1 socket, pipe or device",
        "hidden or system files",
        "left out: 1 picture in",
        "left out: the class bird, whose folder holds no picture",
    ):
        assert note in notes, note


def test_folders_that_may_be_no_classes_are_told(tmp_path):
    write(*(tmp_path / fold / name for fold in ("fold_1", "Fold_1") for name in ("cat", "dog")), count=4)
    write(tmp_path / ".bird", count=1)
    (tmp_path / "labels.csv").write_text("x")
    notes = "\n".join(load_images(recipe(tmp_path)).notes)
    for note in (
        "each of the class folders Fold_1, fold_1 holds the folders cat, dog: where those are the classes",
        "the class folders 'Fold_1' and 'fold_1' are two classes",
        "left out: 1 hidden folder: .bird",
        "labels.csv, which --data-path may name",
    ):
        assert note in notes, note


def test_a_limit_leaves_no_split_empty(tmp_path):
    for name, count in (("train", 6), ("val", 1), ("test", 2)):
        write(tmp_path / name / "cat", tmp_path / name / "dog", count=count)
    for limit in (1, 3):
        images = load_images(recipe(tmp_path).replace({"limit": limit}))
        assert all(sum(numbers) for numbers in images.counts().values())


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("labels.csv", r"labels\.csv reads that table"), ("all.zip", r"all\.zip must be unpacked first"),
     (".cat/0.png", r"begin with a dot are passed over, as \.cat")],
)  # fmt: skip
def test_a_folder_without_classes_has_a_remedy(tmp_path, name, remedy):
    write(tmp_path / "pictures" / "0.png", tmp_path / ".cat" / "1.png")
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=f"has only the class folder 'pictures', expected .*{remedy}"):
        load_images(recipe(tmp_path))


def test_a_file_where_a_folder_is_expected(tmp_path):
    (tmp_path / "all.zip").write_bytes(b"x")
    with pytest.raises(DataError, match=r"all\.zip is a file, expected a folder.*; unpack it first"):
        load_images(recipe(tmp_path / "all.zip"))
    with pytest.raises(DataError, match="absent does not exist"):
        load_images(recipe(tmp_path / "absent"))


def test_a_test_split_without_labels_in_a_folder_of_its_own(tmp_path):
    write(*(tmp_path / "train" / "train" / name for name in ("cat", "dog")), tmp_path / "test" / "test", count=5)
    images = load_images(recipe(tmp_path))
    assert images.classes == ["cat", "dog"]
    assert any("left out: 5 pictures in" in note for note in images.notes)


def test_after_an_error_no_further_file_is_read(tmp_path):
    begun = []

    def fails(path):
        begun.append(path)
        time.sleep(0.01)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        for_each_file(fails, [tmp_path] * 400, "reading")
    assert len(begun) < 300


def test_links_are_followed(tmp_path):
    write(tmp_path / "store" / "cat", tmp_path / "store" / "dog", count=6)
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "store" / "dog")
    for i in range(6):
        (tmp_path / "data" / "cat" / f"{i}.png").symlink_to(tmp_path / "store" / "cat" / f"{i}.png")
    images = load_images(recipe(tmp_path / "data"))
    assert [sum(n) for n in zip(*images.counts().values())] == [6, 6]


def test_one_class_in_val_is_enough_and_another_class_is_an_error(tmp_path):
    for split in ("train", "val"):
        write(*(tmp_path / split / name for name in ("cat", "dog", "eel")), count=6)
    shutil.rmtree(tmp_path / "val" / "cat")
    shutil.rmtree(tmp_path / "val" / "dog")
    (tmp_path / "val" / "dog").mkdir()
    images = load_images(recipe(tmp_path))
    assert images.counts()["test"] == [0, 0, 6]
    assert "val/ has no picture of cat, dog" in images.notes
    write(tmp_path / "val" / "Cat", count=1)
    with pytest.raises(DataError, match=r"val/Cat is a class that the training folder lacks.*did you mean 'cat'"):
        load_images(recipe(tmp_path))


def test_class_names_of_any_bytes(tmp_path):
    for name in (b"caf\xe9", "e\u0301te\u0301".encode(), "\u9ce5".encode(), b"a\nb", b"$x$"):
        write(tmp_path / os.fsdecode(name), count=4)
    assert load_images(recipe(tmp_path)).classes == ["$x$", "a\\nb", "caf\\xe9", "\u00e9t\u00e9", "\u9ce5"]


def test_one_picture_a_class_is_a_sentence(tmp_path):
    write(tmp_path / "cat", tmp_path / "dog", count=1)
    with pytest.raises(DataError, match=r"the val split of .* is empty: too few images"):
        load_images(recipe(tmp_path))


def test_new_pictures_do_not_move_the_others(tmp_path):
    write(tmp_path / "cat", tmp_path / "dog", count=60)

    def places():
        images = load_images(recipe(tmp_path))
        return {path: name for name in ("train", "val", "test") for path in getattr(images, name).images.items}

    before = places()
    write(*(tmp_path / "cat" / f"new-{i}.png" for i in range(40)))
    after = places()
    assert len(after) == 160
    assert before.items() <= after.items()
    assert list(before.values()).count("test") == pytest.approx(24, abs=10)


def test_evaluation_takes_all_of_new_pictures(tmp_path):
    classes = ["cat", "dog", "eel"]
    write(tmp_path / "new" / "cat", tmp_path / "new" / "dog", count=6)
    write(tmp_path / "set" / "test" / "eel", tmp_path / "set" / "train" / "eel", count=3)
    (tmp_path / "new" / "cat" / "bad.png").write_bytes(b"x")
    images = load_test_images(recipe(tmp_path / "new"), classes)
    assert images.counts()["test"] == [6, 6, 0]
    assert any("bad.png" in note for note in images.notes)
    assert any("all 12 pictures" in note for note in images.notes)
    for path in (tmp_path / "set", tmp_path / "set" / "test"):
        assert load_test_images(recipe(path), classes).counts()["test"] == [0, 0, 3]
    write(tmp_path / "new" / "fox", count=1)
    with pytest.raises(DataError, match="new/fox is a class that the training folder lacks"):
        load_test_images(recipe(tmp_path / "new"), classes)


def imagenet(root, labels):
    """ImageNet's download with two classes, flat validation and test folders, and one of the lists of labels."""
    data, classes = root / "ILSVRC" / "Data" / "CLS-LOC", ("n01", "n02")
    write(*(data / "train" / name for name in classes), count=5)
    names = [f"ILSVRC2012_val_{i:08d}" for i in range(1, 5)]
    write(*(data / "val" / f"{name}.png" for name in names), *(data / "test" / f"{i}.png" for i in range(3)))
    if labels == "kaggle":
        lines = [f"{name},{classes[i % 2]} 1 2 3 4 {classes[i % 2]} 5 6 7 8" for i, name in enumerate(names)]
        (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines]))
    elif labels == "xml":
        folder = root / "ILSVRC" / "Annotations" / "CLS-LOC" / "val"
        folder.mkdir(parents=True)
        for i, name in enumerate(names):
            (folder / f"{name}.xml").write_text(f"<a><object><name>{classes[i % 2]}</name></object></a>")
    elif labels == "devkit":
        from scipy.io import savemat

        folder = root / "ILSVRC2012_devkit_t12" / "data"
        folder.mkdir(parents=True)
        rows = np.array([(1, "n01", 0), (2, "n02", 0), (3, "n09", 2)],
                        [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("num_children", "i4")])  # fmt: skip
        savemat(folder / "meta.mat", {"synsets": rows})
        (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n1\n2\n")


@pytest.mark.parametrize("labels", ["kaggle", "xml", "devkit"])
def test_imagenet_as_it_is_downloaded(tmp_path, labels):
    imagenet(tmp_path, labels)
    images = load_images(recipe(tmp_path, data="imagenet"))
    assert images.counts()["test"] == [2, 2]
    assert images.test.labels.tolist() == [0, 1, 0, 1]
    assert [path.stem[-1] for path in images.test.images.items] == ["1", "2", "3", "4"]
    assert any(note.startswith("left out: 3 pictures") and "test" in note for note in images.notes)


def test_imagenet_without_labels_of_its_validation_pictures(tmp_path):
    imagenet(tmp_path, None)
    images = load_images(recipe(tmp_path, data="imagenet"))
    assert sum(map(sum, images.counts().values())) == 10
    assert any("4 pictures in" in note and "CLS-LOC/val" in note for note in images.notes)


def test_tiny_imagenet(tmp_path):
    write(*(tmp_path / "train" / name / "images" for name in ("n01", "n02")), count=4)
    write(tmp_path / "val" / "images", count=3)
    (tmp_path / "val" / "val_annotations.txt").write_text("0.png\tn01\t0\n1.png\tn02\t0\n2.png\tn09\t0\n")
    images = load_images(recipe(tmp_path))
    assert images.counts()["test"] == [1, 1]
    assert "left out: 1 picture of val/ with no or another class" in images.notes
