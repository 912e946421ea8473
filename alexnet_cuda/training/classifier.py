"""AlexNet as a LightningModule: the loss, what is logged, frozen layers, the optimiser and its schedule."""

import math
import time
from collections.abc import Sequence
from typing import Any, cast

import lightning
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torchvision.transforms import v2

from ..errors import AlexNetError, RecipeError
from ..matching import Fit, parameter_layers
from ..networks import build
from ..recipe import Recipe
from ..weights import start_from


class Diverged(AlexNetError):
    """The loss is infinite or NaN."""


class Classifier(lightning.LightningModule):
    """Trains `AlexNet(recipe.variant)` on batches of images (N, C, H, W) and labels (N,). Dropout and MixUp are drawn
    from a generator seeded by (seed, step, process), so that a resumed run needs no generator state."""

    note = ""  # how much of recipe.weights fitted the network

    def __init__(self, recipe: Recipe, names: Sequence[str], resumed: bool = False):
        """resumed: a checkpoint will have the weights, so that recipe.weights need not be there any more."""
        super().__init__()
        self.recipe, self.names = recipe, list(names)
        self.began = self.ended = time.monotonic()  # of the epoch's batches, or of those since a run was resumed
        self.seen = 0
        classes = len(names)
        self.model = build(recipe, classes)
        self.frozen = frozen(self.model, recipe)
        if recipe.weights and not resumed:
            fit = start_from(self.model, recipe, names)
            _require_loaded(self.model, self.frozen, fit)
            self.note = str(fit)
        mixes = [mix(alpha=alpha, num_classes=classes) for mix, alpha in
                 ((v2.MixUp, recipe.mixup), (v2.CutMix, recipe.cutmix)) if alpha]  # fmt: skip
        self.mix = v2.RandomChoice(mixes) if mixes else None
        self.train_metrics, self.val_metrics = _metrics("train", classes), _metrics("val", classes)
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.to(next(self.parameters()).dtype))

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        for module in self.frozen:  # batch normalisation would go on collecting statistics
            module.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {"recipe": self.recipe.to_yaml(), "classes": self.names}

    def on_train_start(self) -> None:
        """Puts the recipe's values in place of those in a resumed optimiser's state, which may have changed."""
        schedule = cast(Any, self.lr_schedulers())
        groups = schedule.optimizer.param_groups
        for group, own in zip(groups, parameter_groups(self.model, self.recipe), strict=True):
            if own["lr"] != group["initial_lr"]:
                group["lr"] *= own["lr"] / (group["initial_lr"] or 1.0)
                group["initial_lr"] = own["lr"]
            group["weight_decay"] = own["weight_decay"]
            if self.recipe.opt == "sgd":
                group |= {"momentum": self.recipe.momentum, "nesterov": self.recipe.nesterov}
        if isinstance(schedule, ReduceLROnPlateau):
            schedule.patience = self.recipe.patience
        else:
            schedule.base_lrs = [group["initial_lr"] for group in groups]
            for group, share in zip(groups, schedule.lr_lambdas, strict=True):  # the number of steps may have changed
                group["lr"] = group["initial_lr"] * share(schedule.last_epoch)

    def on_train_epoch_start(self) -> None:
        self.began, self.seen = time.monotonic(), 0

    def on_train_epoch_end(self) -> None:
        seconds = self.ended - self.began  # without validation and checkpoint
        self.log("time/epoch_seconds", seconds)
        self.log("time/images_per_second", self.seen * self.trainer.world_size / max(seconds, 1e-9))

    def on_train_batch_end(self, outputs, batch, batch_idx: int) -> None:
        self.ended = time.monotonic()

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        torch.manual_seed(hash((self.recipe.seed, self.global_step, self.global_rank)) % 2**63)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, labels = batch
        self.seen += len(labels)
        x, target = self.mix(x, labels) if self.mix else (x, labels)
        logits = self(x)
        loss = F.cross_entropy(logits, target, label_smoothing=self.recipe.label_smoothing)
        if not torch.isfinite(loss):
            where = f"step {self.global_step} (epoch {self.current_epoch + 1}, batch {batch_idx + 1})"
            raise Diverged(f"the loss is {loss.item()} at {where}")
        self._log("train", logits, labels, loss)
        self.log("train/step_loss", loss.detach())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, labels = batch
        logits = self(x)
        self._log("val", logits, labels, F.cross_entropy(logits, labels, reduction="none"))

    def on_validation_epoch_end(self) -> None:
        # Lightning would look for a plateau after the epoch's checkpoint, and not at all in a run resumed from it.
        if isinstance(schedule := self.lr_schedulers(), ReduceLROnPlateau):
            schedule.step(self.val_metrics["val/loss"].compute())

    def lr_scheduler_step(self, scheduler, metric) -> None:
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()

    def _log(self, part: str, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        metrics = self.train_metrics if part == "train" else self.val_metrics
        metrics[f"{part}/accuracy"].update(logits, labels)
        metrics[f"{part}/loss"].update(loss.detach(), weight=1 if loss.dim() else len(labels))
        self.log_dict(dict(metrics.items()), on_step=False, on_epoch=True, prog_bar=True)

    def configure_optimizers(self):
        r = self.recipe
        groups = parameter_groups(self.model, r)
        # Lightning cannot clip gradients before a fused step in mixed precision.
        fused = not (r.clip and "mixed" in self.trainer.precision)
        if r.opt == "sgd":
            optimiser = torch.optim.SGD(groups, r.lr, momentum=r.momentum, nesterov=r.nesterov, fused=fused)
        else:
            optimiser = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[r.opt](groups, r.lr, fused=fused)
        if r.schedule == "plateau":
            for group in optimiser.param_groups:
                group["initial_lr"] = group["lr"]  # as the other schedules do
            schedule = {"scheduler": ReduceLROnPlateau(optimiser, patience=r.patience), "monitor": "val/loss"}
        else:
            total = len(self.trainer.datamodule.train_dataloader()) * self.trainer.max_epochs
            schedule = {"scheduler": LambdaLR(optimiser, lambda step: rate(r, step, total)), "interval": "step"}
        return {"optimizer": optimiser, "lr_scheduler": {**schedule, "name": "lr"}}


def _metrics(part: str, classes: int) -> torchmetrics.MetricCollection:
    accuracy = torchmetrics.classification.MulticlassAccuracy(classes, average="micro")
    return torchmetrics.MetricCollection({f"{part}/accuracy": accuracy, f"{part}/loss": torchmetrics.MeanMetric()})


def rate(recipe: Recipe, step: int, total: int) -> float:
    """The learning rate of a step as a share of `recipe.lr`: a linear rise, then the schedule over what is left."""
    rise = round(recipe.warmup * total)
    if step < rise:
        return (step + 1) / (rise + 1)
    done = min(1.0, (step - rise) / max(1, total - rise))
    if recipe.schedule == "linear":
        return 1 - done
    if recipe.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if recipe.schedule == "step":
        return 0.1 ** sum(step >= m * total for m in recipe.milestones)
    return 1.0


def frozen(model: nn.Module, recipe: Recipe) -> list[nn.Module]:
    """Excludes the layers that `recipe.freeze` names from training and returns them."""
    layers = parameter_layers(model)[:-1] if recipe.freeze != "none" else []
    modules = [module for name, module in layers if recipe.freeze == "backbone" or name.startswith("features.")]
    for module in modules:
        module.requires_grad_(False)
    return modules


def _require_loaded(model: nn.Module, modules: Sequence[nn.Module], fit: Fit) -> None:
    """RecipeError where a layer that will not be trained has no weights from the file."""
    names = [f"{name}.weight" for name, module in model.named_modules() if module in modules]
    if lacking := [name for name in names if name not in fit.loaded]:
        raise RecipeError(f"--freeze would leave {lacking[0]} as it was drawn; {fit}")


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Groups of trainable parameters for an optimiser: matrices with weight decay, vectors without, and biases with
    `recipe.bias_lr` times the rate. With `recipe.layer_decay` d < 1 each layer with weights has groups of its own, and
    a layer with k layers behind it has the learning rate lr * d^k. A normalisation layer counts with the layer before
    it."""
    by_layer, depth = recipe.layer_decay < 1, 0
    groups: dict[tuple[int, int], dict] = {}
    for name, module in parameter_layers(model):
        depth += any(p is not None and p.dim() > 1 for p in module._parameters.values())
        for own_name, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                # 0: matrices, 1: vectors, 2: biases with a rate of their own
                kind = 0 if p.dim() > 1 else 2 if own_name == "bias" and recipe.bias_lr != 1 else 1
                label, decay, factor = (("weights", recipe.weight_decay, 1.0), ("vectors", 0.0, 1.0),
                                        ("biases", 0.0, recipe.bias_lr))[kind]  # fmt: skip
                new = {"params": [], "name": f"{name}.{label}" if by_layer else label, "weight_decay": decay}
                groups.setdefault((depth * by_layer, kind), {**new, "lr": recipe.lr * factor})["params"].append(p)
    for (layer, _), group in groups.items():
        group["lr"] *= recipe.layer_decay ** (depth - layer)
    return [groups[key] for key in sorted(groups, key=lambda key: (key[1], -key[0]))]
