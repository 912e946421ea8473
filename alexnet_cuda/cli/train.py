"""`train`, `recipes`, `lr-find` and `search`: training on a recipe, and values for it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..notes import PLAIN
from ..recipe import FIELDS, Recipe, list_recipes, load_recipe
from ..sources import load_ready_recipe
from ..words import percent, three_digits
from ._app import JSON, NARROW, app, console, require, require_train, right, table
from ._recipe_options import CONFIG, RECIPE, RecipeCommand, recipe_options


@app.command(cls=RecipeCommand)
@recipe_options
def train(
    recipe: Annotated[str | None, typer.Argument(help="Name of a recipe; `alexnet-cuda recipes` lists them.")] = None,
    config: CONFIG = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder or checkpoint to continue.")] = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume with other values of the recipe than the run had.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that --output holds.")] = False,
    *,
    values: dict[str, Any],
) -> None:
    """Train on a recipe. `alexnet-cuda recipes NAME` shows its values, which the options below change.

    --flip stands for --flip true, --no-flip for --flip false.
    """
    if recipe is not None and resume is None:
        load_ready_recipe(recipe, config, values)
    require_train()
    from .run_recipe import run_recipe

    raise typer.Exit(run_recipe(recipe, config, values, resume, overwrite, allow_changes))


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Recipe whose values to show.")] = None) -> None:
    """List the recipes, or every value of one."""
    if name is not None:
        for line in _explained(load_recipe(name)):
            console.print(line, soft_wrap=True)
    else:
        console.print(table(["recipe", "what it is"], list_recipes().items()))


@app.command(cls=RecipeCommand)
@recipe_options
def lr_find(
    recipe: RECIPE,
    output: Annotated[Path | None, typer.Option(help="Folder of the picture; none: runs/lr-find-RECIPE.")] = None,
    steps: Annotated[int, typer.Option(help="Batches to train.")] = 100,
    min_lr: Annotated[float, typer.Option(help="Learning rate of the first batch.")] = 1e-6,
    max_lr: Annotated[float, typer.Option(help="Learning rate of the last batch.")] = 1.0,
    config: CONFIG = None,
    json_: JSON = False,
    *,
    values: dict[str, Any],
) -> None:
    """Suggest a learning rate: the loss over one sweep of rates, as a picture."""
    loaded = load_ready_recipe(recipe, config, values)
    require_train()
    from ..reports.experiments import save_chart, sweep_chart
    from ..training.lr_find import lr_find

    folder = output or Path("runs") / f"lr-find-{recipe}"
    rates, losses, found = lr_find(loaded, folder, Console(quiet=json_, highlight=False), steps, min_lr, max_lr)
    picture, title = folder / "lr_find.png", f"{recipe}, {loaded.variant}, batches of {loaded.batch_size}"
    save_chart(picture, sweep_chart, rates, losses, found, title)
    if json_:
        print(json.dumps({"lr": found["valley"], **found, "picture": str(picture)}))
    else:
        for name, rate in found.items():
            console.print(f"{name}: [bold]--lr {rate:.2g}[/]")
        console.print(f"the recipe has {loaded.lr:g}")
        console.print(f"Picture: {picture}", **PLAIN)


@app.command(cls=RecipeCommand)
@recipe_options
def search(
    recipe: RECIPE,
    trials: Annotated[int, typer.Option(min=1, help="Trainings, with those that --output holds already.")] = 20,
    output: Annotated[Path | None, typer.Option(help="Folder of the search; none: runs/search-RECIPE.")] = None,
    config: CONFIG = None,
    json_: JSON = False,
    *,
    values: dict[str, Any],
) -> None:
    """Search lr, weight_decay, label_smoothing and batch_size by validation accuracy.

    Of these four, those that are given are not searched. The same command continues where it was interrupted.
    best.yaml is for `train RECIPE --config`.
    """
    load_ready_recipe(recipe, config, values)
    require_train()
    require("optuna", "train")
    from ..reports.experiments import save_chart, search_chart
    from ..training.search import search

    folder = output or Path("runs") / f"search-{recipe}"
    found = search(recipe, config, values, folder, trials, Console(quiet=json_, highlight=False))
    title = f"{recipe}: {len(found.rows)} trials"
    save_chart(folder / "search.png", search_chart, found.rows, found.keys, title)
    best = folder / "best.yaml"
    if json_:
        print(json.dumps({"best": found.best, "trials": len(found.rows), "config": str(best)}))
    else:
        console.print(_table(found.rows, found.keys, title))
        console.print(f"Best values: {best}, for: alexnet-cuda train {recipe} --config {best}", **PLAIN)
        console.print(f"Picture: {folder / 'search.png'}", **PLAIN)
    if not found.complete:
        console.print("stopped; the same command continues it")
        raise typer.Exit(130)


def _explained(recipe: Recipe) -> Iterator[str]:
    """A recipe as lines of YAML, with what each value means as a comment."""
    for key, field in FIELDS.items():
        if heading := field.metadata.get("section"):
            yield f"[bold]# {heading}[/]"
        own = getattr(recipe, key)
        text = f"{key}: {own if isinstance(own, str) else json.dumps(own)}"  # JSON is YAML
        yield f"{escape(text):30} [dim]# {escape(field.metadata['help'])}[/]"


def _table(rows: list[dict[str, Any]], keys: list[str], title: str, shown: int = 15) -> Table:
    cells = []
    for row in rows[:shown]:
        ended = "" if row["state"] == "complete" else " [dim]early[/]"
        values = [three_digits(row[key]) for key in keys]
        cells.append([f"{row['trial']}", *values, f"{row['epochs']}{ended}", percent(row["val/accuracy"])])
    caption = f"the best {shown} of {len(rows)}; search.csv has all" if len(rows) > shown else None
    made = table(
        right("trial", *keys, "epochs", "val/accuracy"), cells, title=title, caption=caption, **NARROW | {"padding": 0}
    )
    made.rows[0].style = "bold"
    return made
