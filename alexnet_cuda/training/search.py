"""Values for a recipe, from many short trainings."""

import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from optuna.trial import FrozenTrial, Trial, TrialState
from rich.console import Console
from rich.progress import Progress

from ..data import ImageSet, load_images
from ..data.module import ImageData
from ..errors import DataError, RecipeError
from ..files import to_csv, write_text
from ..notes import PLAIN, show_notes
from ..recipe import FIELDS, MACHINE, Recipe, load_recipe, resume_rule
from ..words import percent, three_digits
from .classifier import Classifier, Diverged
from .lr_find import trial_trainer
from .run import Averaging

ENDS = {TrialState.PRUNED: ", ended early", TrialState.FAIL: ", failed"}


@dataclass
class Search:
    """The finished trials as rows of search.csv, best first; the searched keys; whether all trials asked for have run.

    A row has the keys trial (its number, from 1), the searched keys, epochs, val/accuracy (the best epoch's, 0..1) and
    state (complete, or pruned: ended early).
    """

    rows: list[dict[str, Any]]
    keys: list[str]
    complete: bool

    @property
    def best(self) -> dict[str, Any]:
        return {key: self.rows[0][key] for key in self.keys}


def search(
    name: str, config: Path | None, values: Mapping[str, Any], folder: Path, trials: int, console: Console
) -> Search:
    """Trains the recipe up to `trials` times with other values and finds those with the best validation accuracy.

    Searched are lr (a tenth to ten times the recipe's), weight_decay (1e-5 to 0.1), label_smoothing (0 to 0.2) and
    batch_size (half, the same, twice), except those in `values`, which stay as given. The first trial is the recipe
    itself. Optuna's TPE sampler chooses the others; a trial below the median of the earlier ones after the same epoch
    is ended. The test split is not used.

    `folder` holds search.db, from which the same call continues, search.csv, and best.yaml for --config. Raises
    RecipeError if there is no validation split or `folder` holds a search of other values.
    """
    recipe = load_recipe(name, config, values)
    if recipe.val_fraction == 0:
        raise RecipeError("val_fraction 0 leaves only the test split to choose by; give --val-fraction 0.1, say")
    recipe.require_one_device("a search")
    space = {key: limits for key, limits in _space(recipe).items() if key not in values}
    if not space:
        raise RecipeError("nothing is left to search: lr, weight_decay, label_smoothing and batch_size are all given")
    images = load_images(recipe)
    show_notes(images.notes)
    folder.mkdir(parents=True, exist_ok=True)
    study = _study(recipe, space, folder)
    done = len(_rows(study))
    missing, complete = max(0, trials - done), True
    if done:
        console.print(f"{done} trials of {folder} are taken over", **PLAIN)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("trials", total=max(1, missing) * recipe.epochs)

        def objective(trial: Trial) -> float:
            chosen: dict[str, float] = {}
            for key, limits in space.items():
                if key == "batch_size":
                    chosen[key] = trial.suggest_categorical(key, sorted({*limits}))
                else:
                    chosen[key] = trial.suggest_float(key, limits[0], limits[-1], log=key != "label_smoothing")
            position = len(_rows(study)) - done
            watch = TrialCallback(trial, lambda epochs: bar.update(task, completed=position * recipe.epochs + epochs))
            _fit(recipe.replace(chosen), images, watch)
            return watch.best

        def report(study: optuna.Study, trial: FrozenTrial) -> None:
            accuracy = f"val/accuracy {percent(_score(trial))} in {len(trial.intermediate_values)} epochs"
            chosen = "  ".join(f"{key} {three_digits(value)}" for key, value in trial.params.items())
            line = f"trial {trial.number + 1}: {accuracy}{ENDS.get(trial.state, '')}  {chosen}"
            bar.console.print(line, soft_wrap=True)

        try:
            study.optimize(objective, missing, catch=(torch.OutOfMemoryError,), callbacks=[report])
        except KeyboardInterrupt:
            complete = False
    found = Search(_rows(study), list(space), complete)
    if not complete and not found.rows:
        raise KeyboardInterrupt
    if not found.rows or found.rows[0]["val/accuracy"] == 0:
        raise DataError(f"no trial ended with an accuracy; {folder / 'search.db'} has {len(study.trials)}")
    write_text(folder / "search.csv", to_csv(found.rows))
    accuracy = f"validation accuracy {found.rows[0]['val/accuracy']:.4f} after at most {recipe.epochs} epochs"
    head = f"# {recipe.name}: {accuracy}, the best of {len(found.rows)} trials"
    write_text(folder / "best.yaml", f"{head}\n{yaml.safe_dump(found.best, sort_keys=False)}")
    return found


