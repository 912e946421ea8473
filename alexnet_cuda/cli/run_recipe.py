"""Runs a recipe from data to report: what `alexnet-cuda train` does, with what it prints."""

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml
from rich.markup import escape

from ..data import load_images
from ..data.folder import require_outside
from ..data.scan import count
from ..errors import DataError, RecipeError
from ..files import require_writable
from ..formats.tensors import weights_file
from ..networks import count_parameters
from ..notes import PLAIN, show_notes
from ..recipe import FIELDS, FIXED, ON_REQUEST, Recipe, load_recipe, read_recipe, read_yaml, resume_rule
from ..reports.report import write_report
from ..training.callbacks import is_main_process
from ..training.classifier import Diverged
from ..training.run import finish, precision, requested_devices, run_folder, train
from ..weights import read_checkpoint
from ._app import class_table, console, require_classes, right, show_figure, table

FEW, LARGE = 5000, 10_000_000  # training images, parameters


def run_recipe(
    name: str | None, config: Path | None, values: Mapping, resume: Path | None, overwrite: bool, allow: bool = False
) -> int:
    """Runs the recipe `name`, or continues the run folder or checkpoint `resume`.

    Returns the exit code, 130 after Ctrl-C. Values of a resumed run change only as their resume rules permit; `allow`
    permits those that change on request.
    """
    console.quiet = not is_main_process()
    started, checkpoint, trained = time.monotonic(), None, None
    if resume is not None:
        recipe, folder, checkpoint, trained = _resumed(name, config, values, resume, allow)
    elif name is None:
        raise RecipeError("expected a recipe; `alexnet-cuda recipes` lists them")
    else:
        recipe = load_recipe(name, config, values)
        folder = run_folder(recipe)
        if (folder / "config.yaml").exists() and is_main_process() and not overwrite:
            raise RecipeError(f"{folder} already holds a run: --resume {folder} continues it, --overwrite replaces it")
        if not (folder / "config.yaml").exists() and any(folder.glob("checkpoints/*")):
            raise RecipeError(f"{folder} holds checkpoints/ but no run: name another folder with --output")
        require_outside(folder, recipe)
        if recipe.weights not in (None, "torchvision"):
            weights_file(str(recipe.weights))
    require_writable(folder)
    requested_devices(recipe)
    images = load_images(recipe)
    if trained:
        require_classes(images.classes, trained)
    show_notes(images.notes, console)
    console.print(class_table(f"{recipe.data}: {len(images.classes)} classes", images))
    parameters = count_parameters(recipe, len(images.classes))
    begins = f"continued from {checkpoint}" if checkpoint else count(recipe.epochs, "epoch")
    facts = f"{recipe.variant}, {parameters:,} parameters, {precision(recipe)}, {begins}, run folder {folder}"
    console.print(facts, **PLAIN)
    if (seen := len(images.train.labels)) < FEW and parameters > LARGE and not recipe.weights and not checkpoint:
        fits = "--variant cifar, or --variant torchvision --weights torchvision --freeze features"
        show_notes([f"{seen:,} training images are few for {parameters / 1e6:.1f} M parameters: {fits} may suit them"])
    try:
        with _replaced(folder) if overwrite and is_main_process() else contextlib.nullcontext():
            outcome = train(recipe, images, folder, console, checkpoint)
    except Diverged as error:
        last = folder / "checkpoints" / "last.ckpt"
        good = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written yet"
        raise Diverged(f"training stopped: {error}; {good}; a lower --lr (now {recipe.lr:g}) may help") from error
    if outcome.ended == "signal":
        how = f"alexnet-cuda train --resume {folder}"
        console.print(f"stopped after step {outcome.steps}; go on with: {how}", **PLAIN)
        return 130
    if not is_main_process():
        return 0
    metrics, predictions = finish(recipe, images, folder, outcome)
    paths = write_report(folder, recipe, images, outcome.module.model, predictions.probabilities, metrics)
    _report(metrics, time.monotonic() - started)
    console.print(f"Run folder: {folder}", **PLAIN)
    console.print(f"Pictures, in one page: {paths[0]}", **PLAIN)
    return 0


