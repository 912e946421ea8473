"""Writes the tables of explained.md and recipes.md that follow from the code. --check only compares."""

import json
import sys
from pathlib import Path

import torch

from alexnet_cuda.model import AlexNet
from alexnet_cuda.recipe import FIELDS, list_recipes, read_yaml
from alexnet_cuda.recipe import FOLDER as RECIPES
from alexnet_cuda.reports.comparison import means
from alexnet_cuda.reports.experiments import written
from alexnet_cuda.summary import layer_names, model_summary
from alexnet_cuda.variants import VARIANTS, get_variant
from alexnet_cuda.words import percent

DOCS = Path(__file__).resolve().parent
Rows = list[list[str]]


def text(rows: Rows) -> str:
    """The first row is the heading."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def split() -> str:
    """Parameters and multiply-accumulates of every variant, between convolutions and linear layers."""
    rows = [
        ["network", "parameters", "in convolutions", "in dense layers", "MACs", "in convolutions", "in dense layers"]
    ]
    for name in VARIANTS:
        layers = model_summary(name)
        parts = []
        for key in ("parameters", "macs"):
            conv, dense = (sum(getattr(r, key) for r in layers if r.type == type_) for type_ in ("Conv2d", "Linear"))
            total = f"{conv + dense:,}" if key == "parameters" else f"{(conv + dense) / 1e6:,.1f} M"
            parts += [total, percent(conv / (conv + dense), 1), percent(dense / (conv + dense), 1)]
        rows.append([f"`{name}`", *parts])
    return text(rows)


def layers() -> str:
    """Layers with weights of the paper's network."""
    with torch.device("meta"):
        names = layer_names(AlexNet("paper"))
    rows = [["layer", "output", "parameters", "MACs of an image"]]
    for row in model_summary("paper"):
        if row.parameters:
            size = " x ".join(map(str, row.output_size))
            rows.append([f"`{names[row.name]}`", size, f"{row.parameters:,}", f"{row.macs:,}"])
    return text(rows)


def ablations() -> str:
    """Networks with one idea changed, from a committed comparison; "" before there is one."""
    file = DOCS / "results" / "ablations" / "compare.json"
    if not file.exists():
        return ""
    rows = [["network", "what is changed", "test accuracy", "seeds", "training, minutes"]]
    for row in means(json.loads(file.read_text("utf-8"))["models"]):
        about = get_variant(row["model"]).description.removeprefix("cifar with ")
        minutes = f"{row['seconds'] / 60:.1f}"
        rows.append([f"`{row['model']}`", about, written(row, "accuracy"), str(len(row["runs"])), minutes])
    return text(rows)


def recipes() -> str:
    """Every recipe with what it sets otherwise than the defaults."""
    rows = [["recipe", "what it is", "values"]]
    for name, about in list_recipes().items():
        values = read_yaml(RECIPES / f"{name}.yaml")
        rows.append([f"`{name}`", about, ", ".join(f"`{k}` {_shown(v)}" for k, v in values.items())])
    return text(rows)


def values() -> str:
    """Every value of a recipe, with its default, limits and what a resumed run may do with it."""
    out = ""
    for key, field in FIELDS.items():
        facts = field.metadata
        if heading := facts.get("section"):
            out += f"\n### {heading}\n\n| value | default | allowed | when resumed | meaning |\n{'| --- ' * 5}|\n"
        limits = facts["limits"]
        choices = ", ".join(map(_shown, facts.get("choices") or ()))
        allowed = choices or (f"{limits[0]:.12g} to {limits[1]:.12g}" if limits else "")
        out += f"| `{key}` | {_shown(field.default)} | {allowed} | {facts['resume']} | {facts['help']} |\n"
    return out


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return {"None": "none", "True": "yes", "False": "no"}.get(str(value), str(value))


TABLES = {
    "explained.md": {"split": split, "layers": layers, "ablations": ablations},
    "recipes.md": {"recipes": recipes, "values": values},
}


def main(arguments: list[str]) -> int:
    changed = False
    for name, tables in TABLES.items():
        file = DOCS / name
        written = old = file.read_text("utf-8")
        for key, make in tables.items():
            begin, end = f"<!-- table: {key}, by docs/tables.py -->\n", f"<!-- /{key} -->"
            written = written[: written.index(begin) + len(begin)] + make() + written[written.index(end) :]
        changed |= written != old
        if "--check" not in arguments:
            file.write_text(written, "utf-8")
    return int(changed and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
