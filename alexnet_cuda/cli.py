"""The command line, `alexnet-cuda train | evaluate | predict | ...`. Heavy imports wait for their command."""

import errno
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

console = Console()
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Failure(Exception):
    """Ends a command with a sentence and exit code 1."""


class Commands(TyperGroup):
    """Turns the package's exceptions into one sentence: exit code 2 for what was asked, 1 for what happened."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except Exception as error:
            code = _exit_code(error)
            if code is None:
                raise
            text = str(error)
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                text = f"no space left on the disk ({error.strerror}); what was saved before is intact for --resume"
            Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {_plain(text)}")
            raise typer.Exit(code) from error


def _exit_code(error: Exception) -> int | None:
    names = {kind.__name__ for kind in type(error).__mro__}
    if "RecipeError" in names:
        return 2
    return 1 if isinstance(error, Failure | OSError) or names & {"DataError", "Diverged"} else None


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode="rich",
                  pretty_exceptions_show_locals=False, help="AlexNet, from training to prediction.")  # fmt: skip

RUN = Annotated[Path | None, typer.Option(help="Run folder, or a weights.safetensors; none: the newest in runs/.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    ctx: typer.Context,
    recipe: Annotated[str | None, typer.Argument(help="digits, mnist, fashion-mnist or folder.")] = None,
    data_path: Annotated[str | None, typer.Option(help="Folder of the data.")] = None,
    output: Annotated[str | None, typer.Option(help="Run folder; none: runs/RECIPE-TIME.")] = None,
    epochs: Annotated[str | None, typer.Option(metavar="INTEGER")] = None,
    max_steps: Annotated[str | None, typer.Option(metavar="INTEGER", help="Stop after so many steps.")] = None,
    batch_size: Annotated[str | None, typer.Option(metavar="INTEGER", help="Images per step and process.")] = None,
    lr: Annotated[str | None, typer.Option(metavar="FLOAT", help="Learning rate at its peak.")] = None,
    opt: Annotated[str | None, typer.Option(help="sgd, adam or adamw.")] = None,
    seed: Annotated[str | None, typer.Option(metavar="INTEGER")] = None,
    variant: Annotated[str | None, typer.Option(help="Of AlexNet; `alexnet-cuda summary` lists them.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder or checkpoint to go on from.")] = None,
    devices: Annotated[str | None, typer.Option(help="How many, or which: auto, 2, 0,1.")] = None,
    nodes: Annotated[str | None, typer.Option(metavar="INTEGER", help="Machines.")] = None,
    precision: Annotated[str | None, typer.Option(help="32-true, 16-mixed, bf16-mixed, bf16-true or 64-true.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that --output holds.")] = False,
    config: Annotated[Path | None, typer.Option(help="YAML file with values of the recipe.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any value of the recipe.")
    ] = None,
) -> None:
    """Train on a recipe. Every value of it can also be given as --key value; `alexnet-cuda recipes` shows them."""
    given = {"data_path": data_path, "output": output, "epochs": epochs, "max_steps": max_steps,
             "batch_size": batch_size, "lr": lr, "opt": opt, "seed": seed, "variant": variant, "devices": devices,
             "nodes": nodes, "precision": precision}  # fmt: skip
    values = {key: value for key, value in given.items() if value is not None} | _more(ctx.args, set_ or [])
    _require_train()
    from .training.main import main as run

    raise typer.Exit(run(recipe, config, values, resume, overwrite, console))


@app.command()
def evaluate(
    run: RUN = None,
    data_path: Annotated[str | None, typer.Option(help="Folder of the data; none: the one it was trained on.")] = None,
    json_: JSON = False,
) -> None:
    """Test a run's weights again on the test split."""
    _require_train()
    from .data import load_images
    from .training import evaluation

    model, recipe, classes = evaluation.load_weights(_newest(run))
    images = load_images(recipe.replace({"data_path": data_path} if data_path else {}))
    if images.classes != classes:
        raise Failure(f"the data has the classes {images.classes}, the run was trained on {classes}")
    figures = evaluation.figures(evaluation.predict(model, images, recipe))
    if json_:
        print(json.dumps(figures, indent=2))
        return
    table = Table(
        "figure", "value", title=f"{recipe.variant} on {len(images.test.labels)} test images of {recipe.name}"
    )
    table.columns[1].justify = "right"
    for name, value in figures.items():
        table.add_row(name, f"{value:.4f}")
    console.print(table)


@app.command()
def predict(
    images: Annotated[
        list[Path], typer.Argument(help="Pictures: PNG, JPEG, anything Pillow reads.", metavar="IMAGE...")
    ],
    run: RUN = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to show for each picture.")] = 5,
    json_: JSON = False,
) -> None:
    """Name what is on pictures."""
    _require_train()
    from .training import evaluation

    model, recipe, classes = evaluation.load_weights(_newest(run))
    shares, order = evaluation.predict_files(model, recipe, images).sort(dim=1, descending=True)
    rows = [
        [(classes[label], share) for label, share in zip(labels[:top].tolist(), values[:top].tolist(), strict=True)]
        for labels, values in zip(order, shares, strict=True)
    ]
    if json_:
        tops = [[{"class": name, "probability": round(share, 6)} for name, share in row] for row in rows]
        print(json.dumps([{"image": str(path), "top": top} for path, top in zip(images, tops, strict=True)], indent=2))
        return
    table = Table(
        "image", *(f"{i + 1}." for i in range(len(rows[0]))), title=f"{recipe.variant} trained on {recipe.name}"
    )
    for path, row in zip(images, rows, strict=True):
        cells = [f"{_plain(name)} [dim]{share:.1%}[/]" for name, share in row]
        table.add_row(_plain(path.name), f"[bold]{cells[0]}[/]", *cells[1:])
    console.print(table)


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Recipe whose values to show.")] = None) -> None:
    """List the recipes, or every value of one."""
    from .training import list_recipes, load_recipe

    if name is not None:
        console.print(load_recipe(name).to_yaml().strip(), highlight=False)
        return
    table = Table("recipe", "what it is")
    for recipe, line in list_recipes().items():
        table.add_row(recipe, line)
    console.print(table)


