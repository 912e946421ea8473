"""Recipes: whole, written and read again, wrong values named; and the schedules of the learning rate."""

import pytest
import torch

from alexnet_cuda.recipe import Recipe, RecipeError, list_recipes, load_recipe, takes_sizes
from alexnet_cuda.training import classifier
from alexnet_cuda.training.run import average, precision
from alexnet_cuda.variants import VARIANTS


@pytest.mark.parametrize("name", list_recipes())
def test_recipes_are_whole_and_survive_yaml(name, tmp_path):
    recipe = load_recipe(name)
    (tmp_path / "config.yaml").write_text(recipe.to_yaml())
    assert load_recipe(name, tmp_path / "config.yaml") == recipe


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": "1.5"}, "epochs must be int"),
        ({"epochs": 0}, "epochs must be between 1 and"),
        ({"opt": "adagrad"}, "unknown opt 'adagrad'; choose from sgd, adam, adamw"),
        ({"mean": "0.1,0.2"}, "mean must have 1 or 3 values, got 2"),
        ({"std": "0.1,nan,1"}, "std must be a list of numbers, got '0.1,nan,1'"),
        ({"flip": "maybe"}, "flip must be bool"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "leave no image"),
        ({"std": 0}, "std must be positive"),
        ({"val_fraction": 0}, "val_fraction 0 needs monitor none"),
        ({"schedule": "plateau"}, "schedule plateau needs warmup 0"),
        ({"val_fraction": 0, "monitor": "none", "schedule": "plateau", "warmup": 0}, "another schedule than plateau"),
        ({"schedule": "step", "milestones": "30,60"}, r"milestones must be fractions .* got \(30.0, 60.0\)"),
        ({"opt": "sgd", "nesterov": True, "momentum": 0}, "nesterov needs a momentum above 0"),
        ({"pca_noise": 0.1, "channels": 1}, "pca_noise 0.1 is for colours, got channels 1"),
        ({"variant": "paper", "short_side": 200}, "short_side must be at least the 227 pixels of paper, got 200"),
        ({"freeze": "features"}, "freeze features needs weights"),
        ({"views": 3}, "unknown views 3; choose from 1, 2, 10"),
        ({"erase": 1.5}, "erase must be between 0 and 1"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(RecipeError, match=message):
        Recipe().replace(values)


def test_flags_come_before_the_config_file_and_that_before_the_recipe(tmp_path):
    (tmp_path / "my.yaml").write_text("lr: 1e-2\nepochs: 3\n")
    recipe = load_recipe("digits", tmp_path / "my.yaml", {"epochs": "4"})
    assert (recipe.lr, recipe.epochs, recipe.batch_size) == (0.01, 4, load_recipe("digits").batch_size)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "step", "constant"])
def test_schedules_rise_first_and_never_pass_the_peak(schedule):
    recipe = Recipe().replace({"schedule": schedule, "warmup": 0.1})
    rates = [classifier.rate(recipe, step, 100) for step in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert 0 < rates[0] < 0.2
    assert max(rates) == 1.0
    assert rates[100] == pytest.approx({"cosine": 0.0, "linear": 0.0, "step": 0.01, "constant": 1.0}[schedule])


def test_average_of_a_short_run_forgets_its_start():
    averages, weights = [torch.zeros(3)], [torch.ones(3)]
    for step in range(1, 31):
        average(0.999, averages, weights, torch.tensor(step))
    assert averages[0].min() > 0.99  # 0.03 with a decay of 0.999 from the first step on


@pytest.mark.parametrize(("capability", "expected"), [("amx_bf16", "bf16-mixed"), ("avx512_bf16", "32-true")])
def test_bfloat16_is_chosen_for_matrix_units_alone(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    recipe = Recipe().replace({"accelerator": "cpu", "precision": "auto"})
    assert precision(recipe) == expected
    assert precision(recipe.replace({"precision": "64-true"})) == "64-true"


def test_networks_that_pool_what_is_left_take_images_of_any_size():
    assert [name for name in VARIANTS if takes_sizes(name)] == ["torchvision", "cifar_deep"]
    assert load_recipe("digits", overrides={"variant": "cifar_deep", "size": 64}).input_size == 64
    with pytest.raises(RecipeError, match="size 64 is for torchvision/NAME, torchvision and cifar_deep, not paper"):
        load_recipe("digits", overrides={"variant": "paper", "size": 64})
