"""`draw`: a network as a picture."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ._app import Failure, app, console


class Theme(str, Enum):
    light = "light"
    dark = "dark"


@app.command()
def draw(
    variant: Annotated[str, typer.Argument(help="Variant of AlexNet; `alexnet-cuda summary` lists them.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Picture to write, .svg or .png; none: VARIANT.svg.")
    ] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Classes; none: the variant's own.")] = None,
    theme: Annotated[Theme, typer.Option(help="Of the paper and the text.")] = Theme.light,
) -> None:
    """Draw a variant's architecture: volumes, layers, parameters and multiplications."""
    from ..variants import VARIANTS

    if variant not in VARIANTS:
        raise typer.BadParameter(f"unknown variant {variant!r}; choose from {', '.join(VARIANTS)}")
    output = output or Path(f"{variant}.svg")
    if output.suffix.lower() not in (".svg", ".png"):
        raise typer.BadParameter(f"--output must end in .svg or .png, got {output.name!r}")
    try:
        from ..drawing import draw as write
    except ModuleNotFoundError as error:
        raise Failure(f"{error.name} is not installed; `pip install 'alexnet_cuda[train]'` installs it") from error
    write(variant, output, classes, theme.value)
    console.print(f"Drawing: {output}", soft_wrap=True, highlight=False)
