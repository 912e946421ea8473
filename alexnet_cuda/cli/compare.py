"""`compare`: several networks on one recipe."""

from pathlib import Path
from typing import Annotated

import typer

from ._app import app, console, require_train
from .train import _more


@app.command(context_settings={"ignore_unknown_options": True})
def compare(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Variants of AlexNet, and torchvision/NAME, as resnet18.")
    ],
    recipe: Annotated[str, typer.Option(help="Recipe to train all of them on; `alexnet-cuda recipes` lists them.")],
    output: Annotated[Path | None, typer.Option(help="Folder of the runs; none: runs/compare-RECIPE.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with values of the recipe.")] = None,
) -> None:
    """Train several networks with equal settings, and show what each reaches and costs.

    Every value of the recipe can be given as --key value. The same command goes on where it was interrupted.
    """
    require_train()
    from ..training.comparison import compare as run

    names, more = _split(models)
    values = _more(more, [])
    raise typer.Exit(run(names, recipe, config, values, output or Path("runs") / f"compare-{recipe}", console))


def _split(tokens: list[str]) -> tuple[list[str], list[str]]:
    """The models, and the options with their values."""
    from ..training.recipe import TYPES

    names: list[str] = []
    more: list[str] = []
    open_ = False
    for token in tokens:
        option = token.startswith("--")
        (more if option or open_ else names).append(token)
        key = token[2:].replace("-", "_").removeprefix("no_")
        open_ = option and "=" not in token and TYPES.get(key) is not bool
    return names, more
