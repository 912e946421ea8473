"""`compare`: several networks trained on one recipe, or several finished runs."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column

from ..errors import RecipeError, first_line
from ..files import read_metrics, require_writable
from ..notes import PLAIN, show_notes
from ..sources import load_ready_recipe
from ._app import NARROW, app, console, require_train, right, table
from ._recipe_options import CONFIG, RecipeCommand, recipe_options


@app.command(cls=RecipeCommand)
@recipe_options
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...|RUN...", help="Variants of AlexNet, and torchvision/NAME, as resnet18; or run folders."
        ),
    ],
    recipe: Annotated[
        str | None, typer.Option(help="Recipe to train all models on; none: the arguments are finished runs.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the page; default: runs/compare, or runs/compare-RECIPE.")
    ] = None,
    config: CONFIG = None,
    seeds: Annotated[
        int, typer.Option(min=1, max=100, help="Runs of each network; the page has their means and deviations.")
    ] = 1,
    *,
    values: dict[str, Any],
) -> None:
    """Compare finished runs, or networks that this trains with equal settings: what each reaches and costs.

    With --recipe the same command continues where it was interrupted. A model that fails has the reason in its row, and
    the others are trained nevertheless; the exit code is then 1.
    """
    if recipe is not None:
        # Not every network takes a size: comparison_recipes checks it.
        load_ready_recipe(recipe, config, {key: value for key, value in values.items() if key != "size"})
    require_train()
    from ..training.comparison import comparison_recipes, comparison_rows, finished_rows

    if recipe is None:
        if config or values or seeds > 1:
            raise RecipeError("values are for training: --recipe names what to train the models on")
        runs = [Path(model) for model in dict.fromkeys(models)]
        if absent := next((run for run in runs if not run.is_dir()), None):
            raise RecipeError(f"{absent} is no run folder; --recipe RECIPE trains networks to compare them")
        rows = finished_rows(_named(runs))
        _show(output or Path("runs") / "compare", f"{len(rows)} runs", rows, {})
        return
    from ..data import load_images
    from ..training.evaluation import device_name
    from .run_recipe import run_recipe

    folder = output or Path("runs") / f"compare-{recipe}"
    recipes = comparison_recipes(list(dict.fromkeys(models)), recipe, config, values, folder, seeds)
    require_writable(folder)
    images = load_images(recipes[0])
    show_notes(images.notes)
    errors: dict[str, str] = {}  # by run folder
    for i, own in enumerate(recipes):
        run, model = Path(str(own.output)), own.variant
        if read_metrics(run) and (run / "weights.safetensors").exists():
            console.print(f"{model}: the run in {run} is taken over", **PLAIN)
            continue
        console.rule(f"{i + 1} of {len(recipes)}: {model}" + (f", seed {own.seed}" if seeds > 1 else ""))
        try:
            begun = (run / "checkpoints" / "last.ckpt").exists()
            code = run_recipe(None, None, {}, run, False) if begun else run_recipe(recipe, None, vars(own), None, True)
        except Exception as error:  # of any kind: it concerns this model alone
            errors[str(run)] = first_line(error)
            _print_error(model, errors[str(run)])
            continue
        if code:
            console.print("the same command continues this comparison")
            raise typer.Exit(code)
    with console.status("measuring inference"):
        rows = comparison_rows(recipes, images, errors)
    title = f"{recipe}: {len(rows) // seeds} networks on {len(images.test.labels):,} held-out images"
    title += f", {seeds} seeds" if seeds > 1 else ""
    _show(folder, title, rows, {"recipe": recipe, "device": device_name()})
    raise typer.Exit(1 if errors else 0)


def _named(runs: list[Path]) -> dict[str, Path]:
    """Run folders by their names, or by their paths where two have one name."""
    names = [run.resolve().name for run in runs]
    return {name if names.count(name) == 1 else str(run): run for name, run in zip(names, runs)}


def _show(folder: Path, title: str, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    from ..reports.comparison import means, write_comparison
    from ..reports.experiments import FIGURES, written

    write_comparison(folder, title, rows, facts)
    rows = means(rows)
    keys = [key for key in FIGURES if any(row[key] is not None for row in rows)]
    shown = table([Column("model", overflow="fold"), *right(*(FIGURES[key][0] for key in keys))], [], **NARROW)
    shown.title = title
    for row in rows:
        cells = [written(row, key) for key in keys]
        shown.add_row(row["model"], *(["[red]failed[/]"] if row["accuracy"] is None and keys else cells))
    console.print(shown)
    for row in rows:
        if row["error"]:
            _print_error(row["model"], row["error"])
    console.print(f"Comparison: {folder / 'compare.html'}, compare.png, compare.csv, compare.json", **PLAIN)


def _print_error(model: str, error: str) -> None:
    console.print(f"[bold red]{model} failed:[/] {escape(error)}", soft_wrap=True)