def _resumed(
    name: str | None, config: Path | None, values: Mapping, resume: Path, allow: bool
) -> tuple[Recipe, Path, Path, list[str] | None]:
    """The recipe, run folder and checkpoint to go on with, and the classes of the checkpoint, which older ones lack."""
    checkpoint = resume
    if resume.is_dir():
        last, best = (resume / "checkpoints" / name for name in ("last.ckpt", "best.ckpt"))
        checkpoint = best if best.exists() and not last.exists() else last
    if not checkpoint.exists():
        raise DataError(f"{checkpoint} does not exist: nothing to resume")
    if checkpoint.suffix != ".ckpt":
        raise DataError(f"{checkpoint} is no checkpoint (.ckpt) of a run; a new run with --weights may start from it")
    folder = checkpoint.parent.parent
    run = _whole_config(folder / "config.yaml")
    if name not in (None, run.name):
        raise RecipeError(f"{folder} is a run of {run.name!r}, not of {name!r}")
    asked = run.replace({**(read_yaml(config) if config else {}), **values})
    saved = read_checkpoint(checkpoint)
    classes = saved.get("classes")
    if "recipe" in saved:  # what was trained, whatever config.yaml says now
        run = Recipe().replace({**yaml.safe_load(saved["recipe"]), "output": run.output})
    if asked.output and Path(asked.output).resolve() == folder.resolve():
        asked = asked.replace({"output": run.output})
    changed = [key for key in run.changes(asked) if resume_rule(key) in (FIXED, ON_REQUEST) or key == "output"]
    if not changed:
        return asked, folder, checkpoint, classes
    rows = [[key, *(escape(str(getattr(recipe, key))) for recipe in (run, asked))] for key in changed]
    console.print(table(["value", "run has", "asked"], rows, title=f"{escape(str(folder))}: changed values"))
    plateau = "plateau" in (run.schedule, asked.schedule)  # its state in a checkpoint is another one
    fixed = [key for key in changed if resume_rule(key) == FIXED or key == "output" or (key == "schedule" and plateau)]
    if fixed:
        raise RecipeError(f"{', '.join(fixed)} cannot change in a resumed run; a new run with --weights {folder} can")
    if not allow:
        raise RecipeError(f"{', '.join(changed)} would change in the resumed run: --allow-changes, if that is meant")
    return asked, folder, checkpoint, classes


def _whole_config(path: Path) -> Recipe:
    """The recipe of a run; RecipeError where its file is cut, so that a default would take the place of a value."""
    recipe, values = read_recipe(path), read_yaml(path)
    if lacking := [key for key in FIELDS if key not in values]:
        raise RecipeError(f"{path} lacks {', '.join(lacking)}: it is cut, or of another version; add what the run had")
    if not path.read_bytes().endswith(b"\n"):
        raise RecipeError(f"{path} is cut: its last line does not end")
    return recipe


@contextlib.contextmanager
def _replaced(folder: Path) -> Iterator[None]:
    """Sets the run in a folder aside. It comes back where the block fails before its own first checkpoint; after a
    kill, at the next call."""
    _put_back(folder)
    for part, old in _parts(folder).items():
        _remove(old)
        if part.exists():
            part.rename(old)
    try:
        yield
    except BaseException:
        _put_back(folder)
        raise
    finally:
        for old in _parts(folder).values():
            _remove(old)


def _parts(folder: Path) -> dict[Path, Path]:
    """What a run consists of, with the name that each part has while it is set aside."""
    names = ("checkpoints", "tensorboard", "config.yaml", "metrics.csv", "metrics.json", "weights.safetensors",
             "per_class.csv", "report.html")  # fmt: skip
    return {folder / name: folder / f".replaced-{name}" for name in names}


def _put_back(folder: Path) -> None:
    """Undoes what set a run aside, unless the new run has a checkpoint."""
    if (folder / "checkpoints" / "last.ckpt").exists():
        return
    for part, old in _parts(folder).items():
        if old.exists():
            _remove(part)
            old.rename(part)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _report(metrics: dict, seconds: float) -> None:
    figures = {key: value for key, value in metrics.items() if key.startswith("test/")}
    rows = [(key, show_figure(key, value)) for key, value in figures.items()]
    title = f"{metrics['recipe']}: {metrics['variant']} on {metrics['images']['test']:,} held-out images"
    made = table(["figure", *right("value")], rows, title=title)
    made.add_section()
    made.add_row("parameters", f"{metrics['parameters']:,}")
    made.add_row("epochs, steps", f"{metrics['epochs']}, {metrics['steps']:,}")
    made.add_row("seconds of training, in all", f"{metrics['seconds']:.1f}, {seconds:.1f}")
    console.print(made)
