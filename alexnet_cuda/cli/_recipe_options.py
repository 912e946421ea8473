"""Options of the command line for the values of a recipe, generated from their declarations in `recipe`."""

import functools
import inspect
import math
import typing
from collections.abc import Callable, Container
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..recipe import BOOLEANS, FIELDS, TYPES, RecipeError, unknown_key

METAVARS = {bool: "true|false", int: "INTEGER", float: "FLOAT", str: "TEXT"}
RECIPE = Annotated[str, typer.Argument(help="Name of a recipe; `alexnet-cuda recipes` lists them.")]
CONFIG = Annotated[Path | None, typer.Option(help="YAML file with values of the recipe.")]
SET = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any value of the recipe.")]


class RecipeCommand(TyperCommand):
    """A command with `recipe_options`: `--flag` means `--flag true`, `--no-flag` means `--flag false`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        tokens = [_with_value(token, following) for token, following in zip(args, [*args[1:], ""])]
        known = {option for parameter in self.get_params(ctx) for option in parameter.opts}
        for option in (token.partition("=")[0] for token in tokens):
            if option.startswith("--") and option not in known:
                raise unknown_key(option[2:].replace("-", "_"))
        ctx.allow_extra_args = True
        if rest := super().parse_args(ctx, tokens):
            raise RecipeError(f"unexpected argument {rest[0]!r}; the recipe comes first, then --key value")
        return rest


def recipe_options(command: Callable, sections: Container[str] | None = None) -> Callable:
    """Gives a command --set, and an option for each value of a recipe, of these sections if any are named, for which it
    has no parameter of its own.

    The command receives the values that were given, as text, as its argument `values`.
    """
    own = [p for p in inspect.signature(command).parameters.values() if p.name != "values"]
    added = [inspect.Parameter("set_", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=SET)]
    section = ""
    for key, field in FIELDS.items():
        section = field.metadata.get("section", section)
        if all(p.name != key for p in own) and (sections is None or section in sections):
            kind = Annotated[str | None, _option(key, section)]
            added.append(inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        asked = {p.name: given.pop(p.name) for p in added}
        values = {}
        for pair in asked.pop("set_") or []:
            key, equals, value = pair.partition("=")
            if not equals:
                raise RecipeError(f"--set takes key=value, got {pair!r}")
            values[key.strip().replace("-", "_")] = value
        command(values={key: value for key, value in asked.items() if value is not None} | values, **given)

    run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    return run


def _option(key: str, section: str) -> Any:
    rules, kinds = FIELDS[key].metadata, typing.get_args(TYPES[key])
    choices, (low, high) = "|".join(map(str, rules.get("choices", ()))), rules["limits"] or (0, math.inf)
    help = f"{rules['help']} ({low:g} to {high:g})" if high <= 4096 else rules["help"]
    metavar = choices or METAVARS.get(TYPES[key]) or METAVARS[kinds[0]] + ",..." * (kinds[-1] is ...)
    return typer.Option(f"--{key.replace('_', '-')}", help=help, metavar=metavar, rich_help_panel=section)


def _with_value(token: str, following: str) -> str:
    """`--flag` and `--no-flag` with the value that they mean; underscores in the name of an option become hyphens."""
    option = token.partition("=")[0]
    if not option.startswith("--"):
        return token
    key, value = option[2:].replace("-", "_"), token[len(option) :]
    if not value and TYPES.get(key) is bool and following.lower() not in BOOLEANS:
        value = "=true"
    elif not value and key.startswith("no_") and TYPES.get(key[3:]) is bool:
        key, value = key[3:], "=false"
    return f"--{key.replace('_', '-')}{value}"
