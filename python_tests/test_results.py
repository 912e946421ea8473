"""The committed runs: README says what their files say, and their configurations are still recipes."""

import importlib.util
import json
from pathlib import Path

import pytest

from alexnet_cuda import AlexNet
from alexnet_cuda.recipe import Recipe, load_recipe, read_yaml

RESULTS = Path(__file__).parents[1] / "docs" / "results"
RUNS = sorted(path.parent for path in RESULTS.glob("*/metrics.json"))
spec = importlib.util.spec_from_file_location("systems", RESULTS / "systems.py")
systems = importlib.util.module_from_spec(spec)
spec.loader.exec_module(systems)


def test_readme_shows_the_committed_runs(tmp_path, monkeypatch):
    assert systems.main(["--check"]) == 0
    changed = tmp_path / "README.md"
    changed.write_text(systems.README.read_text("utf-8").replace(f"[{RUNS[0].name}]", "[other]"), "utf-8")
    monkeypatch.setattr(systems, "README", changed)
    assert systems.main(["--check"]) == 1
    assert systems.main([]) == 0
    assert systems.main(["--check"]) == 0


@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)
def test_a_committed_run_is_complete_and_holds_no_path_of_a_machine(folder):
    config = Recipe().replace(read_yaml(folder / "config.yaml"))
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    model = AlexNet(config.variant, sum(1 for _ in (folder / "per_class.csv").open()) - 1, config.channels)
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert {"curves.png", "confusion_matrix.png", "report.html"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.rglob("*.ckpt")) + list(folder.rglob("*.safetensors"))
    for path in (folder / "config.yaml", folder / "metrics.json"):
        assert "/tmp" not in path.read_text("utf-8")
        assert "/work" not in path.read_text("utf-8")


def test_the_command_of_a_run_names_what_differs_from_its_recipe():
    recipe = load_recipe("mnist", None, {"epochs": 3, "mean": "0.1,0.2,0.3", "data_path": "/data", "output": "x"})
    assert systems.command(recipe) == "alexnet-cuda train mnist --data-path DIR --mean 0.1,0.2,0.3 --epochs 3"
    assert systems.command(load_recipe("digits")) == "alexnet-cuda train digits"
