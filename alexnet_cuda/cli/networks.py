"""`summary` and `info`: the networks, and what runs them."""

import json
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Column, Table

from ._app import JSON, app, console


@app.command()
def summary(
    variant: Annotated[str | None, typer.Argument(help="Variant of AlexNet; none: list them.")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Classes; none: the variant's own.")] = None,
    channels: Annotated[int | None, typer.Option(min=1, help="Channels of the input; none: the variant's own.")] = None,
) -> None:
    """Show the layers of a variant, with output sizes, parameters and multiplications."""
    from ..variants import VARIANTS

    if variant is None:
        table = Table("variant", "input", Column("parameters", justify="right"), "what it is")
        for name, v in VARIANTS.items():
            size = f"{v.channels}x{v.input_size}x{v.input_size}"
            table.add_row(name, size, f"{v.parameters:,}", escape(v.description))
        console.print(table)
        return
    if variant not in VARIANTS:
        raise typer.BadParameter(f"unknown variant {variant!r}; choose from {', '.join(VARIANTS)}")
    import torch

    from ..model import AlexNet
    from ..summary import model_summary

    with torch.device("meta"):
        layers = model_summary(AlexNet(variant, classes, channels))
    parameters, macs = (sum(getattr(layer, key) for layer in layers) for key in ("parameters", "macs"))
    # narrow enough for 80 columns
    counts = [Column(name, justify="right") for name in ("parameters", "share", "MACs", "share")]
    table = Table("layer", "type", "output", *counts, title=f"{variant}: {VARIANTS[variant].description}",
                  box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))  # fmt: skip
    for layer in layers:
        size = "x".join(map(str, layer.output_size))
        shares = _share(layer.parameters, parameters), _share(layer.macs, macs)
        count = f"{layer.parameters:,}" if layer.parameters else ""
        table.add_row(layer.name, layer.type, size, count, shares[0], _millions(layer.macs), shares[1])
    table.add_section()
    table.add_row("all", "", "", f"{parameters:,}", "", _millions(macs), "")
    console.print(table)


@app.command()
def info(json_: JSON = False) -> None:
    """Show versions, and which kernels are in use or why not."""
    from .._library import build_info, describe_devices

    facts = build_info() | describe_devices()
    if json_:
        print(json.dumps(facts, indent=2))
        return
    table = Table("what", "value", title="alexnet_cuda")
    for key, value in facts.items():
        table.add_row(key, escape(value))
    console.print(table)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if part else ""


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count else ""
