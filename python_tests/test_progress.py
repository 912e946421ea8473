"""The progress bar of training fits into a terminal of 80 columns."""

import io
from types import SimpleNamespace

from rich.console import Console
from rich.progress import Progress

from alexnet_cuda.training import callbacks


def test_a_line_of_progress_fits_into_80_columns(monkeypatch):
    monkeypatch.setattr(
        callbacks.RichProgressBar, "get_metrics", lambda *a: {"train/loss": 12.3, "val/accuracy": 0.987}
    )
    monkeypatch.setattr(callbacks, "speed", lambda *a: {"images/s": "12,345", "left": "1:00:00"})
    bar = callbacks.ProgressBar()
    bar._trainer = SimpleNamespace(max_epochs=100)
    progress = Progress(*bar.configure_columns(bar._trainer))
    progress.add_task(bar._get_train_description(99), total=1000, completed=999)
    console = Console(file=io.StringIO(), width=200)
    console.print(progress.get_renderable())
    line = console.file.getvalue().rstrip()
    assert "epoch 100/100" in line
    metrics = " ".join(f"{name}: {value}" for name, value in bar.get_metrics(None, None).items())
    assert metrics.startswith("loss: 12.30 val: 0.99")
    assert len(line) + 1 + len(metrics) <= 80, f"{line} {metrics}"
