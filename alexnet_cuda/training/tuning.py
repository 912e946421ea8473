"""Values of a recipe found by trying: a learning rate from one sweep, several values from many short trainings."""

import csv
import io
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning
import matplotlib
import numpy as np
import optuna
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.tuner import Tuner
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from optuna.trial import FrozenTrial, Trial, TrialState
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..data import DataError, ImageSet, atomic_path, load_images, write_text
from ..data.module import ImageData
from ..reports.charts import BLUE, GREY, ORANGE, STYLE, blank
from .classifier import Classifier, Diverged
from .recipe import Recipe, RecipeError, load_recipe
from .run import _quiet, averaging, new_trainer

SKIPPED = 10  # losses at the start of a sweep, where their running mean is still that of a few batches
MACHINE = ("accelerator", "devices", "nodes", "workers", "data_path", "output")  # a search goes on when these change


@dataclass
class Sweep:
    """Learning rates (steps,), the smoothed loss at each (steps,), and the rate at which it falls fastest."""

    rates: np.ndarray
    losses: np.ndarray
    suggestion: float


def lr_find(
    recipe: Recipe, folder: Path, console: Console, steps: int = 100, low: float = 1e-6, high: float = 1.0
) -> Sweep:
    """Trains `steps` batches with a rate that grows from `low` to `high`, until the loss is four times its least.

    Leaves lr_find.png and lr_find.csv in `folder`. The sweep is Lightning's, after L. Smith, "Cyclical Learning Rates
    for Training Neural Networks", WACV 2017, section 3.3. Raises RecipeError for limits that leave nothing to suggest.
    """
    if not 0 < low < high:
        raise RecipeError(f"--min-lr must be positive and below --max-lr, got {low:g} and {high:g}")
    if steps < 2 * SKIPPED:
        raise RecipeError(f"--steps must be at least {2 * SKIPPED}, got {steps}")
    images = load_images(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:  # Lightning keeps the first weights there
        trainer = _trainer(recipe, scratch, [], max_epochs=steps, check_val_every_n_epoch=steps + 1)
        console.print(f"{recipe.name}: {steps} batches of {recipe.batch_size}, {low:g} to {high:g}", highlight=False)
        module, data = _Swept(recipe, len(images.classes)), ImageData(images, recipe)
        found = Tuner(trainer).lr_find(
            module, datamodule=data, min_lr=low, max_lr=high, num_training=steps, update_attr=False
        )
    assert found is not None
    losses = np.array(module.losses)
    rates = np.array(found.results["lr"][: len(losses)])
    sweep = Sweep(rates, losses, suggest(rates, losses))
    rows = [("lr", "loss"), *zip(rates.tolist(), losses.tolist(), strict=True)]
    write_text(folder / "lr_find.csv", _csv(rows))
    with atomic_path(folder / "lr_find.png") as temporary, matplotlib.rc_context(STYLE):
        sweep_chart(sweep, f"{recipe.name}, {recipe.variant}, batches of {recipe.batch_size}").savefig(temporary)
    return sweep


def suggest(rates: np.ndarray, losses: np.ndarray) -> float:
    """The rate at which `losses` (steps,) fall fastest, before their minimum.

    Against the logarithm of the rate: against the rate itself, as Lightning's own suggestion has it, the noise at the
    low end, divided by tiny differences, would win.
    """
    end = int(np.argmin(losses)) + 1
    if end - SKIPPED < 2:
        raise RecipeError("the loss never fell: a lower --min-lr, or more --steps, may help")
    slopes = np.gradient(losses[SKIPPED:end], np.log(rates[SKIPPED:end]))
    return float(rates[SKIPPED + int(np.argmin(slopes))])


def sweep_chart(sweep: Sweep, title: str) -> Figure:
    """Loss against learning rate, with the suggestion marked."""
    figure = blank(6.4, 4)
    axis = figure.subplots()
    axis.plot(sweep.rates, sweep.losses, color=BLUE)
    at = int(np.argmin(np.abs(sweep.rates - sweep.suggestion)))
    axis.plot(sweep.suggestion, sweep.losses[at], "o", color=ORANGE, label=f"suggestion: {sweep.suggestion:.2g}")
    least, first = sweep.losses.min(), sweep.losses[: 2 * SKIPPED].max()
    axis.set(xscale="log", xlabel="learning rate", ylabel="cross-entropy, running mean", title=title)
    axis.set_ylim(max(0, least - 0.2 * (first - least)), first + 0.5 * (first - least))  # what follows is off the scale
    axis.grid(alpha=0.2)
    axis.legend()
    return figure


class _Swept(Classifier):
    """A Classifier during the sweep: the layers keep their shares of the rate, and a loss that is no number ends it."""

    MEMORY = 0.9  # of the running mean; Lightning's 0.98 lags behind by half a sweep, and starts at half the loss

    def on_train_start(self) -> None:
        self.mean, self.losses = 0.0, list[float]()

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        for group, own in zip(cast(Any, self.optimizers()).param_groups, self.shares, strict=True):
            group["lr"] *= own  # the sweep sets it anew, and equal for all groups, after every batch

    def configure_optimizers(self):
        optimiser = super().configure_optimizers()["optimizer"]
        largest = max(group.get("initial_lr", group["lr"]) for group in optimiser.param_groups) or 1.0
        self.shares = [group.get("initial_lr", group["lr"]) / largest for group in optimiser.param_groups]
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


@dataclass
class Search:
    """The finished trials, best first, the best one's values, and whether all that were asked for have run."""

    trials: list[FrozenTrial]
    best: dict[str, Any]
    whole: bool


def search(
    name: str, config: Path | None, values: Mapping[str, Any], folder: Path, trials: int, console: Console
) -> Search:
    """Trains the recipe up to `trials` times with other values and keeps those with the best validation accuracy.

    What is searched, from the recipe's own values outwards, are lr (a tenth to ten times), weight_decay (1e-5 to 0.1),
    label_smoothing (0 to 0.2) and batch_size (half, same, twice), but for those in `values`, which stay as given. The
    first trial is the recipe itself. Optuna's TPE sampler chooses the others; a trial below the median of the earlier
    ones after the same epoch is ended. The test split is not looked at.

    `folder` holds search.db, with which the same call goes on, search.csv, search.png and best.yaml, a --config.
    Raises RecipeError where no split but the test's could judge, and where `folder` holds a search of other values.
    """
    recipe = load_recipe(name, config, values)
    if recipe.val_fraction == 0:
        raise RecipeError("val_fraction 0 leaves only the test split to choose by; give --val-fraction 0.1, say")
    recipe.require_one_device("a search")
    space = {key: limits for key, limits in _space(recipe).items() if key not in values}
    if not space:
        raise RecipeError("nothing is left to search: lr, weight_decay, label_smoothing and batch_size are all given")
    images = load_images(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    study = _study(recipe, space, folder)
    done = _ended(study)
    missing = trials - len(done)
    if done:
        console.print(f"{len(done)} trials of {folder} are taken over", soft_wrap=True, highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    whole = True
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("trials", total=max(1, missing) * recipe.epochs)

        def objective(trial: Trial) -> float:
            chosen = {key: _draw(trial, key, limits) for key, limits in space.items()}
            position = len(_ended(study)) - len(done)
            watch = _Watch(trial, lambda epochs: bar.update(task, completed=position * recipe.epochs + epochs))
            _fit(recipe.replace(chosen), images, watch)
            return watch.best

        def said(study: optuna.Study, trial: FrozenTrial) -> None:
            bar.console.print(f"trial {trial.number + 1}: {_line(trial)}", soft_wrap=True, highlight=False)

        try:
            study.optimize(objective, max(0, missing), catch=(torch.OutOfMemoryError,), callbacks=[said])
        except KeyboardInterrupt:
            whole = False
    best = _leave(study, recipe, folder)
    return Search(_ended(study), best, whole)


def search_chart(trials: list[FrozenTrial], title: str) -> Figure:
    """Validation accuracy against each value; every trial is a dot, the best one marked."""
    keys = list(trials[0].params)
    figure = blank(2.7 * len(keys) + 0.8, 3.4)
    axes = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for axis, key in zip(axes, keys, strict=True):
        for state, marker, label in ((TrialState.COMPLETE, "o", "to the end"), (TrialState.PRUNED, "x", "ended early")):
            shown = [t for t in trials[1:] if t.state == state and score(t) > 0]
            points = [t.params[key] for t in shown], [score(t) for t in shown]
            axis.plot(*points, marker, color=BLUE if marker == "o" else GREY, markersize=5, alpha=0.8, label=label)
        axis.plot(trials[0].params[key], score(trials[0]), "*", color=ORANGE, markersize=13, label="best")
        axis.set(xlabel=key, xscale="linear" if key == "label_smoothing" else "log")
        if key == "batch_size":
            sizes = sorted({t.params[key] for t in trials})
            axis.set_xticks(sizes, [f"{size}" for size in sizes])
            axis.minorticks_off()
        axis.grid(alpha=0.2)
    axes[0].set_ylabel("best validation accuracy")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(title)
    return figure


def search_table(found: Search, title: str, shown: int = 15) -> Table:
    """The best trials, for the terminal."""
    keys = list(found.trials[0].params)
    table = Table("trial", *keys, "epochs", "val/accuracy", title=title)
    for column in table.columns:
        column.justify = "right"
    for i, trial in enumerate(found.trials[:shown]):
        ended = "" if trial.state == TrialState.COMPLETE else " [dim]ended early[/]"
        row = [f"{trial.params[key]:.3g}" for key in keys]
        table.add_row(f"{trial.number + 1}", *row, f"{len(trial.intermediate_values)}{ended}", f"{score(trial):.2%}",
                      style="bold" if i == 0 else None)  # fmt: skip
    if len(found.trials) > shown:
        table.caption = f"the best {shown} of {len(found.trials)}; search.csv has all"
    return table


def score(trial: FrozenTrial) -> float:
    """The best validation accuracy of a trial, 0 where no epoch ended."""
    return max(trial.intermediate_values.values(), default=0.0)


class _Watch(Callback):
    """Tells optuna the validation accuracy of every epoch, and ends the trial where optuna says so."""

    def __init__(self, trial: Trial, progress):
        self.trial, self.progress, self.best = trial, progress, 0.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.progress(trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches)

    def on_validation_end(self, trainer, pl_module) -> None:
        accuracy = trainer.callback_metrics["val/accuracy"].item()
        self.best = max(self.best, accuracy)
        self.trial.report(accuracy, trainer.current_epoch + 1)
        if trainer.current_epoch + 1 < trainer.max_epochs and self.trial.should_prune():
            raise optuna.TrialPruned


def _fit(recipe: Recipe, images: ImageSet, watch: _Watch) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(recipe, scratch, [*averaging(recipe), watch], max_epochs=recipe.epochs)
        try:
            trainer.fit(Classifier(recipe, len(images.classes)), ImageData(images, recipe))
        except Diverged as error:
            raise optuna.TrialPruned from error
        except SystemExit:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from None


def _trainer(recipe: Recipe, folder: str, callbacks: list[Callback], **options) -> lightning.Trainer:
    """As in a run, but on one device, and nothing is written."""
    _quiet()
    lightning.seed_everything(recipe.seed, workers=True, verbose=False)
    return new_trainer(
        recipe,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        callbacks=callbacks,
        **options,
    )


def _space(recipe: Recipe) -> dict[str, list]:
    """Limits of what is searched; the middle one is the recipe's own value."""
    return {
        "lr": [recipe.lr / 10, recipe.lr, recipe.lr * 10],
        "weight_decay": [1e-5, min(0.1, max(1e-5, recipe.weight_decay)), 0.1],
        "label_smoothing": [0.0, min(0.2, recipe.label_smoothing), 0.2],
        "batch_size": [max(1, recipe.batch_size // 2), recipe.batch_size, recipe.batch_size * 2],
    }


def _draw(trial: Trial, key: str, limits: list) -> float | int:
    if key == "batch_size":
        return trial.suggest_categorical(key, limits)
    return trial.suggest_float(key, limits[0], limits[2], log=key != "label_smoothing")


def _study(recipe: Recipe, space: dict[str, list], folder: Path) -> optuna.Study:
    """The search that `folder` holds, or a new one whose first trial is the recipe itself."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    path = folder / "search.db"
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{path}", study_name="search", direction="maximize", load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_warmup_steps=1 + recipe.epochs // 4),
        )  # fmt: skip
        base = yaml.safe_load(recipe.to_yaml()) | {"searched": list(space)}
        was = study.user_attrs.get("recipe", base)
    except Exception as error:  # the database library raises a type of its own for every kind of damage
        raise DataError(f"{path} is not the database of a search: {str(error).splitlines()[0]}") from error
    for key, value in base.items():
        if key not in MACHINE and was.get(key) != value:
            raise RecipeError(f"{folder} holds a search with {key} {was.get(key)}, not {value}: give another --output")
    study.set_user_attr("recipe", base)
    # The same seed again would draw the trials again that are there already.
    study.sampler = optuna.samplers.TPESampler(seed=recipe.seed + len(study.trials))
    for trial in study.get_trials(states=(TrialState.RUNNING,)):  # a kill ended it
        study.tell(trial.number, state=TrialState.FAIL)
    own = {key: limits[1] for key, limits in space.items()}
    if not any(t.params == own or t.state == TrialState.WAITING for t in study.trials if t.state != TrialState.FAIL):
        study.enqueue_trial(own)
    return study


def _ended(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that ended by themselves, best first."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return sorted(trials, key=lambda t: (t.state != TrialState.COMPLETE, -score(t), t.number))


def _leave(study: optuna.Study, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Writes the files of a search; gives the best values."""
    trials = _ended(study)
    if not trials or score(trials[0]) == 0:
        raise DataError(f"no trial ended with an accuracy; {folder / 'search.db'} has {len(study.trials)}")
    best = trials[0]
    keys = list(best.params)
    rows = [[t.number + 1, *(t.params[key] for key in keys), len(t.intermediate_values), score(t), t.state.name.lower()]
            for t in trials]  # fmt: skip
    write_text(folder / "search.csv", _csv([["trial", *keys, "epochs", "val/accuracy", "state"], *rows]))
    head = f"# {recipe.name}: validation accuracy {score(best):.4f} after at most {recipe.epochs} epochs, the best of "
    write_text(folder / "best.yaml", f"{head}{len(trials)} trials\n{yaml.safe_dump(best.params, sort_keys=False)}")
    with atomic_path(folder / "search.png") as temporary, matplotlib.rc_context(STYLE):
        search_chart(trials, f"{recipe.name}, {recipe.variant}: {len(trials)} trials").savefig(temporary)
    return best.params


def _line(trial: FrozenTrial) -> str:
    ends = {TrialState.COMPLETE: "", TrialState.PRUNED: ", ended early", TrialState.FAIL: ", failed"}
    values = "  ".join(f"{key} {value:.3g}" for key, value in trial.params.items())
    epochs = len(trial.intermediate_values)
    return f"val/accuracy {score(trial):.2%} in {epochs} epochs{ends.get(trial.state, '')}  {values}"


def _csv(rows: list) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
