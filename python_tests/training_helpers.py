"""What the tests of data, training and the command line share. A file that imports an autouse fixture uses it."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from alexnet_cuda.cli import app

ROOT = Path(__file__).parents[1]


def cli(*arguments, code=0):
    """What a command prints, with --json to stdout alone; it ends with exit code `code` and without a traceback."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False, env={"COLUMNS": "120"})
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stdout if "--json" in arguments else result.output


def run_python(*arguments, timeout):
    """A Python process with one thread, which can import these helpers."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=timeout,
                          cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path})  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def no_report():
    """No pictures, which take longer than the training of a small run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alexnet_cuda.cli.run_recipe.write_report", lambda folder, *rest: [folder / "report.html"])
        yield


def light_network(recipe, classes):
    """Takes the place of networks.build where the network does not matter; no BatchNorm, no dropout."""
    size = 64 * recipe.channels
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(size, classes))


def checkpoint(folder, name="last"):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def legible_texts(figure):
    """The texts of a figure, of which no two overlap and all lie on the paper."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    for i, (text, box) in enumerate(boxes):
        assert min(box.x0, box.y0, figure.bbox.width - box.x1, figure.bbox.height - box.y1) > 0, text
        for other, second in boxes[i + 1 :]:
            assert not box.overlaps(second), f"{text!r} and {other!r}"
    return texts
