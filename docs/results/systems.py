"""Writes the table of README's section "Systems" from docs/results/*/metrics.json and config.yaml.

--check only compares: exit code 1 if README says something else than the results.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from alexnet_cuda.recipe import Recipe, load_recipe, read_yaml

RESULTS = Path(__file__).resolve().parent
README = RESULTS.parents[1] / "README.md"
BEGIN, END = "<!-- systems: from docs/results by docs/results/systems.py -->\n", "<!-- /systems -->"
HERE = {"data_path", "output", "workers", "devices", "accelerator"}  # of a machine, not of a result


def command(config: Recipe) -> str:
    """What to type for the same run: the recipe, and what was set otherwise than it says."""
    recipe = asdict(load_recipe(config.name))
    words = ["alexnet-cuda train", config.name, *(["--data-path DIR"] if config.data != "digits" else [])]
    for key, value in asdict(config).items():
        if key not in HERE and value != recipe[key]:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            words.append(f"--{key.replace('_', '-')} {text}")
    return " ".join(words)


def row(folder: Path) -> str:
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    minutes = metrics["seconds"] / 60
    cells = (
        f"[{folder.name}](docs/results/{folder.name})",
        f"`{metrics['variant']}`",
        f"{metrics['parameters']:,}",
        f"{metrics['images']['test']:,}",
        f"**{metrics['test/accuracy']:.2%}**",
        f"{minutes:.0f} min" if minutes >= 2 else f"{metrics['seconds']:.0f} s",
        f"`{command(Recipe().replace(read_yaml(folder / 'config.yaml')))}`",
    )
    return f"| {' | '.join(cells)} |"


def table() -> str:
    header = ("run", "network", "parameters", "test images", "accuracy", "training", "command")
    rows = [row(path.parent) for path in sorted(RESULTS.glob("*/metrics.json"))]
    return "\n".join([f"| {' | '.join(header)} |", "|---|---|---:|---:|---:|---:|---|", *rows]) + "\n"


def main(arguments: list[str]) -> int:
    text = README.read_text("utf-8")
    written = text[: text.index(BEGIN) + len(BEGIN)] + table() + text[text.index(END) :]
    if "--check" in arguments:
        return int(written != text)
    README.write_text(written, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
