"""Data sets: what is read, what is refused, that batches depend on seed, epoch and position alone, and what happens to
an image between the disk and the network."""

import gzip
import shutil

import numpy as np
import pytest
import torch
from helpers import assert_same_bits
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.transforms import v2

from alexnet_cuda.data import MODULES, load_images, source
from alexnet_cuda.data.augmentation import (
    Augment,
    ColourNoise,
    Normalise,
    Views,
    affine,
    erase,
    eval_transform,
    shifted_crops,
)
from alexnet_cuda.data.imageset import Items, Split, read_glyph, stratified_split
from alexnet_cuda.data.module import EpochSampler, ImageData, SplitDataset
from alexnet_cuda.errors import DataError
from alexnet_cuda.recipe import FIELDS, Recipe
from alexnet_cuda.training.evaluation import _scores


def recipe(**values):
    return Recipe().replace({"data": "digits", "channels": 1, **values})


def idx(path, array, magic=b"\0\0\x08"):
    header = magic + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes()
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def mnist(tmp_path):
    """The digits of scikit-learn in MNIST's files: 28x28, half of them unpacked."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    digits = load_digits()
    images = np.zeros((1000, 28, 28))
    images[:, 2:26, 2:26] = np.repeat(np.repeat(digits.images[:1000] * 15, 3, 1), 3, 2)
    for part, begin, end in (("train", 0, 800), ("t10k", 800, 1000)):
        idx(raw / f"{part}-images-idx3-ubyte.gz", images[begin:end])
        idx(raw / f"{part}-labels-idx1-ubyte", digits.target[begin:end])
    return tmp_path


@pytest.fixture
def pictures(tmp_path):
    """Twelve pictures of each of the classes 3, 5 and 8 as PNG, one folder per class."""
    for label in (3, 5, 8):
        folder = tmp_path / "pictures" / f"class-{label}"
        folder.mkdir(parents=True)
        for i in range(12):
            Image.new("L", (40, 36), 20 * label + i).save(folder / f"{i}.png")
    return tmp_path / "pictures"


def test_every_data_set_of_a_recipe_has_its_module():
    names = FIELDS["data"].metadata["choices"]
    assert set(MODULES) <= set(names)
    for name in names:
        assert {"load", "read", "SIZE"} <= vars(source(recipe(data=name))).keys()


def test_digits_are_split_in_proportion_and_the_same_way_for_every_training_seed():
    first, second = load_images(recipe(seed=1)), load_images(recipe(seed=2))
    assert [len(s.labels) for s in (first.train, first.val, first.test)] == [1259, 179, 359]
    assert torch.equal(first.test.images, second.test.images)
    assert all(34 <= n <= 38 for n in first.counts()["test"])
    other = load_images(recipe(test_fraction=0.5, split_seed=3))
    sums = [torch.cat([s.images for s in (i.train, i.val, i.test)]).sum((1, 2, 3)) for i in (first, other)]
    assert torch.equal(*(s.sort().values for s in sums))


@pytest.mark.parametrize(("sizes", "fraction"), [([10, 10], 0.2), ([3, 3], 0.1), ([40, 4], 0.1)])
def test_stratified_split_keeps_every_class_in_every_part(sizes, fraction):
    labels = torch.arange(2).repeat_interleave(torch.tensor(sizes))
    parts = stratified_split(labels, (fraction, fraction), 0)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    assert all(set(labels[part].tolist()) == {0, 1} for part in parts)
    assert all(len(part) >= fraction * len(labels) - 1 for part in parts)


def test_mnist_reads_packed_and_plain_files_and_writes_nothing(mnist):
    before = sorted(mnist.rglob("*"))
    images = load_images(recipe(data="mnist", data_path=str(mnist)))
    assert images.train.images.shape[1:] == (1, 32, 32)
    glyph = np.repeat(np.repeat(load_digits().images[800] * 15, 3, 0), 3, 1)
    assert np.array_equal(images.test.images[0, 0, 4:28, 4:28], glyph.astype(np.uint8))
    assert len(images.test.labels) == 200
    assert images.test.labels.tolist() == load_digits().target[800:1000].tolist()
    assert sorted(mnist.rglob("*")) == before


def test_mnist_as_archivers_unpack_it(mnist, tmp_path):
    raw = mnist / "MNIST" / "raw"
    expected = load_images(recipe(data="mnist", data_path=str(mnist)))
    away = tmp_path / "archive" / "other"
    for path in raw.iterdir():
        name = path.name.replace("-idx", ".idx").removesuffix(".gz")
        content = path.read_bytes()
        target = away / name / name if name.startswith("t10k") else away / f"{name}.gz"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
        (target.parent / f"._{name}").write_bytes(b"x")
    (tmp_path / "archive" / "FashionMNIST").mkdir()
    idx(tmp_path / "archive" / "FashionMNIST" / "t10k-labels-idx1-ubyte", np.zeros(3))
    found = load_images(recipe(data="mnist", data_path=str(tmp_path / "archive")))
    assert torch.equal(found.test.images, expected.test.images)
    assert torch.equal(found.train.labels, expected.train.labels)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-images-idx3-ubyte.gz", lambda p: p.write_bytes(p.read_bytes()[:-100]), "cannot be unpacked"),
        ("train-images-idx3-ubyte.gz", lambda p: p.write_bytes(b"<html>not found"), "begins with 3c 68 74 6d"),
        ("t10k-labels-idx1-ubyte", lambda p: p.write_bytes(p.read_bytes()[:-10]), "header promises 200"),
        ("t10k-labels-idx1-ubyte", lambda p: p.write_bytes(b""), "not an IDX file"),
        ("t10k-labels-idx1-ubyte", lambda p: p.write_bytes(b"\x89PNG" + p.read_bytes()), "begins with 89 50 4e 47"),
        ("t10k-labels-idx1-ubyte", lambda p: p.unlink(), "does not exist"),
        ("train-labels-idx1-ubyte", lambda p: idx(p, np.zeros(7)), "labels for 800 images"),
        ("train-labels-idx1-ubyte", lambda p: idx(p, np.full(800, 11)), "one above 9"),
        ("train-images-idx3-ubyte.gz", lambda p: idx(p, np.zeros((800, 8, 8))), "expected images of 28x28"),
    ],
)
def test_damaged_idx_files_are_named(mnist, name, damage, message):
    damage(mnist / "MNIST" / "raw" / name)
    with pytest.raises(DataError, match=f"{name.removesuffix('.gz')}.*{message}"):
        load_images(recipe(data="mnist", data_path=str(mnist)))


def test_class_folders_are_split_and_named(pictures):
    images = load_images(recipe(data="folder", data_path=str(pictures), channels=3))
    assert images.classes == ["class-3", "class-5", "class-8"]
    assert [sum(n) for n in zip(*images.counts().values())] == [12, 12, 12]
    assert min(map(min, images.counts().values())) > 0
    assert images.train.images[0].shape == (3, 36, 40)


def test_split_folders_are_kept(pictures):
    for part, files in (("train", range(8)), ("val", range(8, 12))):
        for folder in sorted(pictures.glob("class-*")):
            target = pictures / part / folder.name
            target.mkdir(parents=True)
            for i in files:
                (folder / f"{i}.png").rename(target / f"{i}.png")
    images = load_images(recipe(data="folder", data_path=str(pictures), channels=3))
    assert images.counts() == {"train": [7, 7, 7], "val": [1, 1, 1], "test": [4, 4, 4]}
    shutil.copytree(pictures / "val" / "class-8", pictures / "val" / "class-9")
    with pytest.raises(DataError, match="class-9 is a class that the training folder lacks"):
        load_images(recipe(data="folder", data_path=str(pictures)))


def test_damaged_pictures_are_listed_and_left_out_only_when_told(pictures):
    (pictures / "class-5" / "1.png").write_bytes(b"no picture")
    whole = (pictures / "class-8" / "2.png").read_bytes()
    (pictures / "class-8" / "2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"2 damaged(.|\n)*class-5/1.png(.|\n)*class-8/2.png"):
        load_images(recipe(data="folder", data_path=str(pictures)))
    images = load_images(recipe(data="folder", data_path=str(pictures), skip_corrupt=True))
    assert [note.split(":")[0] for note in images.notes] == ["34 pictures", "left out", "left out"]  # of one colour
    assert sum(map(sum, images.counts().values())) == 34


@pytest.mark.parametrize(
    ("classes", "message"),
    [([], "no class folder"), (["cat", "dog"], "no class folder with pictures")],
)
def test_wrong_label_folders_are_named(tmp_path, classes, message):
    for name in classes:
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=f"{tmp_path.name}.*{message}"):
        load_images(recipe(data="folder", data_path=str(tmp_path)))


def test_dark_ink_on_paper_is_inverted_and_wide_pictures_are_padded(tmp_path):
    glyph = np.zeros((8, 8), np.uint8)
    glyph[2:6, 3:5] = 200
    Image.fromarray(glyph).save(tmp_path / "bright.png")
    Image.fromarray(255 - glyph).save(tmp_path / "dark.png")
    Image.fromarray(np.pad(glyph, ((0, 0), (4, 4)))).save(tmp_path / "wide.png")
    bright = read_glyph(tmp_path / "bright.png", 8)
    assert torch.equal(bright[0], torch.from_numpy(glyph))
    assert torch.equal(read_glyph(tmp_path / "dark.png", 8), bright)
    assert read_glyph(tmp_path / "wide.png", 8).shape == (1, 8, 8)


def test_two_processes_share_the_batches_of_one():
    def batches(rank, world, size):
        sampler = EpochSampler(103, True, 5, rank, world)
        sampler.set_epoch(3)
        keys = list(sampler)
        return [sorted(keys[i : i + size]) for i in range(0, len(keys) - size + 1, size)]

    together = [sorted(a + b) for a, b in zip(batches(0, 2, 8), batches(1, 2, 8), strict=True)]
    assert together == batches(0, 1, 16)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_it_stopped_with_the_same_augmentation(workers):
    values = recipe(rotate=15, shift=0.1, zoom=0.1, flip=True, workers=workers, batch_size=32)
    images = load_images(values)

    def loader(state=None):
        loader = ImageData(images, values).train_dataloader()
        if state:
            loader.load_state_dict(state)
        loader.sampler.set_epoch(2)
        return loader

    whole, stopped = list(loader()), loader()
    for _, _batch in zip(range(5), stopped, strict=False):
        state = stopped.state_dict()
    assert state == {"epoch": 2, "batches": 5}
    resumed = loader(state)
    assert_same_bits(list(resumed), whole[5:])
    resumed.sampler.set_epoch(3)
    assert len(list(resumed)) == len(whole)


def photo(height=300, width=400):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_shifted_crop_is_a_window_of_the_reflected_image():
    x = photo(32, 32)
    padded = torch.nn.functional.pad(x.float(), (4, 4, 4, 4), mode="reflect").to(torch.uint8)
    windows = {padded[:, i : i + 32, j : j + 32].numpy().tobytes(): (i, j) for i in range(9) for j in range(9)}
    seen = {windows[crop.contiguous().numpy().tobytes()] for crop in shifted_crops(x.expand(1500, 3, 32, 32), 4)}
    assert len(seen) == 81


def test_affine_is_torchvisions_for_the_same_numbers():
    x = v2.functional.gaussian_blur(photo(60, 40), [5, 5]).expand(8, 3, 60, 40)
    torch.manual_seed(1)
    y = affine(x, 30, 0.2, 0.3)
    torch.manual_seed(1)
    angle, zoom, across, down = (2 * torch.rand(4, 8) - 1) * torch.tensor([[30], [0.3], [0.2 * 40], [0.2 * 60]])
    for i in range(8):
        values = angle[i].item(), [across[i].item(), down[i].item()], 1 + zoom[i].item(), [0.0, 0.0]
        expected = v2.functional.affine(x[i], *values, interpolation=v2.InterpolationMode.BILINEAR)
        assert (y[i].int() - expected.int()).abs().max() <= 1


def test_erasing_takes_its_share_of_images_and_of_pixels():
    x = torch.full((4000, 1, 20, 30), 9, dtype=torch.uint8)
    erased = (erase(x, 0.25) == 0).float().mean((1, 2, 3))
    assert 0.22 < (erased > 0).float().mean() < 0.28
    assert erased.max() <= 0.36  # 33 %, rounded to whole pixels
    assert 0.14 < erased[erased > 0].mean() < 0.21


def test_an_image_is_mirrored_in_every_other_epoch():
    sampler = EpochSampler(200, True, 5)
    by_epoch = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        by_epoch.append(torch.tensor([mirrored for _, _, mirrored in sorted(sampler)]))
    assert 60 < by_epoch[0].sum() < 140
    assert by_epoch[0].equal(~by_epoch[1])
    assert by_epoch[0].equal(by_epoch[2])
    x = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    y = Augment(recipe(flip=True), 2)(x, torch.tensor([False, True]))
    assert y[0].equal(x[0])
    assert y[1].equal(x[1].flip(-1))


def test_colour_noise_moves_all_pixels_by_the_same_multiple_of_the_components():
    x = torch.full((3, 5, 5), 128, dtype=torch.uint8)
    shifts = torch.stack([(ColourNoise(0.1)(x).float() - 128)[:, 0, 0] for _ in range(4000)])
    assert all(ColourNoise(0.1)(x).reshape(3, -1).unique(dim=1).shape[1] == 1 for _ in range(5))
    # Its covariance is V diag(value * deviation)^2 V^T, in levels of 255.
    scaled = ColourNoise.VECTORS * ColourNoise.VALUES * 0.1 * 255
    torch.testing.assert_close(shifts.T.cov(), scaled @ scaled.T, rtol=0.12, atol=0.2)
    assert torch.equal(ColourNoise(0.0)(x), x)


def test_grey_images_take_no_colour_noise_and_colours_are_averaged_for_a_grey_network():
    grey = torch.full((1, 4, 4), 99, dtype=torch.uint8)
    assert torch.equal(ColourNoise(0.1)(grey), grey)
    colours = torch.tensor([0, 51, 204], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(1, 3, 32, 32)
    x = Normalise(recipe(data="cifar10", channels=1, mean=0, std=1))(colours)
    assert x.shape == (1, 1, 32, 32)
    assert torch.allclose(x, torch.tensor(85 / 255))


@pytest.mark.parametrize(
    "values",
    [
        {"short_side": 256},
        {"crop": 0.2, "flip": True, "auto_augment": "trivial", "erase": 1.0},
        {"auto_augment": "rand", "jitter": 0.4, "pca_noise": 0.1, "rotate": 10},
    ],
)
def test_photographs_of_any_size_come_out_as_the_network_takes_them(values):
    transform = Augment(Recipe().replace({"variant": "paper", **values}), None)
    y = transform([photo(*size) for size in ((300, 400), (227, 500), (90, 61))], torch.tensor([True, False, True]))
    assert y.shape == (3, 3, 227, 227)
    assert y.dtype == torch.uint8


def test_decoded_pictures_are_kept_within_a_limit_and_only_as_large_as_crops_need():
    decoded = []

    def decode(size):
        decoded.append(size)
        return photo(*size)

    items = Items([(300, 400), (1200, 900), (300, 300)], decode)
    values = Recipe().replace({"variant": "paper", "crop": 0.25})
    # Crops of a quarter of the area have half the edge: 454 for 227. The first two fit, the third does not.
    data = SplitDataset(Split(items, torch.arange(3)), Augment(values, None), 3 * (300 * 400 + 605 * 454))
    keys = [(i, 7, False) for i in range(3)]
    first, again = data.__getitems__(keys), data.__getitems__(keys)
    assert decoded == [*items.items, (300, 300)]
    assert data.kept[1].shape == (3, 605, 454)
    assert torch.equal(first[0], again[0])
    assert data.room < 3 * 300 * 300


def test_the_centre_is_the_first_of_ten_views_and_the_mirror_images_are_the_last_five():
    values = Recipe().replace({"variant": "paper", "short_side": 256, "views": 10})
    x = photo()
    ten, two = Views(values, None)(x), Views(values.replace({"views": 2}), None)(x)
    assert ten.shape == (10, 3, 227, 227)
    assert torch.equal(ten[0], eval_transform(values, None)(x))
    assert torch.equal(two[1], two[0].flip(-1))
    resized = v2.functional.resize(x, [256], antialias=True)
    assert torch.equal(ten[1], resized[:, :227, :227])
    mirrored = {ten[i].flip(-1).numpy().tobytes() for i in range(5)}
    assert mirrored == {ten[i].numpy().tobytes() for i in range(5, 10)}


def test_views_of_an_image_of_fixed_size_keep_its_size():
    y = Views(Recipe().replace({"variant": "cifar", "views": 10, "pad": 4}), 32)(photo(32, 32))
    assert y.shape == (10, 3, 32, 32)
    assert torch.equal(y[0], photo(32, 32))


def test_probabilities_are_averaged_over_the_views():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    x = torch.randn(4, 10, 3, 2, 2)
    scores = _scores(model, lambda images: images, x)
    expected = torch.stack([model(x[:, i]).softmax(1) for i in range(10)]).mean(0)
    torch.testing.assert_close(scores.softmax(1), expected)
