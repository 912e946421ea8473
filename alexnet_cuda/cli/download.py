"""`download`: a data set from its publisher."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..notes import PLAIN
from ._app import app, console, require


@app.command()
def download(
    dataset: Annotated[
        Literal["mnist", "fashion-mnist", "cifar10", "flowers17", "bike-ship"], typer.Argument(help="Data set.")
    ],
    data_path: Annotated[Path, typer.Option(metavar="DIR", help="Folder for data sets.")] = Path("data"),
) -> None:
    """Download a data set from its publisher, with checksums; the same command continues a download that broke off."""
    require("torchvision", "train")
    from ..data.download import download as fetch

    folder = fetch(dataset, data_path, console)
    console.print(f"Ready: alexnet-cuda train {dataset} --data-path {folder}", **PLAIN)
