"""What every command shares: the app, its errors, the console and common arguments."""

import errno
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
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
            Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {plain(text)}")
            raise typer.Exit(code) from error


def _exit_code(error: Exception) -> int | None:
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"RecipeError", "KernelsError"}:
        return 2
    return 1 if isinstance(error, Failure | OSError) or names & {"DataError", "Diverged"} else None


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode="rich",
                  pretty_exceptions_show_locals=False, help="AlexNet, from training to prediction.")  # fmt: skip

RUN = Annotated[Path | None, typer.Option(help="Run folder, or a weights.safetensors; none: the newest in runs/.")]
DATA_PATH = Annotated[str | None, typer.Option(help="Folder of the data; none: the one it was trained on.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def newest_run(run: Path | None) -> Path:
    if run is not None:
        return run
    found = sorted(Path("runs").glob("*/weights.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise Failure("no finished run in runs/; train one, or name its folder with --run")
    return found[-1].parent


def load_run(run: Path, data_path: str | None):
    """A run's network, its recipe and the images that it was trained on, read from `data_path` where one is given."""
    from ..data import load_images
    from ..training.evaluation import load_weights

    model, recipe, classes = load_weights(run)
    recipe = recipe.replace({"data_path": data_path} if data_path else {})
    images = load_images(recipe)
    if images.classes != classes:
        raise Failure(f"the data has the classes {images.classes}, the run was trained on {classes}")
    return model, recipe, images


def require_train() -> None:
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


def plain(text: Any) -> str:
    from rich.markup import escape

    return escape(str(text))
