"""`export`: a network as a file for other programs."""

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ._app import JSON, RUN, Failure, app, console, newest_run, plain, require_train


class Format(str, Enum):
    onnx = "onnx"
    safetensors = "safetensors"
    torch = "torch"


class Dtype(str, Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


TOLERANCE = {Dtype.float32: 1e-4, Dtype.float16: 0.02, Dtype.bfloat16: 0.2}  # of the scores
SUFFIXES = {Format.onnx: ".onnx", Format.safetensors: ".safetensors", Format.torch: ".pt2"}


@app.command()
def export(
    run: RUN = None,
    variant: Annotated[str | None, typer.Option(help="Instead of a run: a variant with random weights.")] = None,
    format: Annotated[Format, typer.Option(help="Of the file.")] = Format.onnx,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="none: model.* in the run folder, or VARIANT.*.")
    ] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Of --variant; none: its own.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights in a safetensors file.")] = Dtype.float32,
    json_: JSON = False,
) -> None:
    """Write a network as ONNX, safetensors or a torch.export program, and compare the file with it."""
    if run is not None and variant is not None:
        raise typer.BadParameter(f"either --run or --variant, got {str(run)!r} and {variant!r}")
    if classes is not None and variant is None:
        raise typer.BadParameter(f"--classes {classes} needs --variant; a run has the classes it was trained on")
    if dtype != Dtype.float32 and format != Format.safetensors:
        raise typer.BadParameter(f"--dtype {dtype.value} needs --format safetensors, got {format.value}")
    if output is not None and output.suffix != SUFFIXES[format]:
        raise typer.BadParameter(f"--output must end in {SUFFIXES[format]}, got {output.name!r}")
    require_train()
    if format == Format.onnx:
        _require_onnx()
    from .. import export as files
    from ..training import evaluation

    if variant is None:
        source = newest_run(run)
        model, recipe, names = evaluation.load_weights(source)
        folder = source if source.is_dir() else source.parent
        output = output or folder / f"model{SUFFIXES[format]}"
        if output.exists() and output.samefile(folder / "weights.safetensors" if source.is_dir() else source):
            raise Failure(f"{output} holds the run's own weights; name another file with --output")
    else:
        model, recipe, names = _untrained(variant, classes)
        output = output or Path(f"{variant.replace('/', '-')}{SUFFIXES[format]}")
    with console.status(f"writing {output.name}"):
        if format == Format.safetensors:
            files.save_safetensors(output, model, recipe, names, dtype.value)
        else:
            save = files.save_onnx if format == Format.onnx else files.save_torch
            save(output, model, recipe, names)
        found = files.difference(output, model, recipe)
    facts = {
        "file": str(output),
        "bytes": output.stat().st_size,
        "variant": recipe.variant,
        "weights": "random" if variant else f"trained on {recipe.name}",
        "input": [None, recipe.channels, recipe.input_size, recipe.input_size],
        "output": [None, len(names)],
        "difference": found and found[0],
        "largest_score": found and found[1],
    }
    if format == Format.onnx:
        facts |= {"opset": files.OPSET, "nodes": files.onnx_nodes(output)}
    if json_:
        print(json.dumps(facts, indent=2))
    else:
        _show(facts)
    if found and not found[0] <= TOLERANCE[dtype] * max(1.0, found[1]):
        raise Failure(
            f"the scores of {output} differ by {found[0]:.2g} from those of the network, up to {found[1]:.2g}"
        )


def _show(facts: dict) -> None:
    shapes = [" x ".join(str(n or "batch") for n in facts[key]) for key in ("input", "output")]
    table = Table.grid(padding=(0, 2))
    table.add_row("file", f"[bold]{plain(facts['file'])}[/], {facts['bytes'] / 2**20:.1f} MiB")
    table.add_row("network", plain(f"{facts['variant']}, {facts['weights']}"))
    table.add_row("scores", f"{shapes[0]} to {shapes[1]}")
    if "opset" in facts:
        nodes = ", ".join(f"{count} {name}" for name, count in facts["nodes"].items())
        table.add_row("ONNX", f"opset {facts['opset']}: {nodes}")
    checked = "not compared: onnxruntime is not installed"
    if facts["difference"] is not None:
        checked = (
            f"at most {facts['difference']:.1e} from the network's own scores, which reach {facts['largest_score']:.2g}"
        )
    table.add_row("check", checked)
    console.print(table, highlight=False)


def _untrained(variant: str, classes: int | None):
    from ..training.classifier import build
    from ..training.recipe import Recipe
    from ..variants import VARIANTS

    recipe = Recipe().replace({"name": "nothing", "variant": variant})
    count = classes or (VARIANTS[variant].num_classes if variant in VARIANTS else 1000)
    return build(recipe, count), recipe, [str(i) for i in range(count)]


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise Failure(f"{error.name} is not installed; `pip install 'alexnet_cuda[export]'` installs it") from error
