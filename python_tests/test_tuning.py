"""lr-find and search: what they suggest, leave behind and refuse."""

import json
import sqlite3
from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml
from PIL import Image
from training_helpers import cli, light_network, read_csv

from alexnet_cuda.errors import RecipeError
from alexnet_cuda.recipe import load_recipe
from alexnet_cuda.training import lr_find, search
from alexnet_cuda.training.classifier import Classifier

# 5 batches an epoch.
SMALL = ["digits", "--channels", "3", "--limit", "40", "--batch-size", "8", "--accelerator", "cpu"]


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """A network of one layer instead of the recipe's: what is searched does not matter here."""
    monkeypatch.setattr("alexnet_cuda.training.classifier.build", light_network)


def test_a_sweep_suggests_a_rate_at_which_the_loss_falls_and_leaves_a_picture_and_no_litter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rate = json.loads(
        cli("lr-find", *SMALL, "--opt", "adamw", "--bias-lr", 1, "--steps", 60, "--max-lr", 10, "--json")
    )["lr"]
    assert 1e-5 < rate < 1
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        "runs/lr-find-digits/lr_find.csv",
        "runs/lr-find-digits/lr_find.png",
    ]
    rows = read_csv(Path("runs/lr-find-digits/lr_find.csv"))
    rates, losses = ([float(row[key]) for row in rows] for key in ("lr", "loss"))
    assert rates[0] == pytest.approx(1e-6)
    assert rates == sorted(rates)
    assert 1.5 < losses[0] < 4  # of ten classes: log 10 and no less
    assert rates[int(np.argmin(losses))] > rate
    with Image.open("runs/lr-find-digits/lr_find.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 50


def test_the_valley_is_found_among_noise():
    rates = np.geomspace(1e-6, 1, 100)
    losses = 2.3 - 2 / (1 + (3e-3 / rates) ** 2) + np.where(rates > 0.1, 50 * (rates - 0.1), 0)
    losses += np.random.default_rng(0).normal(0, 1e-2, 100)
    found = lr_find.suggest(rates, losses)
    assert 1e-3 < found["valley"] < 1e-2
    assert found["minimum / 10"] == pytest.approx(0.01, rel=0.3)


def test_a_sweep_keeps_the_shares_of_the_layers_and_ends_where_the_loss_is_no_number(tmp_path, monkeypatch):
    seen, step = [], Classifier.training_step

    def watched(self, batch, index):
        groups = self.optimizers().param_groups
        seen.append([group["lr"] / groups[0]["lr"] for group in groups])
        return step(self, (batch[0] * float("nan") if len(seen) == 31 else batch[0], batch[1]), index)

    class Shared(lr_find.SweepClassifier):
        def configure_optimizers(self):
            optimiser = super().configure_optimizers()
            self.ratios = [1.0, 0.25]
            return optimiser

    monkeypatch.setattr(Classifier, "training_step", watched)
    monkeypatch.setattr(lr_find, "SweepClassifier", Shared)
    cli("lr-find", *SMALL, "--output", tmp_path, "--steps", 60, "--min-lr", "1e-4")
    assert len(seen) == 31
    assert np.allclose(seen, [1.0, 0.25])


def test_a_search_improves_on_the_recipe_resumes_and_its_best_values_train(tmp_path):
    folder = tmp_path / "search"
    arguments = ["search", *SMALL, "--epochs", 2, "--output", folder]
    cli(*arguments, "--trials", 2)
    with sqlite3.connect(folder / "search.db") as database:
        assert database.execute("select count(*) from trials").fetchone() == (2,)
    assert "2 trials" in cli(*arguments, "--trials", 5)
    rows = read_csv(folder / "search.csv")
    assert sorted(int(row["trial"]) for row in rows) == [1, 2, 3, 4, 5]
    assert len({row["lr"] for row in rows}) == 5  # none drawn twice
    first = next(row for row in rows if row["trial"] == "1")
    assert float(first["lr"]) == load_recipe("digits").lr
    scores = [float(row["val/accuracy"]) for row in rows if row["state"] == "complete"]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] >= float(first["val/accuracy"]) > 0
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert set(best) == {"lr", "weight_decay", "label_smoothing"}
    assert load_recipe("digits", folder / "best.yaml").lr == float(rows[0]["lr"])
    assert sorted(p.name for p in folder.iterdir()) == ["best.yaml", "search.csv", "search.db", "search.png"]
    output = cli(*arguments, "--trials", 6, "--set", "rotate=3", code=2)
    assert "holds a search with rotate 10.0, not 3.0: give another --output" in output


