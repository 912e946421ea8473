"""Tensors of a file put into a network: what fits is copied, what does not is told."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .errors import DataError
from .model import AlexNet
from .variants import Conv, Init, Linear

WRAPPERS = ("module", "_orig_mod")
AVERAGE = re.compile(r"(^|_)(ema|swa|averaged?)(_|$)")  # of the weights, in a name
SHOWN = 20  # lines of a table


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


class Misfit(NamedTuple):
    """A tensor that was not copied: its name, its shape in the file and in the network ("-" where it is not there), and
    the reason."""

    name: str
    file: str
    network: str
    reason: str


@dataclass
class Fit:
    """The tensors of `source` that fit a network, those that do not, and what else there is to say."""

    loaded: dict[str, Tensor]
    misfits: list[Misfit]
    notes: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)  # names of tensors that belong to something beside the network
    source: str = "the file"

    def table(self) -> str:
        """The tensors that were not copied, a line each."""
        rows = [("tensor", "in the file", "wanted", "reason"), *self.misfits]
        widths = [max(len(row[i]) for row in rows[: SHOWN + 1]) for i in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        more = [f"and {len(self.misfits) - SHOWN} more"] if len(self.misfits) > SHOWN else []
        return "\n".join(f"  {line}" for line in [*lines[: SHOWN + 1], *more])

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded", *self.notes]
        if self.unused:
            lines.append(f"passed over: {len(self.unused)} tensors beside the network, as {self.unused[0]}")
        return "; ".join(lines) + (f"; not loaded:\n{self.table()}" if self.misfits else "")


def fill(model: nn.Module, fit: Fit) -> Fit:
    """Copies the tensors that fit into the network for which they were compared."""
    model.load_state_dict(fit.loaded, strict=False)
    if fresh := untrained(model, list(fit.loaded)):
        fit.notes.append(untrained_note(fresh))
    return fit


def compare(
    model: nn.Module, tensors: Mapping[str, Tensor], known: Sequence[str] = (), classes: Sequence[str] | None = None
) -> Fit:
    """What fits of `tensors` into `model`.

    classes: names of the model's classes; its last layer then keeps its values, except in the rows of those that are
        among `known`, the names of the file's classes. None: the last layer is like the others.
    """
    state, last = model.state_dict(), f"{parameter_layers(model)[-1][0]}."
    tensors, unused = renamed(tensors, list(state))
    if classes is not None:
        head = {name: tensors.pop(name) for name in list(tensors) if name.startswith(last)}
        rows, notes = _matching_rows(head, last, known, classes)
        for name in head if rows else ():
            merged = state[name].clone()
            for row, known_row in rows:
                merged[row] = head[name][known_row].to(merged)
            tensors[name] = merged
        state = {name: own for name, own in state.items() if rows or not name.startswith(last)}
    else:
        notes = []
    misfits = []
    for name, own in state.items():
        theirs = tensors.get(name)
        if theirs is None and not name.endswith(".num_batches_tracked"):  # which older files lack
            misfits.append(Misfit(name, "-", _shape(own), "not in the file"))
        elif theirs is not None and theirs.shape != own.shape:
            misfits.append(Misfit(name, _shape(theirs), _shape(own), "another shape"))
        elif theirs is not None and own.is_floating_point() and (reason := _unusable(theirs, own)):
            misfits.append(Misfit(name, _shape(theirs), _shape(own), reason))
    misfits += [Misfit(n, _shape(t), "-", "not in the network") for n, t in tensors.items() if n not in state]
    refused = {misfit.name for misfit in misfits}
    return Fit(
        {name: tensors[name] for name in state if name in tensors and name not in refused}, misfits, notes, unused
    )


def _unusable(tensor: Tensor, own: Tensor) -> str:
    """Why the values of a tensor are no weights; "" where they are."""
    if tensor.is_meta:
        return "" if own.is_meta else "no values"
    if not tensor.is_floating_point():
        return "complex numbers" if tensor.is_complex() else "integers, not weights"
    return "" if tensor.isfinite().all() else "NaN or infinite values"


def _matching_rows(
    head: Mapping[str, Tensor], last: str, known: Sequence[str], classes: Sequence[str]
) -> tuple[list[tuple[int, int]], list[str]]:
    """The rows of the last layer that are kept, as (row of the model, row of the file), and a note on it."""
    weight = head.get(f"{last}weight")
    if weight is None or len(weight) != len(known):
        return [], ["the last layer is new, since the file does not name its classes"]
    number = {name.casefold(): row for row, name in enumerate(known)}
    rows = [(own, number[name.casefold()]) for own, name in enumerate(classes) if name.casefold() in number]
    if not rows:
        return [], ["the last layer is new, since the file has other classes"]
    new = [name for name in classes if name.casefold() not in number]
    listed = f"; new are {', '.join(new[:10])}{' and others' if len(new) > 10 else ''}" if new else ""
    return rows, [f"the last layer keeps its rows for {len(rows)} of {len(classes)} classes{listed}"]


def renamed(tensors: Mapping[str, Tensor], names: Sequence[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the names of a network, where wrappers have put words before or between them: "module." and
    "_orig_mod." of DataParallel and torch.compile anywhere, and others, such as "model.", at the beginning; and the
    names of all others. An average of the weights goes before the weights. Raises DataError where two networks fit."""
    plain = {".".join(part for part in name.split(".") if part not in WRAPPERS): t for name, t in tensors.items()}
    dots = {name[: i + 1] for name in plain for i, letter in enumerate(name) if letter == "."}
    fitting = {start: sum(start + name in plain for name in names) for start in sorted({"", *dots})}
    equal = [start for start, number in fitting.items() if number == max(fitting.values())]
    best, *others = [start for start in equal if AVERAGE.search(start.rstrip(".").rpartition(".")[2])] or equal
    if others and fitting[best] == len(names):
        raise DataError(f"the file holds several networks ({', '.join(equal)}); save one of them alone")
    inside = {name.removeprefix(best): tensor for name, tensor in plain.items() if name.startswith(best)}
    return inside, [name for name in plain if not name.startswith(best)]


