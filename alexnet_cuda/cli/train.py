"""`train` and `recipes`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ._app import app, console, require_train, table
from ._recipe_options import CONFIG, RecipeCommand, recipe_options


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
    require_train()
    from .run_recipe import run_recipe

    raise typer.Exit(run_recipe(recipe, config, values, resume, overwrite, allow_changes))


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Recipe whose values to show.")] = None) -> None:
    """List the recipes, or every value of one."""
    from ..recipe import list_recipes, load_recipe

    if name is not None:
        console.print(load_recipe(name).to_yaml().strip())
    else:
        console.print(table(["recipe", "what it is"], list_recipes().items()))
