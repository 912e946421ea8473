"""`demo`: a web page that classifies pictures."""

from pathlib import Path
from typing import Annotated

import typer

from ._app import RUN, Failure, app, console, newest_run, require, require_train


@app.command()
def demo(
    run: RUN = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of 127.0.0.1; 0: any free one.")] = 7860,
) -> None:
    """Serve a web page, to this machine only, that classifies pictures which are dropped or drawn on it."""
    first = newest_run(run)
    found = [] if run else [path.parent for path in Path("runs").glob("*/weights.safetensors")]
    runs = [first, *sorted(folder for folder in found if folder != first)]
    with console.status("starting") as status:

        def announce(url: str) -> None:
            status.stop()
            console.print(f"Open {url} in a browser; Ctrl-C ends it.", soft_wrap=True)

        require_train()
        require("gradio", "demo")
        from ..demo import page

        try:
            page.serve(runs, port, announce)
        except OSError as error:
            why = error.strerror or error
            raise Failure(f"port {port} of {page.ADDRESS} cannot be used ({why}); --port 0 takes a free one") from error
