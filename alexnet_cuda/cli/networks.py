"""`summary`, `info` and `draw`: the networks, and what runs them."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from ..notes import PLAIN
from ..words import percent
from ._app import JSON, NARROW, app, console, require, require_variant, right, table


@app.command()
def summary(
    variant: Annotated[str | None, typer.Argument(help="Variant of AlexNet; none: list them.")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Classes; none: the variant's own.")] = None,
    channels: Annotated[int | None, typer.Option(min=1, help="Channels of the input; none: the variant's own.")] = None,
) -> None:
    """Show the layers of a variant, with output sizes, parameters and multiplications."""
    from ..variants import VARIANTS, get_variant

    if variant is None:
        rows = [
            (name, f"{v.channels}x{v.input_size}x{v.input_size}", f"{v.parameters:,}", escape(v.description))
            for name, v in VARIANTS.items()
        ]
        console.print(table(["variant", "input", *right("parameters"), "what it is"], rows))
        return
    require_variant(variant)
    import torch

    from ..model import AlexNet
    from ..summary import model_summary

    with torch.device("meta"):
        layers = model_summary(AlexNet(variant, classes, channels))
    parameters, macs = (sum(getattr(layer, key) for layer in layers) for key in ("parameters", "macs"))
    columns: list[Any] = ["layer", "type", "output", *right("parameters", "share", "MACs", "share")]
    shown = table(columns, [], title=f"{variant}: {get_variant(variant).description}", **NARROW | {"padding": 0})
    for layer in layers:
        size = "x".join(map(str, layer.output_size))
        shares = _share(layer.parameters, parameters), _share(layer.macs, macs)
        count = f"{layer.parameters:,}" if layer.parameters else ""
        shown.add_row(layer.name, layer.type, size, count, shares[0], _millions(layer.macs), shares[1])
    shown.add_section()
    shown.add_row("all", "", "", f"{parameters:,}", "", _millions(macs), "")
    console.print(shown)


@app.command()
def info(json_: JSON = False) -> None:
    """Show versions, and which kernels are in use or why not."""
    from .._library import build_info, describe_devices

    facts = build_info() | describe_devices()
    if json_:
        print(json.dumps(facts, indent=2))
    else:
        rows = [(key, escape(value)) for key, value in facts.items()]
        console.print(table(["what", "value"], rows, title="alexnet_cuda"))


@app.command()
def draw(
    variant: Annotated[str, typer.Argument(help="Variant of AlexNet; `alexnet-cuda summary` lists them.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An .svg, .pdf or .png; default: VARIANT.svg.")
    ] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Classes; none: the variant's own.")] = None,
    theme: Annotated[Literal["light", "dark"], typer.Option(help="Colours of background and text.")] = "light",
    table: Annotated[bool, typer.Option(help="With the numbers of each layer in a table below.")] = True,
) -> None:
    """Draw a variant's architecture: volumes, layers, parameters and multiplications."""
    require_variant(variant)
    output = output or Path(f"{variant}.svg")
    if output.suffix.lower() not in (".svg", ".pdf", ".png"):
        raise typer.BadParameter(f"--output must end in .svg, .pdf or .png, got {output.name!r}")
    require("matplotlib", "train")
    from ..reports.drawing import draw as write

    write(variant, output, classes, theme, table)
    console.print(f"Drawing: {output}", **PLAIN)


def _share(part: int, whole: int) -> str:
    return percent(part / whole, 1) if part else ""


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count else ""
