"""What happens to an image between the disk and the network, in training and in the test."""

import pytest
import torch
from torchvision.transforms import v2

from alexnet_cuda.data.module import ColourNoise, ShiftedCrop, augment, eval_transform, views
from alexnet_cuda.recipe import Recipe
from alexnet_cuda.training.evaluation import _scores


def photo(height=300, width=400):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def recipe(**values):
    return Recipe().replace(values)


def test_a_shifted_crop_is_a_window_of_the_reflected_image():
    x = photo(32, 32)
    padded = torch.nn.functional.pad(x.float(), (4, 4, 4, 4), mode="reflect").to(torch.uint8)
    windows = {padded[:, i : i + 32, j : j + 32].numpy().tobytes(): (i, j) for i in range(9) for j in range(9)}
    seen = {windows[ShiftedCrop(4)(x).contiguous().numpy().tobytes()] for _ in range(1500)}
    assert len(seen) == 81


def test_colour_noise_moves_all_pixels_by_the_same_multiple_of_the_components():
    x = torch.full((3, 5, 5), 128, dtype=torch.uint8)
    shifts = torch.stack([(ColourNoise(0.1)(x).float() - 128)[:, 0, 0] for _ in range(4000)])
    assert all(ColourNoise(0.1)(x).reshape(3, -1).unique(dim=1).shape[1] == 1 for _ in range(5))
    # Its covariance is V diag(value * deviation)^2 V^T, in levels of 255.
    scaled = ColourNoise.VECTORS * ColourNoise.VALUES * 0.1 * 255
    torch.testing.assert_close(shifts.T.cov(), scaled @ scaled.T, rtol=0.12, atol=0.2)
    assert torch.equal(ColourNoise(0.0)(x), x)


@pytest.mark.parametrize(
    "values",
    [
        {"short_side": 256},
        {"crop": 0.2, "flip": True, "auto_augment": "trivial", "erase": 1.0},
        {"auto_augment": "rand", "jitter": 0.4, "pca_noise": 0.1, "rotate": 10},
    ],
)
def test_photographs_of_any_size_come_out_as_the_network_takes_them(values):
    transform = augment(recipe(variant="paper", **values), None)
    for size in ((300, 400), (227, 500), (90, 61)):
        y = transform(photo(*size))
        assert y.shape == (3, 227, 227)
        assert y.dtype == torch.uint8


def test_the_centre_is_the_first_of_ten_views_and_the_mirror_images_are_the_last_five():
    values = recipe(variant="paper", short_side=256, views=10)
    x = photo()
    ten, two = views(values, None)(x), views(values.replace({"views": 2}), None)(x)
    assert ten.shape == (10, 3, 227, 227)
    assert torch.equal(ten[0], eval_transform(values, None)(x))
    assert torch.equal(two[1], two[0].flip(-1))
    resized = v2.functional.resize(x, [256], antialias=True)
    assert torch.equal(ten[1], resized[:, :227, :227])
    mirrored = {ten[i].flip(-1).numpy().tobytes() for i in range(5)}
    assert mirrored == {ten[i].numpy().tobytes() for i in range(5, 10)}


def test_views_of_an_image_of_fixed_size_keep_its_size():
    y = views(recipe(variant="cifar", views=10, pad=4), 32)(photo(32, 32))
    assert y.shape == (10, 3, 32, 32)
    assert torch.equal(y[0], photo(32, 32))


def test_probabilities_are_averaged_over_the_views():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    x = torch.randn(4, 10, 3, 2, 2)
    scores = _scores(model, lambda images: images, x)
    expected = torch.stack([model(x[:, i]).softmax(1) for i in range(10)]).mean(0)
    torch.testing.assert_close(scores.softmax(1), expected)
