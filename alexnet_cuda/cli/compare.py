"""`compare`: several networks on one recipe."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column

from ..errors import first_line
from ..notes import show_notes
from ._app import NARROW, app, console, read_metrics, require_train, right, table
from ._recipe_options import CONFIG, RecipeCommand, recipe_options


@app.command(cls=RecipeCommand)
@recipe_options
def compare(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Variants of AlexNet, and torchvision/NAME, as resnet18.")
    ],
    recipe: Annotated[str, typer.Option(help="Recipe to train all of them on; `alexnet-cuda recipes` lists them.")],
    output: Annotated[Path | None, typer.Option(help="Folder of the runs; none: runs/compare-RECIPE.")] = None,
    config: CONFIG = None,
    *,
    values: dict[str, Any],
) -> None:
    """Train several networks with equal settings, and show what each reaches and costs.

    The same command continues where it was interrupted. A model that fails has the reason in its row, and the others
    are trained nevertheless; the exit code is then 1.
    """
    require_train()
    from ..data import load_images
    from ..files import to_csv, write_text
    from ..reports.experiments import FIGURES, comparison_chart, save_chart
    from ..training.comparison import comparison_recipes, comparison_rows
    from ..training.evaluation import device_name
    from .run_recipe import run_recipe

    folder = output or Path("runs") / f"compare-{recipe}"
    recipes = comparison_recipes(list(dict.fromkeys(models)), recipe, config, values, folder)
    images = load_images(next(iter(recipes.values())))
    show_notes(images.notes)
    errors: dict[str, str] = {}
    for i, (model, own) in enumerate(recipes.items()):
        run = Path(str(own.output))
        if read_metrics(run) and (run / "weights.safetensors").exists():
            console.print(f"{model}: the run in {run} is taken over", soft_wrap=True)
            continue
        console.rule(f"{i + 1} of {len(recipes)}: {model}")
        try:
            begun = (run / "checkpoints" / "last.ckpt").exists()
            code = run_recipe(None, None, {}, run, False) if begun else run_recipe(recipe, None, vars(own), None, True)
        except Exception as error:  # of any kind: it concerns this model alone
            errors[model] = first_line(error)
            _print_error(model, errors[model])
            continue
        if code:
            console.print("the same command goes on with this comparison")
            raise typer.Exit(code)
    with console.status("measuring inference"):
        rows = comparison_rows(recipes, images, errors)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "compare.csv", to_csv(rows))
    facts = {"recipe": recipe, "device": device_name(), "models": rows}
    write_text(folder / "compare.json", json.dumps(facts, indent=2) + "\n")
    title = f"{recipe}: {len(rows)} networks, equal settings, {device_name()}"
    save_chart(folder / "compare.png", comparison_chart, rows, title)
    keys = [key for key in FIGURES if any(row[key] is not None for row in rows)]
    shown = table([Column("model", overflow="fold"), *right(*(FIGURES[key][0] for key in keys))], [], **NARROW)
    shown.title = f"{recipe}: {len(rows)} networks on {len(images.test.labels):,} held-out images"
    for row in rows:
        failed = row["model"] in errors
        cells = ["[red]failed[/]"][: len(keys)] if failed else [FIGURES[key][2](row[key]) for key in keys]
        shown.add_row(row["model"], *cells)
    console.print(shown)
    for model in (row["model"] for row in rows if row["model"] in errors):
        _print_error(model, errors[model])
    console.print(f"Comparison: {folder / 'compare.png'}, compare.csv, compare.json", soft_wrap=True)
    raise typer.Exit(1 if errors else 0)


def _print_error(model: str, error: str) -> None:
    console.print(f"[bold red]{model} failed:[/] {escape(error)}", soft_wrap=True)
