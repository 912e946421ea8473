"""`export` and `demo`: a network as a file for other programs, and in a web page."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from .. import pretrained
from ..errors import AlexNetError
from ..files import require_writable
from ._app import JSON, RUN, app, console, newest_run, require, require_train

TOLERANCE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.2}  # of the scores
SUFFIXES = {"onnx": ".onnx", "safetensors": ".safetensors", "torch": ".pt2"}


@app.command()
def export(
    run: RUN = None,
    variant: Annotated[str | None, typer.Option(help="Instead of a run: a variant with random weights.")] = None,
    format: Annotated[Literal["onnx", "safetensors", "torch"], typer.Option(help="Format of the file.")] = "onnx",
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="none: model.* of the run, or VARIANT.*.")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Of --variant; none: its own.")] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="Of the weights in a safetensors file.")
    ] = "float32",
    json_: JSON = False,
) -> None:
    """Write a network as ONNX, safetensors or a torch.export program, and compare the file with it."""
    if run is not None and variant is not None:
        raise typer.BadParameter(f"either --run or --variant, got {str(run)!r} and {variant!r}")
    if classes is not None and variant is None:
        raise typer.BadParameter(f"--classes {classes} needs --variant; a run has the classes it was trained on")
    if dtype != "float32" and format != "safetensors":
        raise typer.BadParameter(f"--dtype {dtype} needs --format safetensors, got {format}")
    if output is not None and output.suffix != SUFFIXES[format]:
        raise typer.BadParameter(f"--output must end in {SUFFIXES[format]}, got {output.name!r}")
    require_train()
    if format == "onnx":
        for module in ("onnx", "onnxscript"):
            require(module, "export")
    from ..formats import export as files
    from ..networks import build
    from ..recipe import Recipe
    from ..variants import get_variant, is_variant
    from ..weights import load_weights

    if variant is None:
        source = newest_run(run, otherwise=None)
        model, recipe, names = load_weights(source)
        packaged = source.parent == pretrained.FOLDER
        folder = source if source.is_dir() else source.parent
        output = output or (Path(source.stem + SUFFIXES[format]) if packaged else folder / f"model{SUFFIXES[format]}")
        if output.exists() and output.samefile(folder / "weights.safetensors" if source.is_dir() else source):
            raise AlexNetError(f"{output} holds the run's own weights; name another file with --output")
    else:
        recipe = Recipe().replace({"name": "nothing", "variant": variant})
        own = get_variant(variant).num_classes if is_variant(variant) else 1000
        names = [str(i) for i in range(classes or own)]
        model = build(recipe, len(names))
        output = output or Path(f"{variant.replace('/', '-')}{SUFFIXES[format]}")
    require_writable(output.parent)
    output.parent.mkdir(parents=True, exist_ok=True)
    with console.status(f"writing {output.name}"):
        save = {"onnx": files.save_onnx, "torch": files.save_torch, "safetensors": files.save_safetensors}[format]
        save(output, model, recipe, names, **({"dtype": dtype} if format == "safetensors" else {}))
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
    if format == "onnx":
        facts |= {"opset": files.OPSET, "nodes": files.onnx_nodes(output)}
    if json_:
        print(json.dumps(facts, indent=2))
    else:
        _show(facts)
    if found and not found[0] <= TOLERANCE[dtype] * max(1.0, found[1]):
        difference = f"differ by {found[0]:.2g} from those of the network, up to {found[1]:.2g}"
        raise AlexNetError(f"the scores of {output} {difference}")


@app.command()
def demo(
    run: RUN = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of 127.0.0.1; 0: any free one.")] = 7860,
) -> None:
    """Serve a web page, to this machine only, that classifies pictures which are dropped or drawn on it."""
    first = newest_run(run, "digits")
    found = [] if run else [path.parent for path in Path("runs").glob("*/weights.safetensors")]
    found = found or ([] if run else [pretrained.find(name) for name in pretrained.NAMES])
    runs = [first, *sorted(folder for folder in found if folder != first)]
    with console.status("starting") as status:

        def announce(url: str) -> None:
            status.stop()
            console.print(f"Open {url} in a browser; Ctrl-C ends it.", soft_wrap=True)

        require_train()
        require("gradio", "demo")
        from ..demo import page

        try:
            page.serve(runs, port, announce)
        except OSError as error:
            if error.filename:  # a file, not the port
                raise
            problem = f"port {port} of {page.ADDRESS} cannot be used ({error.strerror or error})"
            raise AlexNetError(f"{problem}; --port 0 takes a free one") from error


def _show(facts: dict) -> None:
    shapes = [" x ".join(str(n or "batch") for n in facts[key]) for key in ("input", "output")]
    table = Table.grid(padding=(0, 2))
    table.add_row("file", f"[bold]{escape(facts['file'])}[/], {facts['bytes'] / 2**20:.1f} MiB")
    table.add_row("network", escape(f"{facts['variant']}, {facts['weights']}"))
    table.add_row("scores", f"{shapes[0]} to {shapes[1]}")
    if "opset" in facts:
        nodes = ", ".join(f"{count} {name}" for name, count in facts["nodes"].items())
        table.add_row("ONNX", f"opset {facts['opset']}: {nodes}")
    checked = "not compared: onnxruntime is not installed"
    if (largest := facts["difference"]) is not None:
        checked = f"at most {largest:.1e} from the network's own scores, which reach {facts['largest_score']:.2g}"
    table.add_row("check", checked)
    console.print(table)
