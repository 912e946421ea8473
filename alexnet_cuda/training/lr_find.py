"""A learning rate for a recipe, from one sweep over rates."""

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import lightning
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.tuner import Tuner, lr_finder
from rich.console import Console

from ..data import load_images
from ..data.module import ImageData
from ..errors import RecipeError
from ..files import to_csv, write_text
from ..notes import show_notes
from ..recipe import Recipe
from .classifier import Classifier, Diverged
from .run import new_trainer, requested_devices

SKIPPED = 10  # losses at the start of a sweep, where their running mean covers few batches


def lr_find(
    recipe: Recipe, folder: Path, console: Console, steps: int = 100, low: float = 1e-6, high: float = 1.0
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Trains `steps` batches with a rate that grows from `low` to `high`, until the loss is four times its minimum.

    Returns the rates (steps,), the smoothed loss at each (steps,), and the rates that `suggest` names; writes
    lr_find.csv to `folder`. The sweep is Lightning's, after L. Smith, "Cyclical Learning Rates for Training
    Neural Networks", WACV 2017, section 3.3. Raises RecipeError for limits that leave nothing to suggest.
    """
    if not 0 < low < high:
        raise RecipeError(f"--min-lr must be positive and below --max-lr, got {low:g} and {high:g}")
    if steps < 2 * SKIPPED:
        raise RecipeError(f"--steps must be at least {2 * SKIPPED}, got {steps}")
    recipe.require_one_device("lr-find")
    images = load_images(recipe)
    show_notes(images.notes)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:  # Lightning keeps the initial weights there
        trainer = trial_trainer(recipe, scratch, max_epochs=steps, check_val_every_n_epoch=steps + 1)
        console.print(f"{recipe.name}: {steps} batches of {recipe.batch_size}, {low:g} to {high:g}")
        module, data = SweepClassifier(recipe, images.classes), ImageData(images, recipe)
        if module.note:
            show_notes([module.note])
        limits: dict[str, Any] = {"min_lr": low, "max_lr": high, "num_training": steps}
        bar = functools.partial(lr_finder.tqdm, disable=not console.is_terminal)
        with patch.object(lr_finder, "tqdm", bar):
            found = Tuner(trainer).lr_find(module, datamodule=data, update_attr=False, **limits)
    assert found is not None
    losses = np.array(module.losses)
    if len(losses) <= SKIPPED:
        raise RecipeError(f"the loss grew or was not finite from batch {len(losses)} on; a lower --min-lr may help")
    rates = np.array(found.results["lr"][: len(losses)])
    rows = [{"lr": lr, "loss": loss} for lr, loss in zip(rates.tolist(), losses.tolist())]
    write_text(folder / "lr_find.csv", to_csv(rows))
    return rates, losses, suggest(rates, losses)


def suggest(rates: np.ndarray, losses: np.ndarray) -> dict[str, float]:
    """Two rates for a sweep whose `losses` (steps,) fall and then rise. "valley": the middle of the longest decreasing
    subsequence of the losses, so that noise does not decide. "minimum / 10": a tenth of the rate of the least loss."""
    losses = losses[SKIPPED:]
    if int(np.argmin(losses)) < 2:
        raise RecipeError("the loss never fell: a lower --min-lr, or more --steps, may help")
    length, before = np.ones(len(losses), int), np.arange(len(losses))
    for i in range(1, len(losses)):
        higher = np.flatnonzero(losses[:i] > losses[i])
        if len(higher):
            before[i] = higher[np.argmax(length[higher])]
            length[i] = length[before[i]] + 1
    chain = [int(np.argmax(length))]
    while before[chain[-1]] != chain[-1]:
        chain.append(int(before[chain[-1]]))
    rates = rates[SKIPPED:]
    return {"valley": float(rates[chain[len(chain) // 2]]), "minimum / 10": float(rates[np.argmin(losses)] / 10)}


class SweepClassifier(Classifier):
    """A Classifier during the sweep: layers keep the ratios of their rates, and a loss that is NaN ends the sweep."""

    MEMORY = 0.9  # of the running mean; Lightning's 0.98 lags behind by half a sweep, and starts at half the loss

    def on_train_start(self) -> None:
        self.mean, self.losses = 0.0, list[float]()

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        for group, ratio in zip(cast(Any, self.optimizers()).param_groups, self.ratios, strict=True):
            group["lr"] *= ratio  # the sweep sets all groups to the same rate after every batch

    def configure_optimizers(self):
        optimiser = super().configure_optimizers()["optimizer"]
        rates = [group.get("initial_lr", group["lr"]) for group in optimiser.param_groups]
        self.ratios = [rate / (max(rates) or 1.0) for rate in rates]
        return optimiser

    def training_step(self, batch, batch_idx: int):
        try:
            loss = super().training_step(batch, batch_idx)
        except Diverged:
            self.trainer.should_stop = True
            return None
        self.mean = self.MEMORY * self.mean + (1 - self.MEMORY) * loss.item()
        self.losses.append(self.mean / (1 - self.MEMORY ** (len(self.losses) + 1)))
        return loss


def trial_trainer(recipe: Recipe, folder: str, callbacks: Sequence[Callback] = (), **options: Any) -> lightning.Trainer:
    """A trainer as in a run, but on one device and without checkpoints and logs."""
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    requested_devices(recipe)
    return new_trainer(recipe, devices=1, default_root_dir=folder, callbacks=list(callbacks), **off, **options)
