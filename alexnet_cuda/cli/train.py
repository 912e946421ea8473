"""`train` and `recipes`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ._app import app, console, require_train


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    ctx: typer.Context,
    recipe: Annotated[str | None, typer.Argument(help="`alexnet-cuda recipes` lists them.")] = None,
    data_path: Annotated[str | None, typer.Option(help="Folder of the data.")] = None,
    output: Annotated[str | None, typer.Option(help="Run folder; none: runs/RECIPE-TIME.")] = None,
    epochs: Annotated[str | None, typer.Option(metavar="INTEGER")] = None,
    max_steps: Annotated[str | None, typer.Option(metavar="INTEGER", help="Stop after so many steps.")] = None,
    batch_size: Annotated[str | None, typer.Option(metavar="INTEGER", help="Images per step and process.")] = None,
    lr: Annotated[str | None, typer.Option(metavar="FLOAT", help="Learning rate at its peak.")] = None,
    opt: Annotated[str | None, typer.Option(help="sgd, adam or adamw.")] = None,
    seed: Annotated[str | None, typer.Option(metavar="INTEGER")] = None,
    variant: Annotated[str | None, typer.Option(help="Of AlexNet; `alexnet-cuda summary` lists them.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder or checkpoint to go on from.")] = None,
    devices: Annotated[str | None, typer.Option(help="How many, or which: auto, 2, 0,1.")] = None,
    nodes: Annotated[str | None, typer.Option(metavar="INTEGER", help="Machines.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, 32-true, 16-mixed, bf16-mixed, ...")] = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume with other values of the recipe than the run had.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that --output holds.")] = False,
    config: Annotated[Path | None, typer.Option(help="YAML file with values of the recipe.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any value of the recipe.")
    ] = None,
) -> None:
    """Train on a recipe. Every value of it can also be given as --key value; `alexnet-cuda recipes` shows them."""
    given = {"data_path": data_path, "output": output, "epochs": epochs, "max_steps": max_steps,
             "batch_size": batch_size, "lr": lr, "opt": opt, "seed": seed, "variant": variant, "devices": devices,
             "nodes": nodes, "precision": precision}  # fmt: skip
    more = list(ctx.args)
    if recipe and recipe.startswith("--"):  # without a recipe, as with --resume, a value's key is taken for it
        more.insert(0, recipe)
        recipe = None
    values = {key: value for key, value in given.items() if value is not None} | _more(more, set_ or [])
    require_train()
    from ..training.main import main as run

    raise typer.Exit(run(recipe, config, values, resume, overwrite, console, allow_changes))


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Recipe whose values to show.")] = None) -> None:
    """List the recipes, or every value of one."""
    from ..training import list_recipes, load_recipe

    if name is not None:
        console.print(load_recipe(name).to_yaml().strip(), highlight=False)
        return
    table = Table("recipe", "what it is")
    for recipe, line in list_recipes().items():
        table.add_row(recipe, line)
    console.print(table)


def _more(arguments: list[str], pairs: list[str]) -> dict[str, str]:
    """Values given as `--key value`, `--key=value`, `--flag`, `--no-flag` and `--set key=value`."""
    from ..training.recipe import TYPES, RecipeError

    values: dict[str, str] = {}
    tokens = list(arguments)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--"):
            raise RecipeError(f"unexpected argument {token!r}; the recipe comes first, then --key value")
        key, equals, value = token[2:].partition("=")
        key = key.replace("-", "_")
        if key.startswith("no_") and TYPES.get(key[3:]) is bool and not equals:
            key, value = key[3:], "false"
        elif not equals:
            value = tokens.pop(0) if tokens and not tokens[0].startswith("--") else "true"
        values[key] = value
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise RecipeError(f"--set takes key=value, got {pair!r}")
        values[key.strip().replace("-", "_")] = value
    return values
