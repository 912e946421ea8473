"""What is committed is of today: the notebooks run to their end on small stand-ins for their data, the rendered pages
are of them, README says what the files of the committed runs say, and their configurations are still recipes."""

import importlib.util
import json
import os
import re
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
import torch
from jupyter_core.utils import run_sync
from PIL import Image
from sklearn import datasets
from test_data import idx

from alexnet_cuda import AlexNet
from alexnet_cuda.data.imageset import resize
from alexnet_cuda.recipe import Recipe, command, load_recipe, read_yaml

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "examples"
RESULTS = ROOT / "docs" / "results"
RUNS = sorted(path.parent for path in RESULTS.glob("*/metrics.json"))
spec = importlib.util.spec_from_file_location("systems", RESULTS / "systems.py")
systems = importlib.util.module_from_spec(spec)
spec.loader.exec_module(systems)
MACHINE = re.compile(r"/(home|root|tmp|work|usr|opt|Users)/")  # a place on somebody's machine
# What a notebook must have said, besides ending well, and how many pictures it must have shown.
EXPECTED = {
    "mnist": r"\b21,622,154\b.*'cifar': \(1124026,",
    "flowers17": r"after 85 steps 43 % of the start values.*momentum 0\.01 divided twice: training batches 58\.4 %",
    "cifar10": r"'with LRN': [\d.]+, 'switched off': [\d.]+",
    "bike_ship": r"'test/accuracy': [\d.]+.*'test/accuracy': [\d.]+.*'test/accuracy': [\d.]+",
    "explained": r"tanh: derivative through five layers [\d.e-]+.*of 359 test images",
    "folder": r"1 damaged image.*left out: .*'train': \[.*report\.html.*precision,recall,f1",
}
PICTURES = {"mnist": 6, "flowers17": 7, "cifar10": 9, "bike_ship": 8, "explained": 10, "folder": 6}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with all data sets in their formats: digits, and pieces of scikit-learn's two photographs."""
    root, bunch = tmp_path_factory.mktemp("data"), datasets.load_digits()
    x = resize(torch.from_numpy(bunch.images * 15.9).to(torch.uint8)[:, None], 32)[:, 0].numpy()
    y = bunch.target.astype(np.uint8)
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, of in (("train", slice(0, 300)), ("t10k", slice(300, 400))):
        idx(raw / f"{part}-images-idx3-ubyte.gz", x[of, 2:30, 2:30])
        idx(raw / f"{part}-labels-idx1-ubyte.gz", y[of])

    cifar = root / "cifar10"
    cifar.mkdir()
    for number, name in enumerate(("train_1", "train_2", "train_3", "train_4", "train_5", "test")):
        sheet = x[60 * number : 60 * number + 60].reshape(6, 10, 32, 32).transpose(0, 2, 1, 3).reshape(192, 320)
        Image.fromarray(sheet).convert("RGB").save(cifar / f"{name}.webp", lossless=True)
    np.save(cifar / "train_labels.npy", y[:300])
    np.save(cifar / "test_labels.npy", y[300:360])

    china, flower = (Image.fromarray(image) for image in datasets.load_sample_images().images)
    flowers = root / "flowers17" / "jpg"
    flowers.mkdir(parents=True)
    for number in range(1360):
        left, top = 15 * (number % 37), 10 * (number // 37)
        flower.crop((left, top, left + 40, top + 40)).save(flowers / f"image_{number + 1:04d}.jpg")

    for part, count in (("train", 30), ("val", 10)):
        for name, photograph in (("bike", china), ("ship", flower)):
            folder = root / "bike_ship" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                box = 10 * number, 5 * number, 10 * number + 300, 5 * number + 200
                photograph.resize((90, 60), box=box).save(folder / f"{part}_{number:02d}.jpg")
    return root


@pytest.fixture(scope="module")
def kernel(data, tmp_path_factory):
    """One Jupyter kernel for all notebooks, because importing what they need takes longer than running them."""
    client = nbclient.NotebookClient(nbformat.v4.new_notebook(), kernel_name="python3")
    manager = client.create_kernel_manager()
    settings = "variant=cifar limit=40 epochs=1 max_steps=2 batch_size=8 views=1 workers=0 accelerator=cpu"
    environment = {"ALEXNET_CUDA_DATA": str(data), "ALEXNET_CUDA_SET": settings}
    client.start_new_kernel(env={**os.environ, **environment, "IPYTHONDIR": str(tmp_path_factory.mktemp("ipython"))})
    yield manager
    run_sync(manager.shutdown_kernel)(now=True)


@pytest.mark.parametrize("name", EXPECTED)
def test_runs(name, kernel, tmp_path):
    here = tmp_path / "docs" / "examples"
    here.mkdir(parents=True)
    (tmp_path / "docs" / "results").symlink_to(RESULTS)
    notebook = nbformat.read(PAGES / f"{name}.ipynb", 4)
    start = nbformat.v4.new_code_cell(f"%reset -f\nimport os\nos.chdir({str(here)!r})\ndel os")
    notebook.cells.insert(0, start)
    nbclient.NotebookClient(notebook, km=kernel, timeout=600).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in outputs)
    assert re.search(EXPECTED[name], text, re.DOTALL)
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) == PICTURES[name]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    runs = list((tmp_path / "runs").glob("*/metrics.json"))
    assert runs or name == "explained"
    assert all(0 <= json.loads(run.read_text())["test/accuracy"] <= 1 for run in runs)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_notebook_has_its_outputs_and_the_page_is_of_it(name):
    path, text = PAGES / f"{name}.ipynb", (PAGES / f"{name}.md").read_text()
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 300_000
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) == PICTURES[name]
    for cell in notebook.cells:
        assert cell.source in text, "render it again, as docs/examples/README.md says"
    assert not MACHINE.search(path.read_text() + text)
    pictures = re.findall(r"\]\((\S+\.jpg)\)", text)
    assert len(pictures) == PICTURES[name]
    assert all((PAGES / picture).stat().st_size > 1000 for picture in pictures)


def test_pages_are_small():
    files = [path for path in PAGES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix != ".ipynb") < 2_500_000
    assert {path.suffix for path in files} <= {".md", ".jpg", ".ipynb"}


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
    for name in ("config.yaml", "metrics.json"):
        assert not MACHINE.search((folder / name).read_text("utf-8"))
    for path in (folder / "seeds").glob("*.json"):  # the same but for the seed and what follows from it
        other = json.loads(path.read_text("utf-8"))
        assert other["seed"] == int(path.stem) != metrics["seed"]
        for name in ("recipe", "variant", "parameters", "images", "epochs", "steps", "precision", "weights"):
            assert other[name] == metrics[name], (path, name)


def test_the_command_of_a_run_names_what_differs_from_its_recipe():
    recipe = load_recipe("mnist", None, {"epochs": 3, "mean": "0.1,0.2,0.3", "data_path": "/data", "output": "x"})
    assert command(recipe) == "alexnet-cuda train mnist --data-path DIR --mean 0.1,0.2,0.3 --epochs 3"
    assert command(load_recipe("digits")) == "alexnet-cuda train digits"