class TrialCallback(Callback):
    """Reports the validation accuracy of every epoch to Optuna, and ends the trial where Optuna asks for it."""

    def __init__(self, trial: Trial, progress: Callable[[float], None]):
        self.trial, self.progress, self.best = trial, progress, 0.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.progress(trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches)

    def on_validation_end(self, trainer, pl_module) -> None:
        accuracy = trainer.callback_metrics["val/accuracy"].item()
        self.best = max(self.best, accuracy)
        self.trial.report(accuracy, trainer.current_epoch + 1)
        if trainer.current_epoch + 1 < trainer.max_epochs and self.trial.should_prune():
            raise optuna.TrialPruned


def _fit(recipe: Recipe, images: ImageSet, watch: TrialCallback) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trial_trainer(recipe, scratch, [*Averaging.of(recipe), watch], max_epochs=recipe.epochs)
        try:
            trainer.fit(Classifier(recipe, images.classes), ImageData(images, recipe))
        except Diverged as error:
            raise optuna.TrialPruned from error
        except SystemExit:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from None


def _space(recipe: Recipe) -> dict[str, list]:
    """Lowest value, the recipe's own, and highest value of what is searched."""
    if recipe.lr == 0:
        raise RecipeError("a search needs an lr above 0")
    return {
        "lr": [recipe.lr / 10, recipe.lr, min(recipe.lr * 10, FIELDS["lr"].metadata["limits"][1])],
        "weight_decay": [1e-5, min(0.1, max(1e-5, recipe.weight_decay)), 0.1],
        "label_smoothing": [0.0, min(0.2, recipe.label_smoothing), 0.2],
        "batch_size": [max(1, recipe.batch_size // 2), recipe.batch_size, recipe.batch_size * 2],
    }


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
    except Exception as error:  # the database library has a type of its own for every kind of damage
        raise DataError(f"{path} is not the database of a search: {str(error).splitlines()[0]}") from error
    for key, value in base.items():
        if was.get(key) != value and (key == "searched" or resume_rule(key) != MACHINE):
            raise RecipeError(f"{folder} holds a search with {key} {was.get(key)}, not {value}: give another --output")
    study.set_user_attr("recipe", base)
    # With the same seed, the sampler would draw the trials again that the study already has.
    study.sampler = optuna.samplers.TPESampler(seed=recipe.seed + len(study.trials))
    for trial in study.get_trials(states=(TrialState.RUNNING,)):  # a kill ended it
        study.tell(trial.number, state=TrialState.FAIL)
    own = {key: limits[1] for key, limits in space.items()}
    if not any(t.params == own or t.state == TrialState.WAITING for t in study.trials if t.state != TrialState.FAIL):
        study.enqueue_trial(own)
    return study


def _score(trial: FrozenTrial) -> float:
    """The best validation accuracy of a trial, 0 if it finished no epoch."""
    return max(trial.intermediate_values.values(), default=0.0)


def _rows(study: optuna.Study) -> list[dict[str, Any]]:
    """The trials that were completed or pruned, best first, as `Search.rows`."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    trials.sort(key=lambda t: (t.state != TrialState.COMPLETE, -_score(t), t.number))
    return [
        {"trial": t.number + 1, **t.params, "epochs": len(t.intermediate_values), "val/accuracy": _score(t),
         "state": t.state.name.lower()}
        for t in trials
    ]  # fmt: skip
