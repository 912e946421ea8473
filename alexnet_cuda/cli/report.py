"""`report`: the pictures and the page of a finished run, again."""

import json

from ._app import DATA_PATH, JSON, RUN, app, console, load_run, newest_run, require_train


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
