"""Additions to the Lightning Trainer: atomic checkpoints, stops that can be resumed, progress without a terminal."""

import io
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console

from ..files import atomic_path, read_rows


class Stopped(Exception):
    """Raised to end training early, with the reason; `last.ckpt` holds the state after the last finished step."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints that replace the earlier file only once they are complete and on the disk."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with atomic_path(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())


class ModelCheckpoint(callbacks.ModelCheckpoint):
    """Lightning's ModelCheckpoint, which keeps its best epoch when the run folder was moved or renamed. The class has
    the same name because that is the key of its state in a checkpoint."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        paths = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "dirpath": self.dirpath, "best_k_models": best})


class StopAndCheckpoint(Callback):
    """Ends training after the current step on Ctrl-C, on SIGTERM and at `max_steps`, with a checkpoint of that step.
    Also counts the seconds of training, summed over resumed runs."""

    state_key = "Stop"  # as in the checkpoints of earlier versions

    def __init__(self, path: Path, max_steps: int):
        self.path, self.max_steps = path, max_steps
        self.signal: int | None = None
        self.seconds, self.began = 0.0, time.monotonic()
        self.handlers: dict[int, Any] = {}

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds + time.monotonic() - self.began}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.seconds = state_dict["seconds"]

    def on_train_start(self, trainer, pl_module) -> None:
        self.began = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            self.handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        if reason := self._reason(trainer):
            raise Stopped(reason)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        # After the last batch of an epoch, validation and its checkpoint come first; on_train_epoch_start stops.
        if not trainer.is_last_batch and (reason := self._reason(trainer)):
            trainer.save_checkpoint(self.path)
            raise Stopped(reason)

    def on_exception(self, trainer, pl_module, exception) -> None:
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer, pl_module, stage) -> None:
        self.seconds, self.began = self.state_dict()["seconds"], time.monotonic()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def _reason(self, trainer: Trainer) -> str:
        if self.max_steps and trainer.global_step >= self.max_steps:
            return "max_steps"
        stop = self.signal is not None
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        return "signal" if stop else ""

    def _on_signal(self, number: int, frame) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


def speed(trainer: Trainer, module: Any) -> dict[str, str]:
    """Images per second in this epoch, and the time that is left for the whole run at this rate of steps."""
    seconds, steps = time.monotonic() - module.began, module.seen / max(1, module.recipe.batch_size)
    if not steps or seconds <= 0:
        return {}
    left = timedelta(seconds=round((trainer.estimated_stepping_batches - trainer.global_step) * seconds / steps))
    return {"images/s": f"{module.seen * trainer.world_size / seconds:,.0f}", "left": str(left)}


class ProgressBar(RichProgressBar):
    """Lightning's progress bar within 80 columns: loss, validation accuracy and the time left for the run, with epochs
    counted from 1."""

    def configure_columns(self, trainer) -> list:
        description, bar, batches, *_ = super().configure_columns(trainer)
        bar.bar_width = 4
        return [description, bar, batches]

    def get_metrics(self, trainer, pl_module):
        metrics = super().get_metrics(trainer, pl_module)
        return {name: f"{metrics[key]:.2f}" for key, name in SHOWN.items() if key in metrics} | speed(
            trainer, pl_module
        )

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch + 1}/{self.trainer.max_epochs}"


SHOWN = {"train/loss": "loss", "val/accuracy": "val"}  # metrics of the progress bar, and their names there


class PlainProgress(Callback):
    """Progress where the output is no terminal: a line per epoch, and one a minute within longer epochs."""

    def __init__(self, console: Console):
        self.console, self.printed = console, time.monotonic()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if time.monotonic() - self.printed > 60:
            done = f"batch {batch_idx + 1}/{trainer.num_training_batches}"
            self._print(trainer, pl_module, f"{done}  loss {outputs['loss'].item():.4f}")

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        values = trainer.callback_metrics
        self._print(trainer, pl_module, "  ".join(f"{key} {values[key].item():.4f}" for key in SHOWN if key in values))

    def _print(self, trainer, module, text: str) -> None:
        self.printed = time.monotonic()
        rate = "".join(f"  {value} {key}" for key, value in speed(trainer, module).items())
        self.console.print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {text}{rate}", soft_wrap=True)


def is_main_process() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def csv_logger(folder: Path, steps: int) -> CSVLogger:
    """A logger to `folder`/metrics.csv that keeps the first `steps` steps of a run that is being resumed."""
    rows = [
        row for row in read_rows(folder / "metrics.csv") if row.get("step", "").isdigit() and int(row["step"]) < steps
    ]
    logger = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    if is_main_process():
        logger.experiment.metrics = [{k: v for k, v in row.items() if v != ""} for row in rows]
        logger.save()
    return logger
