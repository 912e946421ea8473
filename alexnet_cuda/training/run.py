"""One training run from recipe to run folder."""

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
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

from ..data import DataError, ImageSet, write_text
from ..data.module import ImageData
from .callbacks import AtomicCheckpointIO, Bar, Lines, ModelCheckpoint, Stop, Stopped, csv_logger, is_main_process
from .classifier import Classifier
from .evaluation import Predictions, device_name, figures, predict, save_weights, versions
from .recipe import Recipe, RecipeError


def run_folder(recipe: Recipe) -> Path:
    """The folder a run writes to: `recipe.output`, or runs/NAME-TIME, the same for all processes of a run."""
    if recipe.output:
        return Path(recipe.output)
    if "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_PROCID" in os.environ:
        raise RecipeError("--output DIR is needed where a launcher starts the processes: all must write to one folder")
    default = f"runs/{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path(os.environ.setdefault("ALEXNET_CUDA_RUN_FOLDER", default))


@dataclass
class Outcome:
    """How training ended ("finished", "max_steps", "signal") and after how much; `main` in the process that reports."""

    ended: str
    module: Classifier
    epochs: int
    steps: int
    seconds: float
    main: bool


def train(recipe: Recipe, images: ImageSet, folder: Path, console: Console, resume: Path | None = None) -> Outcome:
    """Trains as the recipe says, going on from the checkpoint `resume` where one is given.

    Leaves config.yaml, metrics.csv, tensorboard/, checkpoints/last.ckpt and checkpoints/best.ckpt in `folder`. Raises
    Diverged when the loss is no number, and OSError when the disk is full; the earlier checkpoints are intact then.
    """
    _quiet()
    main = is_main_process()
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    if main:
        write_text(folder / "config.yaml", recipe.to_yaml())
        for part in checkpoints.glob(".*.ckpt"):  # what a kill in the middle of writing left behind
            part.unlink()
    lightning.seed_everything(recipe.seed, workers=True, verbose=False)
    module = Classifier(recipe, len(images.classes))
    data = ImageData(images, recipe)
    steps = read_checkpoint(resume)["global_step"] if resume else 0
    stop = Stop(checkpoints / "last.ckpt", recipe.max_steps)
    kept = [ModelCheckpoint(checkpoints, "last", enable_version_counter=False)]
    if recipe.monitor != "none":
        mode = "min" if recipe.monitor == "val/loss" else "max"
        kept.insert(0, ModelCheckpoint(checkpoints, "best", recipe.monitor, mode=mode, enable_version_counter=False))
    bar = Bar(leave=True) if console.is_terminal else Lines(console)
    try:
        trainer = new_trainer(
            recipe,
            devices=_devices(recipe),
            num_nodes=recipe.nodes,
            max_epochs=recipe.epochs,
            sync_batchnorm=torch.cuda.is_available(),
            log_every_n_steps=max(1, min(10, len(images.train.labels) // recipe.batch_size // 10)),
            enable_progress_bar=console.is_terminal,
            logger=[csv_logger(folder, steps), TensorBoardLogger(folder, "tensorboard", "")],
            plugins=[AtomicCheckpointIO()],
            # The average comes before what writes checkpoints.
            callbacks=[*averaging(recipe), stop, bar, LearningRateMonitor("step"), *kept],
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise RecipeError(f"no trainer for these devices: {error}") from error
    ended = "finished"
    try:
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    except Stopped as stopped:
        ended = stopped.reason
    epochs, steps = trainer.fit_loop.epoch_progress.current.completed, trainer.global_step
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return Outcome(ended, module, epochs, steps, stop.seconds, main)


def new_trainer(recipe: Recipe, **options: Any) -> lightning.Trainer:
    """A Trainer with the settings that every training on a recipe shares."""
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
    # torch would fill all new memory, to make reads of it repeatable; no operator here reads what it has not written.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
    return trainer


def averaging(recipe: Recipe) -> list[Callback]:
    """The moving average of the weights, where the recipe has one."""
    return [EMAWeightAveraging(decay=recipe.ema)] if recipe.ema else []


def finish(recipe: Recipe, images: ImageSet, folder: Path, outcome: Outcome) -> tuple[dict, Predictions]:
    """Takes the best epoch's weights, tests them, and leaves weights.safetensors and metrics.json in `folder`.

    A run stopped before its first validation, or one that monitors nothing, is tested with the last weights.
    """
    best, last = folder / "checkpoints" / "best.ckpt", folder / "checkpoints" / "last.ckpt"
    outcome.module.load_state_dict(read_checkpoint(best if best.exists() else last)["state_dict"])
    model = outcome.module.model.float()
    save_weights(folder / "weights.safetensors", model, recipe, images.classes)
    predictions = predict(model, images, recipe)
    metrics = {
        "recipe": recipe.name,
        "variant": recipe.variant,
        "parameters": sum(p.numel() for p in model.parameters()),
        **figures(predictions),
        "weights": "best epoch by " + recipe.monitor if best.exists() else "last step",
        "epochs": outcome.epochs,
        "steps": outcome.steps,
        "seconds": round(outcome.seconds, 2),
        "images": {name: sum(counts) for name, counts in images.counts().items()},
        "precision": precision(recipe),
        "seed": recipe.seed,
        "device": device_name(),
        "versions": versions(),
    }
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics, predictions


def read_checkpoint(path: Path) -> dict:
    """A checkpoint's tensors and numbers; nothing else is unpickled. DataError where the file is no checkpoint."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["state_dict"], checkpoint["global_step"]
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except Exception as error:  # torch.load raises a different type for every kind of damage
        raise DataError(f"{path} is not a checkpoint of a training run: {str(error).splitlines()[0]}") from error
    return checkpoint


def precision(recipe: Recipe) -> str:
    """`recipe.precision`; for "auto" bf16-mixed on hardware that multiplies bfloat16, else 32-true."""
    if recipe.precision != "auto":
        return recipe.precision
    if recipe.accelerator != "cpu" and torch.cuda.is_available():
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        able = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bf16-mixed" if able else "32-true"


def _devices(recipe: Recipe) -> str | int | list[int]:
    text = recipe.devices
    try:
        devices = [int(d) for d in text.split(",")] if "," in text else text if text == "auto" else int(text)
    except ValueError:
        raise RecipeError(f"devices must be auto, a number or a list such as 0,2, got {text!r}") from None
    on_cpu = recipe.accelerator == "cpu" or (recipe.accelerator == "auto" and not torch.cuda.is_available())
    if on_cpu and isinstance(devices, int) and devices > (os.cpu_count() or 1):
        raise RecipeError(f"devices must be at most the number of CPU cores here, {os.cpu_count()}, got {devices}")
    return devices


def _quiet() -> None:
    """Lightning's advice to developers is of no use to those who run a finished program."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
