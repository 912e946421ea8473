"""`check`: every operator against float64 on this machine's devices."""

from typing import Annotated, Literal

import typer
from rich.markup import escape

from ._app import NARROW, app, console, right, table


@app.command()
def check(
    device: Annotated[
        Literal["cpu", "cuda", "all"], typer.Option(help="Where; all: the CPU, and a GPU if there is one.")
    ] = "all",
    small: Annotated[bool, typer.Option("--small", help="Odd sizes only; for a run under compute-sanitizer.")] = False,
) -> None:
    """Compare every operator, forward and backward, with float64; exit code 1 if one differs too much."""
    import torch

    from ..check import check as rows

    gpu = torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise typer.BadParameter(f"torch {torch.__version__} finds no GPU", param_hint="--device")
    cases, wrong = 0, []
    for name in [d for d in ("cpu", "cuda") if device in (d, "all") and (d == "cpu" or gpu)]:
        title = f"{torch.cuda.get_device_name() if name == 'cuda' else 'CPU'}: largest relative error / allowed"
        shown = table(["operator", "dtype", *right("output", "gradients", "kernels", "")], [], title=title, **NARROW)
        with console.status("") as status:
            for row in rows(name, small=small):
                status.update(f"{name}: {row.op}, {row.dtype}")
                errors = [f"{error:.0e}/{allowed:.0e}" for error, allowed in (row.output, row.gradients)]
                served = "-" if small else f"{row.kernels} of {row.cases}"
                shown.add_row(row.op, row.dtype, *errors, served, "[red]wrong[/]" if row.wrong else "[green]ok[/]")
                cases += row.cases
                wrong += row.wrong
        console.print(shown)
    for line in wrong:
        console.print(escape(line), style="red", soft_wrap=True)
    console.print("kernels: cases that this package's own kernels computed; torch's operators computed the others")
    console.print(f"{cases} cases, {f'{len(wrong)} wrong' if wrong else 'all correct'}")
    if wrong:
        raise typer.Exit(1)
