"""AlexNet as a LightningModule: the loss, what is logged, the optimiser and its schedule."""

import math

import lightning
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor

from ..model import AlexNet
from .recipe import Recipe


class Diverged(Exception):
    """The loss is no longer a number."""


class Classifier(lightning.LightningModule):
    """Trains `AlexNet(recipe.variant)` on batches of images (N, C, H, W) and labels (N,).

    Dropout is drawn from a generator seeded by (seed, step, process), so that a resumed run needs no generator state.
    """

    def __init__(self, recipe: Recipe, classes: int):
        super().__init__()
        self.recipe = recipe
        self.model = build(recipe, classes)
        self.train_metrics, self.val_metrics = _metrics("train", classes), _metrics("val", classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        torch.manual_seed(hash((self.recipe.seed, self.global_step, self.global_rank)) % 2**63)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, labels = batch
        logits = self(x)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        if not torch.isfinite(loss):
            where = f"step {self.global_step} (epoch {self.current_epoch + 1}, batch {batch_idx + 1})"
            raise Diverged(f"the loss is {loss.item()} at {where}")
        self._log("train", logits, labels, loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, labels = batch
        logits = self(x)
        self._log("val", logits, labels, F.cross_entropy(logits, labels, reduction="none"))

    def _log(self, part: str, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        metrics = self.train_metrics if part == "train" else self.val_metrics
        metrics[f"{part}/accuracy"].update(logits, labels)
        metrics[f"{part}/loss"].update(loss.detach(), weight=1 if loss.dim() else len(labels))
        self.log_dict(dict(metrics.items()), on_step=False, on_epoch=True, prog_bar=True)

    def configure_optimizers(self):
        r = self.recipe
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [
            {"params": matrices, "name": "weights", "weight_decay": r.weight_decay},
            {"params": vectors, "name": "biases", "weight_decay": 0.0},
        ]
        if r.opt == "sgd":
            optimiser = torch.optim.SGD(groups, r.lr, momentum=r.momentum)
        else:
            optimiser = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[r.opt](groups, r.lr)
        total = len(self.trainer.datamodule.train_dataloader()) * self.trainer.max_epochs
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(r, step, total))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}


def build(recipe: Recipe, classes: int) -> AlexNet:
    """The network of a recipe, in the memory format that is faster on every device."""
    model = AlexNet(recipe.variant, classes, recipe.channels, recipe.dropout)
    return model.to(memory_format=torch.channels_last)


def _metrics(part: str, classes: int) -> torchmetrics.MetricCollection:
    accuracy = torchmetrics.classification.MulticlassAccuracy(classes, average="micro")
    return torchmetrics.MetricCollection({f"{part}/accuracy": accuracy, f"{part}/loss": torchmetrics.MeanMetric()})


def rate(recipe: Recipe, step: int, total: int) -> float:
    """The learning rate of a step as a share of `recipe.lr`: a linear rise, then the schedule over what is left."""
    rise = round(recipe.warmup * total)
    if step < rise:
        return (step + 1) / (rise + 1)
    done = min(1.0, (step - rise) / max(1, total - rise))
    if recipe.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if recipe.schedule == "step":
        return 0.1 ** sum(step >= m * total for m in recipe.milestones)
    return 1.0
