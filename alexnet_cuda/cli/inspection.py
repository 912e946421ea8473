"""`inspect`: what a data set holds, before training."""

import functools
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..notes import PLAIN, show_notes
from ..sources import load_ready_recipe
from ._app import JSON, app, class_table, console, require_train, right, table
from ._recipe_options import CONFIG, RecipeCommand, recipe_options


@app.command(cls=RecipeCommand)
@functools.partial(recipe_options, sections=("Data", "Input"))
def inspect(
    recipe: Annotated[str, typer.Argument(help="Name of the recipe that would be trained.")] = "folder",
    output: Annotated[Path | None, typer.Option(help="Folder of the page; none: runs/inspect-RECIPE.")] = None,
    config: CONFIG = None,
    json_: JSON = False,
    *,
    values: dict[str, Any],
) -> None:
    """Show a data set without training: classes, counts, sizes, modes, duplicates, damaged files, and samples."""
    loaded = load_ready_recipe(recipe, config, {"verify": True, **values})
    require_train()
    from ..data.folder import require_outside
    from ..data.inspection import inspect as look
    from ..files import write_text
    from ..reports.inspection import page

    folder = output or Path("runs") / f"inspect-{recipe}"
    require_outside(folder, loaded)
    found = look(loaded)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "inspect.html", page(loaded, found))
    if json_:
        facts = {"classes": found.images.classes, "images": found.images.counts(), "notes": found.images.notes}
        facts |= {"modes": found.modes, "damaged": found.damaged, "page": str(folder / "inspect.html")}
        sizes = {key: list(size) for key, size in found.sizes.items()}
        print(json.dumps(facts | {"sizes": sizes}, indent=2))
        return
    console.print(class_table(f"{loaded.data}: {len(found.images.classes)} classes", found.images))
    rows = [(f"{key} size", f"{width} x {height}") for key, (width, height) in found.sizes.items()]
    rows += [(f"mode {mode}", f"{number:,}") for mode, number in found.modes.items()]
    console.print(table(["pictures", *right("")], rows))
    show_notes(found.images.notes, console)
    for message in found.damaged[:20]:
        console.print(f"[red]{escape(message)}[/]", soft_wrap=True)
    if len(found.damaged) > 20:
        console.print(f"and {len(found.damaged) - 20:,} more damaged files, in the page", style="red")
    console.print(f"Page: {folder / 'inspect.html'}", **PLAIN)
