"""`import-caffe`: a classifier in Caffe's files as a run folder."""

import json
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..errors import AlexNetError, DataError
from ..files import write_text
from ._app import JSON, app, console, require, require_train, table


@app.command()
def import_caffe(
    prototxt: Annotated[Path, typer.Argument(help="The network: deploy.prototxt or train_val.prototxt.")],
    caffemodel: Annotated[Path, typer.Argument(help="Its weights.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The run folder to write.")],
    classes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Names of the classes, one per line; none: 0, 1, 2, ...")
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(help="Mean to subtract: a .binaryproto, or BGR such as 104,117,123; none: the Data layer's."),
    ] = None,
    json_: JSON = False,
) -> None:
    """Make a run folder of a Caffe classifier, for predict, evaluate, demo and export."""
    require_train()
    require("google.protobuf", "caffe")
    from ..formats.caffe.pictures import imported
    from ..weights import save_weights

    path = output / "weights.safetensors"
    if path.exists():
        raise AlexNetError(f"{path} exists; name another folder with --output")
    try:
        with warnings.catch_warnings(record=True) as ignored:
            warnings.simplefilter("always")
            model, recipe, notes = imported(prototxt, caffemodel, mean)
        lines = classes.read_text("utf-8-sig").splitlines() if classes else []
    except UnicodeDecodeError as error:
        raise DataError(f"{classes} is not UTF-8 text: {error}") from error
    except ValueError as error:
        raise DataError(str(error)) from error
    notes += [str(warning.message) for warning in ignored]
    scores = model.net.output_shapes[0] or (0, 0)
    names = [line.strip() for line in lines if line.strip()] if classes else [str(i) for i in range(scores[1])]
    if len(names) != scores[1]:
        raise DataError(f"{classes} names {len(names)} classes, the network has {scores[1]}")
    output.mkdir(parents=True, exist_ok=True)
    save_weights(path, model, recipe, names)
    write_text(output / "config.yaml", recipe.to_yaml())
    facts = {
        "run": str(output),
        "network": recipe.variant,
        "classes": len(names),
        "parameters": sum(p.numel() for p in model.parameters()),
        "input": [recipe.channels, recipe.input_size, recipe.input_size],
        "short_side": recipe.test_short_side,
        "mean": "an image" if model.mean is not None else list(recipe.mean),
        "std": list(recipe.std),
        "notes": notes,
    }
    if json_:
        print(json.dumps(facts, indent=2))
        return
    rows = [(name, escape(f"{value:,}" if isinstance(value, int) else str(value))) for name, value in facts.items()]
    console.print(table(["what", "value"], [row for row in rows if row[0] != "notes"], title="imported"))
    for note in notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)
