"""What the commands share: the app, its errors, the console and common arguments."""

import errno
from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from typer.core import TyperGroup

from ..errors import AlexNetError

console = Console(highlight=False)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TRAIN = ("torchvision", "lightning", "matplotlib", "safetensors", "sklearn", "tensorboard", "torchmetrics")


class Commands(TyperGroup):
    """Prints the package's errors as one sentence: exit code 2 for wrong arguments, 1 for everything else."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (AlexNetError, OSError) as error:
            text = str(error)
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                text = f"no space left on the disk ({error.strerror}); what was saved before is intact for --resume"
            Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {escape(text)}")
            raise typer.Exit(getattr(error, "exit_code", 1)) from error


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode="rich",
                  pretty_exceptions_show_locals=False, help="AlexNet, from training to prediction.")  # fmt: skip

RUN = Annotated[Path | None, typer.Option(help="Run folder, or a weights.safetensors; none: the newest in runs/.")]
DATA_PATH = Annotated[str | None, typer.Option(help="Folder of the data; none: the one it was trained on.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
NARROW: dict[str, Any] = {"box": SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}  # for 80 columns


def right(*names: str) -> list[Column]:
    return [Column(name, justify="right") for name in names]


def table(columns: Iterable[str | Column], rows: Iterable[Sequence[str]], **options: Any) -> Table:
    made = Table(*columns, **options)
    for row in rows:
        made.add_row(*row)
    return made


def require_variant(name: str) -> None:
    from ..variants import VARIANTS

    if name not in VARIANTS:
        raise typer.BadParameter(f"unknown variant {name!r}; choose from {', '.join(VARIANTS)}")


def newest_run(run: Path | None) -> Path:
    if run is not None:
        return run
    found = sorted(Path("runs").glob("*/weights.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise AlexNetError("no finished run in runs/; train one, or name its folder with --run")
    return found[-1].parent


def load_run(run: Path, data_path: str | None):
    """A run's network, its recipe and the images that it was trained on, read from `data_path` where one is given."""
    from ..data import load_images
    from ..weights import load_weights

    model, recipe, classes = load_weights(run)
    recipe = recipe.replace({"data_path": data_path} if data_path else {})
    images = load_images(recipe)
    if images.classes != classes:
        raise AlexNetError(f"the data has the classes {images.classes}, the run was trained on {classes}")
    return model, recipe, images


def require(module: str, extra: str) -> None:
    """Fails with the command that installs `module`, if it is missing."""
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        remedy = f"`pip install 'alexnet_cuda[{extra}]'` installs it"
        raise AlexNetError(f"{error.name} is not installed; {remedy}") from error


def require_train() -> None:
    """Fails with the command to run, if a library for training is missing or does not fit the installed torch."""
    try:
        for module in TRAIN:
            require(module, "train")
    except (RuntimeError, ImportError, OSError) as error:
        import torch

        raise AlexNetError(
            f"torchvision {version('torchvision')} does not work with torch {torch.__version__} "
            f"({str(error).splitlines()[0]}); install the two from one place: `pip install --force-reinstall torch "
            "torchvision`, or for a CPU-only pair add `--index-url https://download.pytorch.org/whl/cpu`"
        ) from error