def test_a_trial_worse_than_the_others_is_ended_early_and_one_that_diverges_ends_no_search(tmp_path, monkeypatch):
    def score(recipe, images, watch):
        number = watch.trial.number
        if number == 7:
            raise optuna.TrialPruned
        for epoch in range(1, 5):
            watch.best = 0.1 if number == 6 else 0.5 + number / 100
            watch.trial.report(watch.best, epoch)
            if watch.trial.should_prune():
                raise optuna.TrialPruned

    monkeypatch.setattr(search, "_fit", score)
    output = cli("search", *SMALL, "--epochs", 4, "--trials", 8, "--output", tmp_path, "--json")
    assert json.loads(output)["trials"] == 8
    rows = read_csv(tmp_path / "search.csv")
    ends = {int(row["trial"]): (row["state"], int(row["epochs"])) for row in rows}
    assert ends[6] == ("complete", 4)
    assert ends[7] == ("pruned", 2)
    assert ends[8] == ("pruned", 0)


def test_a_killed_trial_is_made_up_for_and_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupted(recipe, images, watch):
        if watch.trial.number == 1:
            raise KeyboardInterrupt
        watch.trial.report(0.5, 1)
        watch.best = 0.5

    monkeypatch.setattr(search, "_fit", interrupted)
    arguments = ["search", *SMALL, "--epochs", 1, "--trials", 2, "--output", tmp_path]
    assert "the same command continues" in cli(*arguments, code=130)
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'search.db'}")
    study.ask()  # runs for ever, as after a kill
    cli(*arguments)
    states = [trial.state.name for trial in study.get_trials()]
    assert states == ["COMPLETE", "FAIL", "FAIL", "COMPLETE"]


def test_ctrl_c_in_the_first_trial_is_no_error(tmp_path, monkeypatch):
    def interrupted(recipe, images, watch):
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "_fit", interrupted)
    cli("search", *SMALL, "--trials", 2, "--output", tmp_path, code=130)


def test_a_sweep_that_ends_at_once_says_why(tmp_path):
    for rates in (["--min-lr", 50, "--max-lr", 100], ["--lr", "1e-3", "--max-lr", 1e38, "--min-lr", 1e37]):
        output = cli("lr-find", *SMALL, "--output", tmp_path, *rates, code=2)
        assert "a lower --min-lr may help" in output
    assert not (tmp_path / "lr_find.csv").exists()
    assert "accelerator gpu needs a GPU" in cli("lr-find", *SMALL, "--output", tmp_path, "--accelerator", "gpu", code=2)
    assert "lr-find runs on 1 device, got devices 2" in cli("lr-find", *SMALL, "--devices", 2, code=2)


def test_a_search_stays_within_the_limits_of_the_recipe():
    space = search._space(load_recipe("digits", overrides={"lr": 500, "batch_size": 1}))
    assert space["lr"] == [50, 500, 1000]
    assert space["batch_size"] == [1, 1, 2]
    with pytest.raises(RecipeError, match="a search needs an lr above 0"):
        search._space(load_recipe("digits", overrides={"lr": 0}))


def test_a_database_that_is_none_is_named(tmp_path):
    (tmp_path / "search.db").write_text("no database " * 100)
    assert "search.db is not the database of a search" in cli("search", *SMALL, "--output", tmp_path, code=1)