@app.command()
def summary(
    variant: Annotated[str | None, typer.Argument(help="Variant of AlexNet; none: list them.")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Classes; none: the variant's own.")] = None,
    channels: Annotated[int | None, typer.Option(min=1, help="Channels of the input; none: the variant's own.")] = None,
) -> None:
    """Show the layers of a variant, with output sizes, parameters and multiplications."""
    from .variants import VARIANTS

    if variant is None:
        table = Table("variant", "input", "parameters", "what it is")
        table.columns[2].justify = "right"
        for name, v in VARIANTS.items():
            table.add_row(
                name, f"{v.channels}x{v.input_size}x{v.input_size}", f"{v.parameters:,}", _plain(v.description)
            )
        console.print(table)
        return
    if variant not in VARIANTS:
        raise typer.BadParameter(f"unknown variant {variant!r}; choose from {', '.join(VARIANTS)}")
    import torch

    from .model import AlexNet, model_summary

    with torch.device("meta"):
        layers = model_summary(AlexNet(variant, classes, channels))
    parameters, macs = (sum(getattr(layer, key) for layer in layers) for key in ("parameters", "macs"))
    # narrow enough for 80 columns
    table = Table("layer", "type", "output", title=f"{variant}: {VARIANTS[variant].description}", box=SIMPLE_HEAD,
                  pad_edge=False, padding=(0, 1, 0, 0))  # fmt: skip
    for name in ("parameters", "share", "MACs", "share"):
        table.add_column(name, justify="right")
    for layer in layers:
        size = "x".join(map(str, layer.output_size))
        shares = _share(layer.parameters, parameters), _share(layer.macs, macs)
        counts = f"{layer.parameters:,}" if layer.parameters else "", _millions(layer.macs)
        table.add_row(layer.name, layer.type, size, counts[0], shares[0], counts[1], shares[1])
    table.add_section()
    table.add_row("all", "", "", f"{parameters:,}", "", _millions(macs), "")
    console.print(table)


@app.command()
def info(json_: JSON = False) -> None:
    """Show versions, and which kernels are in use or why not."""
    from . import build_info

    facts = {key: str(value) for key, value in build_info().items()}
    if json_:
        print(json.dumps(facts, indent=2))
        return
    table = Table("what", "value", title="alexnet_cuda")
    for key, value in facts.items():
        table.add_row(key, _plain(value))
    console.print(table)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if part else ""


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count else ""


def _more(arguments: list[str], pairs: list[str]) -> dict[str, str]:
    """Values given as `--key value`, `--key=value`, `--flag`, `--no-flag` and `--set key=value`."""
    from .training.recipe import TYPES, RecipeError

    values: dict[str, str] = {}
    tokens = list(arguments)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--"):
            raise RecipeError(f"unexpected argument {token!r}; the recipe comes first, then --key value")
        key, equals, value = token[2:].partition("=")
        key = key.replace("-", "_")
        if key.startswith("no_") and TYPES.get(key[3:]) is bool and not equals:
            key, value = key[3:], "false"
        elif not equals:
            value = tokens.pop(0) if tokens and not tokens[0].startswith("--") else "true"
        values[key] = value
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise RecipeError(f"--set takes key=value, got {pair!r}")
        values[key.strip().replace("-", "_")] = value
    return values


def _newest(run: Path | None) -> Path:
    if run is not None:
        return run
    found = sorted(Path("runs").glob("*/weights.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise Failure("no finished run in runs/; train one, or name its folder with --run")
    return found[-1].parent


def _require_train() -> None:
    """One sentence instead of a traceback where the training libraries are missing or do not fit together."""
    try:
        import torchvision  # noqa: F401, I001
        import lightning  # noqa: F401
        import matplotlib  # noqa: F401
        import safetensors  # noqa: F401
        import sklearn  # noqa: F401
        import tensorboard  # noqa: F401
        import torchmetrics  # noqa: F401
    except ModuleNotFoundError as error:
        raise Failure(
            f"{error.name} is not installed; `pip install 'alexnet_cuda[train]'` installs all that this needs"
        ) from error
    except (RuntimeError, ImportError, OSError) as error:
        from importlib.metadata import version

        import torch

        raise Failure(
            f"torchvision {version('torchvision')} does not work with torch {torch.__version__} "
            f"({str(error).splitlines()[0]}); install the two from one place: `pip install --force-reinstall torch "
            "torchvision`, or for a CPU-only pair add `--index-url https://download.pytorch.org/whl/cpu`"
        ) from error


def _plain(text: Any) -> str:
    from rich.markup import escape

    return escape(str(text))


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
