"""What the commands share: the app, its errors, the console and common arguments."""

import errno
import os
import re
from collections.abc import Iterable, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from typer.core import TyperGroup

from .._version import VERSION
from ..errors import AlexNetError, first_line, sentence
from ..words import percent, unknown
from . import STOPPED

if TYPE_CHECKING:
    from ..data import ImageSet

console = Console(highlight=False)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UsageError: Any = typer.BadParameter.__mro__[1]  # of the click that typer carries, under any version of it
WORKER_ENDED = re.compile(r"DataLoader worker \(pid|shared memory|</torch_")
HOME = re.compile(r"^(--[\w-]+=|)~(?=/|$)")
NOT_A_CHOICE = re.compile(r"(?:Value error, )?'(.*)' is not one of (.*)")  # in the words of typer
PREDICT = ("torchvision",)  # the libraries that a command needs
EVALUATE = (*PREDICT, "lightning", "torchmetrics")
TRAIN = (*EVALUATE, "matplotlib", "sklearn", "captum", "tensorboard")


class Commands(TyperGroup):
    """Prints errors as one sentence: exit code 2 for wrong arguments, 130 after Ctrl-C, 1 for everything else. Takes
    ~ for the home folder in every argument, as in --data-path=~/photos, which shells leave as it is."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        home = os.path.expanduser("~")
        try:
            return super().parse_args(ctx, [HOME.sub(lambda match: match[1] + home, arg) for arg in args])
        except UsageError as error:
            if not args:  # the help is shown
                raise
            raise fail(*_told(error)) from error

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except typer.Exit:
            raise
        except BaseException as error:
            text, code = _told(error)
            if not text:
                raise
            raise fail(text, code) from error


def _told(error: BaseException) -> tuple[str, int]:
    """What a command prints of an error, and its exit code; nothing of a defect, whose traceback is wanted."""
    if _interrupted(error):
        return STOPPED, 130
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        where = f", for {error.filename}" if error.filename else ""
        return f"no space left on the disk ({error.strerror}{where}); what was saved before is intact", 1
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}", 1
    if isinstance(error, (AlexNetError, OSError)):
        return sentence(error), getattr(error, "exit_code", 1)
    if isinstance(error, UsageError):
        return _misused(error), error.exit_code
    if isinstance(error, RuntimeError) and WORKER_ENDED.search(str(error)):
        remedy = "fewer --workers need less memory and shared memory, --workers 0 none"
        return f"the system ended a process that loads data ({first_line(error)}); {remedy}", 1
    return "", 1


def _misused(error: Any) -> str:
    """What is wrong with the arguments of a command: the name that was probably meant, or the value that it got."""
    if meant := getattr(error, "possibilities", None):
        return f"unknown option {error.option_name!r}; did you mean {meant[0]}?"
    if found := NOT_A_CHOICE.match(error.message):
        return unknown(error.param.name, found[1], re.findall("'([^']+)'", found[2]))
    wrong: list[dict] = getattr(error.__cause__, "errors", list)()
    text = error.format_message() + (f", got {wrong[0]['input']!r}" if wrong else "")
    return " ".join(text.split())


def _interrupted(error: BaseException | None) -> bool:
    """Whether an error began with Ctrl-C, of which Lightning makes a SystemExit."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def fail(text: str, code: int = 1) -> typer.Exit:
    """Prints an error as one sentence; to be raised."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {escape(text)}")
    return typer.Exit(code)


app = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode="rich",
                  pretty_exceptions_show_locals=False, help="AlexNet, from training to prediction.")  # fmt: skip


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"alexnet_cuda {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and end.")
    ] = False,
) -> None:
    """The options that come before a command."""


def _existing(run: Path | None) -> Path | None:
    """A run that is named must be there before the libraries of a command load."""
    from .. import pretrained

    if run is not None:
        pretrained.find(run, "expected the folder of a finished run, or its weights.safetensors")
    return run


RUN = Annotated[
    Path | None,
    typer.Option("--run", "--weights", callback=_existing,
        help="Run folder, weights file, or cifar10, mnist or digits: weights of the package. Default: the newest run "
        "in runs/, else weights of the package."),
]  # fmt: skip
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
    from ..variants import get_variant

    get_variant(name)


def newest_run(run: Path | None, otherwise: str | None = "cifar10") -> Path:
    """`run`, or the newest in runs/; where there is none, the weights `otherwise` of the package, with a note."""
    from .. import pretrained
    from ..notes import show_notes

    if run is not None:
        return pretrained.find(run) if str(run) in pretrained.NAMES else run
    found = sorted(Path("runs").glob("*/weights.safetensors"), key=lambda path: path.stat().st_mtime)
    if found:
        return found[-1].parent
    if otherwise is None:
        raise AlexNetError("no finished run in runs/; train one, or name its folder with --run")
    names = ", ".join(name for name in pretrained.NAMES if name != otherwise)
    show_notes([f"no finished run in runs/: the package's weights {otherwise} serve (--weights {names}: others)"])
    return pretrained.find(otherwise)


def load_run(run: Path, data_path: str | None, new: bool = False):
    """A run's network, its recipe and the images that it was trained on, read from `data_path` where one is given. With
    `new`, pictures from another path than the run's are new ones: all of them are the test split."""
    from ..data import load_images, load_test_images
    from ..recipe import read_yaml
    from ..weights import load_weights

    model, recipe, classes = load_weights(run)
    config = (run if run.is_dir() else run.parent) / "config.yaml"  # a weights file names no folder
    own = recipe.data_path or (read_yaml(config).get("data_path") if config.exists() else None)
    new = new and data_path is not None and Path(data_path).absolute() != Path(own or "").absolute()
    recipe = recipe.replace({"data_path": data_path or own})
    images = load_test_images(recipe, classes) if new else load_images(recipe)
    require_classes(images.classes, classes)
    return model, recipe, images


