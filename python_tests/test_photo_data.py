"""CIFAR-10 in its three layouts, the 17 flowers, and tables of paths and labels: the same images, or a clear word."""

import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_cuda.data import load_images, source
from alexnet_cuda.errors import DataError
from alexnet_cuda.recipe import Recipe


def recipe(data, path, **values):
    return Recipe().replace({"data": data, "data_path": str(path), **values})


@pytest.fixture(scope="module")
def batches():
    """Six batches of 100 images (N, 3072) with labels 0..9 in turn; the red corner counts the images."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (6, 100, 3072), dtype=np.uint8)
    images[:, :, 0] = np.arange(100)
    return images, np.tile(np.arange(10, dtype=np.uint8), 10)


NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def as_binary(folder, images, labels):
    for name, x in zip(NAMES, images, strict=True):
        (folder / f"{name}.bin").write_bytes(np.column_stack([labels, x]).tobytes())


def as_python(folder, images, labels):
    for name, x in zip(NAMES, images, strict=True):
        content = {"data": x, "labels": labels.tolist(), "filenames": ["a.png"] * len(x), "batch_label": name}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def as_sheets(folder, images, labels):
    for name, x in zip([*(f"train_{i}" for i in range(1, 6)), "test"], images, strict=True):
        sheet = x.reshape(10, 10, 3, 32, 32).transpose(0, 3, 1, 4, 2).reshape(320, 320, 3)
        Image.fromarray(sheet).save(folder / f"{name}.webp", lossless=True)
    np.save(folder / "train_labels.npy", np.tile(labels, 5))
    np.save(folder / "test_labels.npy", labels)


@pytest.mark.parametrize(
    ("write", "folder"),
    [(as_binary, "cifar-10-batches-bin"), (as_python, "cifar-10-batches-py"), (as_sheets, "cifar10"), (as_binary, ".")],
)
def test_every_layout_of_cifar10_gives_the_same_images(batches, tmp_path, write, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    write(tmp_path / folder, *batches)
    images = load_images(recipe("cifar10", tmp_path, val_fraction=0.1))
    assert torch.equal(images.test.images, torch.from_numpy(batches[0][5]).reshape(-1, 3, 32, 32))
    assert images.counts() == {"train": [45] * 10, "val": [5] * 10, "test": [10] * 10}
    corners = torch.cat([images.train.images, images.val.images])[:, 0, 0, 0]
    assert corners.bincount().tolist() == [5] * 100
    assert images.classes[8] == "ship"


PRINTS = b"cbuiltins\nprint\n(Va pickle was run\ntR."  # when it is unpickled


@pytest.mark.parametrize(
    ("write", "damage", "message"),
    [
        (as_binary, lambda f: (f / "data_batch_3.bin").write_bytes(b"\0" * 3072), "data_batch_3.bin holds 3072 bytes"),
        (as_binary, lambda f: (f / "data_batch_3.bin").write_bytes(b"\12" * 3073), "data_batch_3.bin holds no label"),
        (as_binary, lambda f: (f / "test_batch.bin").unlink(), "test_batch.bin cannot be read"),
        (
            as_binary,
            lambda f: (f / "data_batch_1.bin").unlink(),
            "data_batch_1.bin, no data_batch_1, no train_1.webp",
        ),
        (as_python, lambda f: (f / "data_batch_2").unlink(), "data_batch_2 does not exist"),
        (as_python, lambda f: (f / "data_batch_2").write_bytes(PRINTS), "asks for builtins.print"),
        (as_python, lambda f: (f / "data_batch_2").write_bytes(b"<html>"), "data_batch_2 is not a batch of CIFAR-10"),
        (as_sheets, lambda f: np.save(f / "test_labels.npy", np.zeros(7, np.uint8)), r"test_labels.npy.*labels \(7,\)"),
        (as_sheets, lambda f: (f / "train_labels.npy").unlink(), "train_labels.npy cannot be read"),
        (as_sheets, lambda f: Image.new("RGB", (40, 32)).save(f / "test.webp"), "test.webp is 40x32"),
        (as_sheets, lambda f: (f / "train_4.webp").write_bytes(b"RIFF"), "train_4.webp cannot be read as an image"),
    ],
)
def test_damaged_cifar10_is_named_and_nothing_is_run(batches, tmp_path, capsys, write, damage, message):
    write(tmp_path, *batches)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        load_images(recipe("cifar10", tmp_path))
    assert "was run" not in capsys.readouterr().out


def test_a_picture_for_cifar10_loses_its_longer_sides(tmp_path):
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96] = 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    values = recipe("cifar10", tmp_path)
    assert source(values).read(values, tmp_path / "wide.png").unique().tolist() == [200]


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """1,360 tiny photographs, the number of each in its colour."""
    folder = tmp_path_factory.mktemp("flowers") / "flowers17" / "jpg"
    folder.mkdir(parents=True)
    for i in range(1, 1361):
        Image.new("RGB", (12, 9), (i % 256, i // 256 * 40, 0)).save(folder / f"image_{i:04d}.jpg", quality=95)
    return folder.parents[1]


def test_flowers_are_labelled_by_number_and_split_as_the_source_does(flowers):
    images = load_images(recipe("flowers17", flowers, val_fraction=0, monitor="none"))
    assert images.counts()["train"] == [64] * 17
    assert images.counts()["test"] == [16] * 17
    assert images.val is images.test
    right = 0
    for part in (images.train, images.test):
        for x, label in zip(part.images, part.labels, strict=True):
            red, green = x[:2].float().mean((1, 2)).round().int().tolist()
            right += (round(green / 40) * 256 + red - 1) // 80 == label
    assert right > 1300  # JPEG moves a colour by one now and then
    values = recipe("flowers17", flowers)
    assert source(values).read(values, flowers / "flowers17" / "jpg" / "image_0001.jpg").shape == (3, 9, 12)


def test_missing_flowers_are_named(flowers, tmp_path):
    with pytest.raises(DataError, match=r"holds no image_0001\.jpg"):
        load_images(recipe("flowers17", tmp_path))
    part = tmp_path / "jpg"
    part.mkdir()
    for i in (1, 2, 4):
        (part / f"image_{i:04d}.jpg").symlink_to(flowers / "flowers17" / "jpg" / f"image_{i:04d}.jpg")
    with pytest.raises(DataError, match=r"lacks 1357 of 1360 images, among them image_0003\.jpg"):
        load_images(recipe("flowers17", tmp_path))


@pytest.fixture
def table(tmp_path):
    """Ten images of each of two classes, listed in a table."""
    lines = ["path,label"]
    for label in ("cat", "dog"):
        for i in range(10):
            Image.new("RGB", (20, 16), (i, 0, 0)).save(tmp_path / f"{label}{i}.png")
            lines.append(f"{label}{i}.png,{label}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    return tmp_path / "labels.csv"


def test_a_table_of_paths_and_labels_is_a_data_set(table):
    images = load_images(recipe("folder", table))
    assert images.classes == ["cat", "dog"]
    assert [sum(n) for n in zip(*images.counts().values())] == [10, 10]
    assert min(map(min, images.counts().values())) > 0
    rows = table.read_text().splitlines()
    parts = ["split", *(["train"] * 6 + ["test"] * 4) * 2]
    table.write_text("\n".join(f"{row},{part}" for row, part in zip(rows, parts, strict=True)))
    images = load_images(recipe("folder", table))
    assert images.counts() == {"train": [5, 4], "val": [1, 2], "test": [4, 4]}


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.replace(",", ";").encode(),
        lambda t: t.replace(",", "\t").encode("utf-16"),
        lambda t: t.replace(",", " , ").replace("cat\n", "cat \n").encode("utf-8-sig"),
        lambda t: t.replace("path,label", "Filename,Class").replace("\n", "\r\n").encode("utf-16-le"),
        lambda t: t.partition("\n")[2].encode(),
        lambda t: t.partition("\n")[2].replace(",", " ").encode(),
        lambda t: ("sep=;\n" + t.replace(",", ";") + "\n\n;\n").encode(),
        lambda t: "\n".join(f"{i},./{line}" for i, line in enumerate(t.replace("path", "image").splitlines())).encode(),
        lambda t: t.replace("cat0", ".\\cat0").encode(),
        lambda t: f"# my pictures\n{t}".encode(),
    ],
)
def test_dialects_and_encodings_of_a_table(table, change):
    expected = load_images(recipe("folder", table))
    content = change(table.read_text())
    if content.startswith(b"0,./image"):
        content = content.replace(b"0,./image", b",image", 1)
    table.write_bytes(content)
    images = load_images(recipe("folder", table))
    assert images.classes == expected.classes
    names = [[path.name for path in i.train.images.items] for i in (images, expected)]
    assert names[0] == names[1]


def test_a_table_in_an_old_encoding_and_with_repeated_lines_is_told(table):
    text = table.read_text().replace(",cat", ",ch\u00e2t")
    table.write_bytes((text + "\n" + text.partition("\n")[2]).encode("cp1252"))
    images = load_images(recipe("folder", table))
    assert images.classes == ["ch\u00e2t", "dog"]
    assert sum(map(sum, images.counts().values())) == 20
    assert any("read as Windows-1252" in note for note in images.notes)
    assert any("left out: 20 lines of" in note for note in images.notes)


def test_doubtful_labels_and_unread_columns_of_a_table_are_told(table):
    lines = table.read_text().splitlines()
    labels = ["1", "1.0", "2", "NaN"]
    rows = [f"{line.split(',')[0]},{labels[i % 4]},{i}" for i, line in enumerate(lines[1:])]
    table.write_text("\n".join(["path,label,fold", *rows]))
    notes = "\n".join(load_images(recipe("folder", table)).notes)
    for note in ("labels '1' and '1.0' of", "the label 'NaN' of", "not read: the columns fold of"):
        assert note in notes, note


@pytest.mark.parametrize("written", [r"\1", r"C:\\data\\\1.png", r"/home/me/\1.PNG", r"train/\1.png"])
def test_pictures_that_do_not_lie_where_a_table_says_are_found(table, written):
    """Names without suffix, and paths of another machine."""
    table.write_text(re.sub(r"^(\w+)\.png", written, table.read_text(), flags=re.MULTILINE))
    (table.parent / "images" / "inner").mkdir(parents=True)
    for path in table.parent.glob("*.png"):
        path.rename(table.parent / "images" / "inner" / path.name)
    images = load_images(recipe("folder", table))
    assert [images.classes[label] for label in images.train.labels] == [p.name[:3] for p in images.train.images.items]
    assert sum(map(sum, images.counts().values())) == 20
    assert any("20 pictures of" in note and "found by name in other folders" in note for note in images.notes)
    shutil.copytree(table.parent / "images", table.parent / "train")
    with pytest.raises(DataError, match=r"names .*, which may be .*images.* or .*train"):
        load_images(recipe("folder", table))
    found = load_images(recipe("folder", table.rename(table.with_name("train.csv")))).train.images.items
    assert {path.relative_to(table.parent).parts[0] for path in found} == {"train"}


def test_a_picture_in_another_class_folder_is_not_taken_for_the_one_that_is_missing(table):
    for name in ("cat", "dog"):
        (table.parent / name).mkdir()
        for i in range(10):
            (table.parent / f"{name}{i}.png").rename(table.parent / name / f"{i}.png")
    table.write_text(re.sub(r"^(\w\w\w)(\d\.png)", r"/data/\1/\2", table.read_text(), flags=re.MULTILINE))
    assert load_images(recipe("folder", table)).classes == ["cat", "dog"]
    (table.parent / "cat" / "3.png").unlink()
    for text in (table.read_text(), table.read_text().replace("/data/", "")):
        table.write_text(text)
        with pytest.raises(DataError, match=r"line 5 of .* names .*cat/3\.png, which is no file"):
            load_images(recipe("folder", table))


def test_columns_of_zero_and_one_are_classes_and_a_pair_of_labels_is_told(table):
    expected = load_images(recipe("folder", table))
    text = table.read_text()
    rows = text.replace(",cat\n", ",1.0,0.0\n").replace(",dog", ",0,1")
    table.write_text(rows.replace("path,label", "image,cat,dog"))
    images = load_images(recipe("folder", table))
    assert images.classes == expected.classes
    assert images.train.labels.equal(expected.train.labels)
    assert any("the columns cat, dog of" in note for note in images.notes)
    table.write_text(re.sub("$", ",7", rows, flags=re.MULTILINE).replace("path,label,7", "image,cat,dog,diagnosis"))
    with pytest.raises(DataError, match="no column 'label'; its columns are image, cat, dog, diagnosis"):
        load_images(recipe("folder", table))
    table.write_text(text.replace("dog7.png,dog", "dog7.png,cat|dog").replace("dog8.png,dog", "dog8.png,cat|dog"))
    notes = load_images(recipe("folder", table, val_fraction=0.0, monitor="none", test_fraction=0.4)).notes
    assert any(note.endswith("is a class: a picture has one label here") and "'cat|dog'" in note for note in notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace("label", "a,b").replace(",cat", ",cat,1").replace(",dog", ",dog,2"), "no column 'label'"),
        (lambda t: t.replace("cat3.png,cat", "cat3.png,"), "line 5 of .*labels.csv lacks"),
        (lambda t: t.replace("cat3.png", "lost.png"), "line 5 of .*labels.csv names .*lost.png, which is no file"),
        (lambda t: t.replace(",dog", ",cat"), r"has 1 label,"),
        (lambda t: t.replace("label", "label,split").replace(",cat", ",cat,early"), "line 2 .* the split 'early'"),
        (lambda t: t.replace("label", "label,split").replace(",cat", ",cat,test"), "train among them"),
        (lambda t: "", "no column"),
        (lambda t: t + "\n./cat3.png,dog", "lines 5 and 22 of .*labels.csv give cat3.png the labels 'cat' and 'dog'"),
        (lambda t: t.replace("cat3.png,cat", "cat3.png,c\0t"), "line 5 of .*labels.csv holds a NUL byte"),
        (lambda t: t.replace("cat3.png,cat", 'cat3.png,"cat'), "line 5 of .*labels.csv opens a quote"),
        (
            lambda t: t.replace("cat3.png,cat", 'cat3.png,"cat').replace("cat5.png,cat", 'cat5.png,cat"'),
            "above line 7 of .*labels.csv closes on another line",
        ),
        (lambda t: t.replace("cat3.png,cat", "cat3.png,cat,tabby"), "line 5 of .*labels.csv has 3 cells, expected 2"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(table, change, message):
    table.write_text(change(table.read_text()))
    with pytest.raises(DataError, match=message):
        load_images(recipe("folder", table))


def test_bike_ship_is_found_in_the_folder_of_all_data_sets(tmp_path):
    for folder in ("train/bike", "train/ship", "val/bike", "val/ship"):
        (tmp_path / "bike_ship" / folder).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (20, 16), (i, 0, 0)).save(tmp_path / "bike_ship" / folder / f"{i}.jpg")
    for path in (tmp_path, tmp_path / "bike_ship"):
        assert load_images(recipe("bike-ship", path, val_fraction=0.25)).counts()["train"] == [3, 3]
