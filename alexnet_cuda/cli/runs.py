"""`evaluate`, `predict` and `report`: a finished run on the test split, and on other pictures."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .. import pretrained
from ..errors import AlexNetError, DataError
from ..files import read_metrics
from ..notes import PLAIN, show_notes
from ..words import percent
from ._app import (
    DATA_PATH,
    EVALUATE,
    JSON,
    PREDICT,
    RUN,
    app,
    console,
    load_run,
    newest_run,
    require_train,
    right,
    show_figure,
    table,
)


@app.command()
def evaluate(run: RUN = None, data_path: DATA_PATH = None, json_: JSON = False) -> None:
    """Test a run's weights again: on the test split, or on all new pictures that --data-path names."""
    require_train(EVALUATE)
    from ..training import evaluation

    model, recipe, images = load_run(newest_run(run, "digits"), data_path, new=True)
    show_notes(images.notes)
    figures = evaluation.figures(evaluation.predict(model, images, recipe))
    if json_:
        print(json.dumps(figures, indent=2))
    else:
        title = f"{recipe.variant} on {len(images.test.labels)} test images of {recipe.name}"
        rows = [(name, show_figure(name, value)) for name, value in figures.items()]
        console.print(table(["figure", *right("value")], rows, title=title))


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Pictures that Pillow reads, as PNG.", metavar="IMAGE...")],
    run: RUN = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to show for each picture.")] = 5,
    json_: JSON = False,
) -> None:
    """Classify pictures. One that cannot be read does not stop the others; the exit code is then 1."""
    require_train(PREDICT)
    from ..classify import classify
    from ..data.imageset import progress
    from ..data.verify import examine, notes_on
    from ..weights import load_weights

    model, recipe, classes = load_weights(newest_run(run))
    tops: dict[Path, list[tuple[str, float]]] = {}
    facts, errors = [], {}
    for path in progress(images, "reading", len(images), len(images) > 100):
        try:
            shares, labels = classify(model, recipe, path).sort(descending=True)
            tops[path] = [(classes[k], share) for k, share in zip(labels[:top].tolist(), shares[:top].tolist())]
            facts.append(examine(path))
        except DataError as error:
            errors[path] = str(error)
    show_notes(notes_on(facts))
    if json_:
        found = {path: [{"class": c, "probability": round(share, 6)} for c, share in row] for path, row in tops.items()}
        answers = [{"image": str(p)} | ({"top": found[p]} if p in found else {"error": errors[p]}) for p in images]
        print(json.dumps(answers, indent=2))
    elif tops:
        columns = ["image", *(f"{i + 1}." for i in range(min(top, len(classes))))]
        shown = table(columns, [], title=f"{recipe.variant} trained on {recipe.name}")
        for path, row in tops.items():
            cells = [f"{escape(name)} [dim]{percent(share, 1)}[/]" for name, share in row]
            shown.add_row(escape(path.name), f"[bold]{cells[0]}[/]", *cells[1:])
        console.print(shown)
    if errors:
        raise DataError("\n  ".join(errors.values()))


@app.command()
def report(run: RUN = None, data_path: DATA_PATH = None, json_: JSON = False) -> None:
    """Draw a run's pictures and report.html again, from its weights and the test split."""
    require_train()
    from ..reports.report import write_report
    from ..training import evaluation

    folder = newest_run(run, otherwise=None)
    if folder.parent == pretrained.FOLDER:
        raise AlexNetError(f"report draws into a run folder; {run} are weights of the package: `train` makes a run")
    model, recipe, images = load_run(folder, data_path)
    folder = folder if folder.is_dir() else folder.parent
    predictions = evaluation.predict(model, images, recipe)
    metrics = read_metrics(folder) | evaluation.run_facts(model, recipe, images, predictions)
    paths = write_report(folder, recipe, images, model, predictions.probabilities, metrics)
    if json_:
        print(json.dumps({"report": str(paths[0]), "files": [str(path) for path in paths[1:]]}, indent=2))
    else:
        console.print(f"Report: {paths[0]}", **PLAIN)
