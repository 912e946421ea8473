"""`draw`: a network as a picture."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ._app import app, console, require, require_variant


@app.command()
def draw(
    variant: Annotated[str, typer.Argument(help="Variant of AlexNet; `alexnet-cuda summary` lists them.")],
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="An .svg or .png; none: VARIANT.svg.")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Classes; none: the variant's own.")] = None,
    theme: Annotated[Literal["light", "dark"], typer.Option(help="Colours of background and text.")] = "light",
) -> None:
    """Draw a variant's architecture: volumes, layers, parameters and multiplications."""
    require_variant(variant)
    output = output or Path(f"{variant}.svg")
    if output.suffix.lower() not in (".svg", ".png"):
        raise typer.BadParameter(f"--output must end in .svg or .png, got {output.name!r}")
    require("matplotlib", "train")
    from ..reports.drawing import draw as write

    write(variant, output, classes, theme)
    console.print(f"Drawing: {output}", soft_wrap=True)