def parameter_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules with parameters of their own, in the order of definition; the last computes the scores."""
    return [(name, module) for name, module in model.named_modules() if module._parameters]


def untrained(model: nn.Module, loaded: Sequence[str]) -> list[str]:
    """The layers of an AlexNet, among those with `loaded` tensors, whose values are as they were drawn.

    The weights have the deviation and bounds of the variant's initialisation, or of torch's, and the biases are its
    constant; normalisation has seen no batch. A convolution without biases counts with the normalisation after it.
    """
    if not isinstance(model, AlexNet):
        return []
    specs = [*model.variant.features, *model.variant.classifier]
    inits = iter([spec.init for spec in specs if isinstance(spec, Conv | Linear)])
    fresh: list[str] = []
    waiting = ""  # a convolution without biases
    for name, module in parameter_layers(model):
        if isinstance(module, nn.Conv2d | nn.Linear):
            drawn = f"{name}.weight" in loaded and any(_is_drawn(module, init) for init in (next(inits), Init()))
            waiting = name if drawn and module.bias is None else ""
            fresh += [name] if drawn and module.bias is not None else []
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            fresh_state = type(module)(module.num_features).state_dict()
            same = all(torch.equal(fresh_state[key], value.cpu()) for key, value in module.state_dict().items())
            if f"{name}.weight" in loaded and same:
                fresh += [waiting, name] if waiting else [name]
            waiting = ""
    return fresh


def untrained_note(layers: Sequence[str]) -> str:
    return f"{', '.join(layers)} look untrained: their values are as random initialisation leaves them"


@torch.no_grad()
def _is_drawn(module: nn.Conv2d | nn.Linear, init: Init) -> bool:
    weight, bias = module.weight.float(), module.bias
    fan_in = weight[0].numel()
    field = weight[0, 0].numel()
    fan_out = weight.shape[0] * field
    he = math.sqrt(2 / fan_in)
    limit = {"torch": fan_in**-0.5, "xavier_uniform": math.sqrt(6 / (fan_in + fan_out)),
             "truncated_normal": 2 * init.std}.get(init.weight, math.inf)  # fmt: skip
    std = {"torch": limit / 3**0.5, "xavier_uniform": limit / 3**0.5, "truncated_normal": 0.8796 * init.std,
           "kaiming_normal": he, "dirac": he}.get(init.weight, init.std)  # fmt: skip
    if init.weight == "dirac":  # which sets these filters, and draws the others
        identity = weight[: weight.shape[1]]
        if not torch.equal(identity, nn.init.dirac_(torch.empty_like(identity))):
            return False
        weight = weight[len(identity) :]
    if len(weight):
        spread = 5 / math.sqrt(2 * weight.numel())  # five standard errors of a measured deviation
        measured = weight.square().mean().sqrt().item()
        if abs(measured / std - 1) > spread + 2e-3 or weight.abs().max() > limit * 1.001:
            return False
    if bias is None:
        return True
    return bool((bias.abs() <= limit * 1.001).all() if init.weight == "torch" else (bias == bias[0]).all())
