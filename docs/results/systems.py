"""Writes the tables of runs in README and docs/results/README.md from docs/results/*/metrics.json and config.yaml, and
from docs/results/*/seeds/N.json, the metrics.json of the same command with `--seed N`.

--check only compares: exit code 1 if one of them says something else than the results.
"""

import json
import statistics
import sys
from pathlib import Path

from alexnet_cuda.recipe import Recipe, command, read_yaml

RESULTS = Path(__file__).resolve().parent
README, COMMANDS = RESULTS.parents[1] / "README.md", RESULTS / "README.md"
NUMBERS = "parameters", "test images", "accuracy", "mean of seeds", "training"
BEGIN, END = "<!-- systems: from docs/results by docs/results/systems.py -->\n", "<!-- /systems -->"


def other_seeds(folder: Path) -> list[dict]:
    return [json.loads(path.read_text("utf-8")) for path in sorted((folder / "seeds").glob("*.json"))]


def mean_of_seeds(runs: list[dict]) -> str:
    """The mean test accuracy and its standard deviation."""
    accuracies = [100 * run["test/accuracy"] for run in runs]
    if len(runs) == 1:
        return "-"
    return f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}% ({len(runs)} runs)"


def row(folder: Path) -> dict[str, str]:
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    minutes = metrics["seconds"] / 60
    return {
        "run": f"[{folder.name}](docs/results/{folder.name})",
        "network": f"`{metrics['variant']}`",
        "parameters": f"{metrics['parameters']:,}",
        "test images": f"{metrics['images']['test']:,}",
        "accuracy": f"**{metrics['test/accuracy']:.2%}**",
        "mean of seeds": mean_of_seeds([metrics, *other_seeds(folder)]),
        "training": f"{minutes:.0f} min" if minutes >= 2 else f"{metrics['seconds']:.0f} s",
        "command": f"`{command(Recipe().replace(read_yaml(folder / 'config.yaml')))}`",
    }


def table(file: Path) -> str:
    """With everything but the command in README, with the command alone beside it."""
    rows = [row(path.parent) for path in sorted(RESULTS.glob("*/metrics.json"))]
    names = [name for name in rows[0] if (name != "command") == (file == README) or name == "run"]
    lines = [
        names,
        ["---:" if name in NUMBERS else "---" for name in names],
    ]
    lines += [[cells[name] for name in names] for cells in rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text if file == README else text.replace("(docs/results/", "(")


def main(arguments: list[str]) -> int:
    changed = 0
    for file in (README, COMMANDS):
        text = file.read_text("utf-8")
        written = text[: text.index(BEGIN) + len(BEGIN)] + table(file) + text[text.index(END) :]
        changed |= written != text
        if "--check" not in arguments:
            file.write_text(written, "utf-8")
    return int(changed and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
