"""`lr-find` and `search`: values for a recipe."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ._app import JSON, Failure, app, console, require_train
from .train import _more

RECIPE = Annotated[str, typer.Argument(help="`alexnet-cuda recipes` lists them.")]
CONFIG = Annotated[Path | None, typer.Option(help="YAML file with values of the recipe.")]
SET = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any value of the recipe.")]
EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=EXTRA)
def lr_find(
    ctx: typer.Context,
    recipe: RECIPE,
    output: Annotated[Path | None, typer.Option(help="Folder of the picture; none: runs/lr-find-RECIPE.")] = None,
    steps: Annotated[int, typer.Option(help="Batches to train.")] = 100,
    min_lr: Annotated[float, typer.Option(help="Rate of the first batch.")] = 1e-6,
    max_lr: Annotated[float, typer.Option(help="Rate of the last batch.")] = 1.0,
    config: CONFIG = None,
    set_: SET = None,
    json_: JSON = False,
) -> None:
    """Suggest a learning rate: the loss over one sweep of rates, as a picture.

    Every value of the recipe can be given as --key value.
    """
    _require()
    from ..training import load_recipe
    from ..training.tuning import lr_find as run

    folder = output or Path("runs") / f"lr-find-{recipe}"
    values = load_recipe(recipe, config, _more(ctx.args, set_ or []))
    console.quiet = json_
    try:
        sweep = run(values, folder, console, steps, min_lr, max_lr)
    finally:
        console.quiet = False
    if json_:
        print(json.dumps({"lr": sweep.suggestion, "picture": str(folder / "lr_find.png")}))
        return
    console.print(f"suggestion: [bold]--lr {sweep.suggestion:.2g}[/] (the recipe has {values.lr:g})", highlight=False)
    console.print(f"Picture: {folder / 'lr_find.png'}", soft_wrap=True, highlight=False)


@app.command(context_settings=EXTRA)
def search(
    ctx: typer.Context,
    recipe: RECIPE,
    trials: Annotated[int, typer.Option(min=1, help="Trainings, with those that --output holds already.")] = 20,
    output: Annotated[Path | None, typer.Option(help="Folder of the search; none: runs/search-RECIPE.")] = None,
    config: CONFIG = None,
    set_: SET = None,
    json_: JSON = False,
) -> None:
    """Search lr, weight_decay, label_smoothing and batch_size by validation accuracy.

    Every value of the recipe can be given as --key value; of these four, those given are not searched. The same
    command goes on where it was interrupted. best.yaml is for `train RECIPE --config`.
    """
    _require()
    from ..training.tuning import search as run
    from ..training.tuning import search_table

    folder = output or Path("runs") / f"search-{recipe}"
    console.quiet = json_
    try:
        found = run(recipe, config, _more(ctx.args, set_ or []), folder, trials, console)
    finally:
        console.quiet = False
    if json_:
        print(json.dumps({"best": found.best, "trials": len(found.trials), "config": str(folder / "best.yaml")}))
    else:
        console.print(search_table(found, f"{recipe}: {len(found.trials)} trials"))
        best = folder / "best.yaml"
        console.print(f"Best values: {best}, for: alexnet-cuda train {recipe} --config {best}", soft_wrap=True)
        console.print(f"Picture: {folder / 'search.png'}", soft_wrap=True, highlight=False)
    if not found.whole:
        console.print("stopped; the same command goes on")
        raise typer.Exit(130)


def _require() -> None:
    require_train()
    try:
        import optuna  # noqa: F401
    except ModuleNotFoundError as error:
        raise Failure(
            "optuna is not installed; `pip install 'alexnet_cuda[train]'` installs all that this needs"
        ) from error
