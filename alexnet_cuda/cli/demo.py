"""`demo`: a web page that names what is on a picture."""

from pathlib import Path
from typing import Annotated

import typer

from ._app import RUN, Failure, app, console, newest_run, require_train


@app.command()
def demo(
    run: RUN = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of 127.0.0.1; 0: any that is free.")] = 7860,
) -> None:
    """Show a page, on this machine alone, where a picture is dropped or drawn and named."""
    first = newest_run(run)
    found = [] if run else [path.parent for path in Path("runs").glob("*/weights.safetensors")]
    runs = [first, *sorted(folder for folder in found if folder != first)]
    with console.status("starting") as status:

        def announce(url: str) -> None:
            status.stop()
            console.print(f"Open {url} in a browser; Ctrl-C ends it.", highlight=False, soft_wrap=True)

        require_train()
        try:
            from .. import demo as page
        except ModuleNotFoundError as error:
            raise Failure(f"{error.name} is not installed; `pip install 'alexnet_cuda[demo]'` installs it") from error
        try:
            page.serve(runs, port, announce)
        except OSError as error:
            why = error.strerror or error
            raise Failure(f"port {port} of {page.ADDRESS} cannot be used ({why}); --port 0 takes a free one") from error