def require_classes(found: Sequence[str], trained: Sequence[str]) -> None:
    """AlexNetError where data has other classes than a run was trained on."""
    from ..data.scan import shortened

    if list(found) != list(trained):
        new, lacking = ([name for name in a if name not in b] for a, b in ((found, trained), (trained, found)))
        differ = f"only the data has {shortened(new) or 'none'}, only the run {shortened(lacking) or 'none'}"
        raise AlexNetError(f"the run was trained on other classes than the data has: {differ}")


def show_figure(name: str, value: float) -> str:
    """A figure of metrics.json: accuracies in percent, others with four digits."""
    return percent(value) if name in ("test/accuracy", "test/top5", "test/f1") else f"{value:.4f}"


def class_table(title: str, images: "ImageSet") -> Table:
    """Images per class and split, of many classes the first and last ten."""
    counts = images.counts()
    made = table(["class", *right(*counts, "")], [], title=title)
    rows = list(zip(images.classes, *counts.values(), strict=True))
    largest, bar = max(*counts["train"], 1), "━" if console.encoding.startswith("utf") else "="
    shown = rows if len(rows) <= 20 else [*rows[:10], *rows[-10:]]
    for row in shown:
        made.add_row(escape(row[0]), *(f"{n:,}" for n in row[1:]), f"[blue]{bar * round(20 * row[1] / largest):20}[/]")
    if len(shown) < len(rows):
        made.caption = f"the first and last ten of {len(rows)} classes"
    made.add_section()
    made.add_row("all", *(f"{sum(n):,}" for n in counts.values()), f"{largest / max(min(counts['train']), 1):.3g} : 1")
    return made


def require(module: str, extra: str) -> None:
    """Fails with the command that installs `module`, if it is missing."""
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        remedy = f"`pip install 'alexnet_cuda[{extra}]'` installs it"
        raise AlexNetError(f"{error.name} is not installed; {remedy}") from error


def require_train(modules: Iterable[str] = TRAIN) -> None:
    """Fails with the command to run, if a library for training is missing or does not fit the installed torch."""
    try:
        for module in modules:
            require(module, "train")
    except (RuntimeError, ImportError, OSError) as error:
        import torch

        raise AlexNetError(
            f"torchvision {metadata.version('torchvision')} does not work with torch {torch.__version__} "
            f"({first_line(error)}); install the two from one place: `pip install --force-reinstall torch "
            "torchvision`, or for a CPU-only pair add `--index-url https://download.pytorch.org/whl/cpu`"
        ) from error
