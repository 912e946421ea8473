"""`evaluate`, `predict` and `report`: a finished run on the test split, and on other pictures."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ._app import DATA_PATH, JSON, RUN, app, console, load_run, newest_run, require_train, right, table


@app.command()
def evaluate(run: RUN = None, data_path: DATA_PATH = None, json_: JSON = False) -> None:
    """Test a run's weights again on the test split."""
    require_train()
    from ..training import evaluation

    model, recipe, images = load_run(newest_run(run), data_path)
    figures = evaluation.figures(evaluation.predict(model, images, recipe))
    if json_:
        print(json.dumps(figures, indent=2))
    else:
        title = f"{recipe.variant} on {len(images.test.labels)} test images of {recipe.name}"
        rows = [(name, f"{value:.4f}") for name, value in figures.items()]
        console.print(table(["figure", *right("value")], rows, title=title))


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Pictures that Pillow reads, as PNG.", metavar="IMAGE...")],
    run: RUN = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to show for each picture.")] = 5,
    json_: JSON = False,
) -> None:
    """Classify pictures."""
    require_train()
    from ..training import evaluation
    from ..weights import load_weights

    model, recipe, classes = load_weights(newest_run(run))
    shares, order = evaluation.predict_files(model, recipe, images).sort(dim=1, descending=True)
    rows = [
        [(classes[label], share) for label, share in zip(labels[:top].tolist(), values[:top].tolist(), strict=True)]
        for labels, values in zip(order, shares, strict=True)
    ]
    if json_:
        tops = [[{"class": name, "probability": round(share, 6)} for name, share in row] for row in rows]
        print(json.dumps([{"image": str(path), "top": top} for path, top in zip(images, tops, strict=True)], indent=2))
        return
    columns = ["image", *(f"{i + 1}." for i in range(len(rows[0])))]
    shown = table(columns, [], title=f"{recipe.variant} trained on {recipe.name}")
    for path, row in zip(images, rows, strict=True):
        cells = [f"{escape(name)} [dim]{share:.1%}[/]" for name, share in row]
        shown.add_row(escape(path.name), f"[bold]{cells[0]}[/]", *cells[1:])
    console.print(shown)


@app.command()
def report(run: RUN = None, data_path: DATA_PATH = None, json_: JSON = False) -> None:
    """Draw a run's pictures and report.html again, from its weights and the test split."""
    require_train()
    from ..reports.report import write_report
    from ..training import evaluation

    folder = newest_run(run)
    model, recipe, images = load_run(folder, data_path)
    folder = folder if folder.is_dir() else folder.parent
    predictions = evaluation.predict(model, images, recipe)
    of_training = json.loads((folder / "metrics.json").read_text()) if (folder / "metrics.json").exists() else {}
    metrics = of_training | evaluation.run_facts(model, recipe, images, predictions)
    paths = write_report(folder, recipe, images, model, predictions.probabilities, metrics)
    if json_:
        print(json.dumps({"report": str(paths[0]), "files": [str(path) for path in paths[1:]]}, indent=2))
    else:
        console.print(f"Report: {paths[0]}", soft_wrap=True)
