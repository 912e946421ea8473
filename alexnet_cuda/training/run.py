"""One training run from recipe to run folder."""

import ctypes
import functools
import json
import logging
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..data import ImageSet
from ..data.module import ImageData
from ..errors import DataError, RecipeError, first_line
from ..files import write_text
from ..notes import show_notes
from ..recipe import Recipe
from ..weights import read_checkpoint, save_weights
from . import callbacks
from .classifier import Classifier
from .evaluation import Predictions, device_name, peak_memory, predict, run_facts, versions
from .whitening import whiten


def run_folder(recipe: Recipe) -> Path:
    """The folder of a run: `recipe.output`, or runs/NAME-TIME, the same in all processes of the run."""
    if recipe.output:
        return Path(recipe.output)
    if "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_PROCID" in os.environ:
        raise RecipeError("--output DIR is needed where a launcher starts the processes: all must write to one folder")
    default = f"runs/{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path(os.environ.setdefault("ALEXNET_CUDA_RUN_FOLDER", default))


@dataclass
class Outcome:
    """The end of a training: ended is "finished", "max_steps" or "signal"; best is the checkpoint of the best epoch."""

    ended: str
    module: Classifier
    best: Path | None
    epochs: int
    steps: int
    seconds: float


def train(recipe: Recipe, images: ImageSet, folder: Path, console: Console, resume: Path | None = None) -> Outcome:
    """Trains according to the recipe, from the checkpoint `resume` if one is given. Writes config.yaml, metrics.csv,
    tensorboard/, checkpoints/last.ckpt and checkpoints/best.ckpt to `folder`. Raises Diverged if the loss is not
    finite, and OSError if the disk is full; earlier checkpoints stay intact."""
    checkpoints = folder / "checkpoints"
    steps = read_checkpoint(resume)["global_step"] if resume else 0
    stop = callbacks.StopAndCheckpoint(checkpoints / "last.ckpt", recipe.max_steps)
    keep = functools.partial(callbacks.ModelCheckpoint, checkpoints, enable_version_counter=False)
    mode = "min" if recipe.monitor == "val/loss" else "max"
    best = [keep("best", monitor=recipe.monitor, mode=mode)] if recipe.monitor != "none" else []
    bar = callbacks.ProgressBar(leave=True) if console.is_terminal else callbacks.PlainProgress(console)
    trainer = new_trainer(
        recipe,
        devices=requested_devices(recipe),
        num_nodes=recipe.nodes,
        max_epochs=recipe.epochs,
        sync_batchnorm=torch.cuda.is_available(),
        log_every_n_steps=max(1, min(10, len(images.train.labels) // recipe.batch_size // 10)),
        enable_progress_bar=console.is_terminal,
        logger=False,  # until the network stands: what fails before leaves no run folder
        plugins=[callbacks.AtomicCheckpointIO()],
        # Averaging comes before the callbacks that write checkpoints.
        callbacks=[*Averaging.of(recipe), stop, bar, LearningRateMonitor("step"), *best, keep("last")],
    )
    module, data, ended = Classifier(recipe, images.classes, resume is not None), ImageData(images, recipe), ""
    if module.note:
        show_notes([module.note], console)
    if recipe.whiten and not (recipe.weights or resume):
        first = next((m for m in module.model.modules() if isinstance(m, torch.nn.Conv2d)), None)
        if first is None:
            raise RecipeError(f"whiten needs a convolution, and {recipe.variant} has none")
        whiten(first, data.training_sample())
    checkpoints.mkdir(parents=True, exist_ok=True)
    if callbacks.is_main_process():
        write_text(folder / "config.yaml", recipe.to_yaml())
        for part in checkpoints.glob(".*.ckpt"):  # incomplete files of a process that was killed
            part.unlink()
    trainer.loggers = [callbacks.csv_logger(folder, steps), TensorBoardLogger(folder, "tensorboard", "")]
    try:
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
        ended = "signal" if stop.signal else "finished"  # a signal in the last epoch
    except callbacks.Stopped as stopped:
        ended = str(stopped)
    epochs, steps = trainer.fit_loop.epoch_progress.current.completed, trainer.global_step
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    chosen = Path(best[0].best_model_path) if best and best[0].best_model_path else None
    return Outcome(ended, module, chosen, epochs, steps, stop.seconds)


def new_trainer(recipe: Recipe, **options: Any) -> lightning.Trainer:
    """A Trainer with the settings that all trainings share; the network is made after it, with the recipe's seed."""
    _quiet()
    keep_freed_memory()
    try:
        trainer = lightning.Trainer(
            accelerator=recipe.accelerator,
            precision=cast(Any, precision(recipe)),
            gradient_clip_val=recipe.clip or None,
            deterministic="warn",
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            enable_model_summary=False,
            **options,
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise RecipeError(f"no trainer for these devices: {error}") from error
    # Deterministic mode fills uninitialised memory; no operator here reads memory before it is written.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
    lightning.seed_everything(recipe.seed, workers=True, verbose=False)
    return trainer


def keep_freed_memory() -> None:
    """Tells glibc to keep the memory of freed tensors for the next ones, where it would return it to Linux and get it
    back page by page: a step of cifar10 takes 1.1 to 1.4 times as long without, and 1.15 times the memory with."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def _quiet() -> None:
    """Hides Lightning's messages, whose advice is for developers."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")


def average(decay: float, averages: Any, weights: Any, steps: Any) -> None:
    get_ema_multi_avg_fn(min(decay, (1 + int(steps)) / (10 + int(steps))))(averages, weights, steps)


class Averaging(WeightAveraging):
    """A moving average of the weights. Its decay rises from 2/11 to `recipe.ema`: a short run forgets its start."""

    @classmethod
    def of(cls, recipe: Recipe) -> list[Callback]:
        return [cls(multi_avg_fn=functools.partial(average, recipe.ema))] if recipe.ema else []

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None


def finish(recipe: Recipe, images: ImageSet, folder: Path, outcome: Outcome) -> tuple[dict, Predictions]:
    """Tests the weights of the best epoch and writes weights.safetensors and metrics.json to `folder`. Without a best
    epoch (no validation yet, or recipe.monitor is none) these are the last weights. Then removes best.ckpt: of a run
    that is resumed and finds no better epoch, weights.safetensors are still the best."""
    best, weights = outcome.best, folder / "weights.safetensors"
    if best and not best.exists():
        try:
            outcome.module.model.load_state_dict(load_file(weights))
        except (OSError, SafetensorError) as error:
            last = f"`--resume {folder} --monitor none --allow-changes` takes the last epoch"
            raise DataError(f"{weights}, with the best epoch, cannot be read ({first_line(error)}); {last}") from error
    else:
        outcome.module.load_state_dict(read_checkpoint(best or folder / "checkpoints" / "last.ckpt")["state_dict"])
    model = outcome.module.model.float()
    save_weights(weights, model, recipe, images.classes)
    predictions = predict(model, images, recipe)
    metrics = run_facts(model, recipe, images, predictions) | {
        "weights": "best epoch by " + recipe.monitor if best else "last step",
        "epochs": outcome.epochs,
        "steps": outcome.steps,
        "seconds": round(outcome.seconds, 2),
        "peak_memory_mib": peak_memory(),
        "precision": precision(recipe),
        "seed": recipe.seed,
        "device": device_name(),
        "versions": versions(),
    }
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    if best:
        best.unlink(missing_ok=True)
    return metrics, predictions


def precision(recipe: Recipe) -> str:
    """`recipe.precision`; for "auto" bf16-mixed on GPUs with bfloat16 and on CPUs with AMX, where a step takes 0.4 to
    0.8 times that of float32 (docs/results/README.md), else 32-true: bfloat16 bypasses our float32 convolutions."""
    if recipe.precision != "auto":
        return recipe.precision
    if recipe.accelerator != "cpu" and torch.cuda.is_available():
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities().get("amx_bf16")
    return "bf16-mixed" if able else "32-true"


def requested_devices(recipe: Recipe) -> str | int | list[int]:
    """`recipe.devices` as Lightning takes them; RecipeError where there are fewer."""
    text = recipe.devices
    try:
        devices = [int(d) for d in text.split(",")] if "," in text else text if text == "auto" else int(text)
    except ValueError:
        raise RecipeError(f"devices must be auto, a number or a list such as 0,2, got {text!r}") from None
    if isinstance(devices, int) and devices < 1:
        raise RecipeError(f"devices must be at least 1, got {text}")
    on_cpu = recipe.accelerator == "cpu" or (recipe.accelerator == "auto" and not torch.cuda.is_available())
    if on_cpu and isinstance(devices, int) and devices > (os.cpu_count() or 1):
        raise RecipeError(f"devices must be at most the number of CPU cores here, {os.cpu_count()}, got {devices}")
    asked = max(devices) + 1 if isinstance(devices, list) else devices
    if not on_cpu and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise RecipeError(f"accelerator {recipe.accelerator} needs a GPU, and torch finds none")
    if not on_cpu and isinstance(asked, int) and asked > torch.cuda.device_count():
        raise RecipeError(f"devices {text} are more than the GPUs here, {torch.cuda.device_count()}")
    return devices
