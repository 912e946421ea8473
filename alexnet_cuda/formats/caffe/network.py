"""A Caffe network as a torch module: layers by name, blobs routed by their bottoms and tops."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import fspath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import fusion
from ..._torch_private import transforms_active
from ...accelerate import accelerate
from . import parameters
from .files import Layer, Source, read_caffemodel, read_network
from .inputs import input_shapes
from .layers import BOTTOMS, INPUTS, LAYERS, LEFT_OUT, Shape, Spec, flattening

Blobs = dict[str, list[np.ndarray]]


@dataclass
class Step:
    """Modules that run one after the other, by name; the blobs that they take and make, and those that nothing needs
    afterwards."""

    modules: list[str]
    bottoms: list[str]
    tops: list[str]
    dead: list[str]


class CaffeNet(nn.Module):
    """A network of Caffe: its input blobs to its output blob, or to {name: blob} where it has several outputs.

    A layer is the submodule of its Caffe name: `net.conv1`, and `state_dict()` has "conv1.weight" ("." becomes "_", and
    a name that is taken gets a "_" behind it). `net.layer(name)` finds every layer. Images are what Caffe's network
    takes, usually BGR, 0..255 minus a mean. The number of images is free, and so is their size as far as the layers
    allow.

    Attributes:
        name: the network's name.
        inputs, outputs: names of the input and output blobs.
        input_shapes: the shape of each input in the file; None where the file does not tell.
        output_shapes: the shape of each output for such inputs.
        layers: {layer: (type, bottoms, tops)} in the order of execution.

    Raises: ValueError for the wrong number of inputs; torch's errors for a wrong shape.
    """

    def __init__(self, name: str, layers: Sequence[Layer], weights: Blobs | None = None, training: bool = False):
        super().__init__()
        self.name = name
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self.input_shapes: list[Shape | None] = []
        self.output_shapes: list[Shape | None] = []
        self.layers: dict[str, tuple[str, list[str], list[str]]] = {}
        self._steps: list[Step] = []
        self._names: dict[str, str] = {}  # of the modules, by layer
        shapes: dict[str, Shape | None] = {}
        sources: dict[str, Shape | None] = {}
        unused: dict[str, None] = {}  # blobs that no layer has taken yet, in order
        for layer in layers:
            message = layer.message
            if message.type in INPUTS:
                sources |= (given := input_shapes(message, layers, weights or {}))
                shapes |= given
            elif message.type not in LEFT_OUT:
                with _naming(layer):
                    self._add(message, shapes, weights, training)
                for blob in message.bottom:
                    unused.pop(blob, None)
                unused |= dict.fromkeys(message.top)
            elif message.type == "Silence":
                for blob in message.bottom:
                    unused.pop(blob, None)
        if not self._steps:
            raise ValueError(f"the network {name} has no layers that compute anything in this phase")
        taken = {blob for step in self._steps for blob in step.bottoms}
        self.inputs = [blob for blob in sources if blob in taken]
        self.input_shapes = [sources[blob] for blob in self.inputs]
        self.outputs = list(unused)
        self.output_shapes = [shapes[blob] for blob in self.outputs]
        self._plan = _plan(self._steps, self.outputs)

    def _add(self, message: Any, shapes: dict[str, Shape | None], weights: Blobs | None, training: bool) -> None:
        """Makes the modules of a layer, on the device `meta`, and notes the shapes of its tops."""
        if message.type not in LAYERS:
            raise ValueError(f"this type of layer is not known; known are {', '.join([*INPUTS, *LAYERS, *LEFT_OUT])}")
        bottoms, tops = list(message.bottom), list(message.top)
        if missing := [blob for blob in bottoms if blob not in shapes]:
            raise ValueError(f"no layer before it makes its bottom {missing[0]}")
        if len(bottoms) not in BOTTOMS.get(message.type, (1,)) or not tops:
            raise ValueError(f"this type does not take {len(bottoms)} bottoms and {len(tops)} tops")
        blobs = weights.get(message.name) if weights else None
        spec = Spec(message, [shapes[blob] for blob in bottoms], blobs, training)
        with torch.device("meta"), torch.no_grad():
            module = LAYERS[message.type](spec).eval()
            before = flattening(spec) if message.type == "InnerProduct" else None
            values: Any = None
            if None not in spec.shapes:
                values = [torch.empty(shape) for shape in spec.shapes if shape is not None]
                values = module(*values) if before is None else module(before(*values))
                values = values if isinstance(values, tuple) else (values,)
                if len(values) != len(tops):
                    raise ValueError(f"expected {len(values)} tops, got {len(tops)}")
        shapes |= {top: tuple(values[i].shape) if values else None for i, top in enumerate(tops)}
        names = [self._register(f"{message.name}/flatten", before)] if before else []
        names.append(self._register(message.name, module))
        name = message.name
        while name in self.layers:
            if parameters.targets(module):
                raise ValueError("another layer has this name, so that its weights cannot be found")
            name += "_"
        self._names[name] = names[-1]
        self._steps.append(Step(names, bottoms, tops, []))
        self.layers[name] = message.type, bottoms, tops

    def _register(self, name: str, module: nn.Module) -> str:
        name = name.replace(".", "_") or "_"
        while hasattr(self, name):
            name += "_"
        self.add_module(name, module)
        return name

    def layer(self, name: str) -> nn.Module:
        """The module of a layer. Raises KeyError if there is no such layer."""
        return self.get_submodule(self._names[name])

    def forward(self, x: Tensor, *others: Tensor) -> Tensor | dict[str, Tensor]:
        """The input blobs, in the order of `inputs`, to the output or {name: output}."""
        blobs = self._named((x, *others))
        for step in self._plan:
            blobs |= self._run(step, blobs)
            for blob in step.dead:
                del blobs[blob]
        return blobs[self.outputs[0]] if len(self.outputs) == 1 else {blob: blobs[blob] for blob in self.outputs}

    def blobs(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Every blob of the network by its name, as pycaffe's `net.blobs`; a blob that is changed in place has its last
        value."""
        blobs = self._named(inputs)
        for step in self._steps:
            blobs |= self._run(step, blobs)
        return blobs

    def _run(self, step: Step, blobs: dict[str, Tensor]) -> dict[str, Tensor]:
        modules = [self.get_submodule(name) for name in step.modules]
        bottoms = [blobs[blob] for blob in step.bottoms]
        if len(bottoms) == len(step.tops) == 1:
            return {step.tops[0]: fusion.run(modules, bottoms[0])}
        tops = modules[0](*bottoms)
        return dict(zip(step.tops, tops if isinstance(tops, tuple) else (tops,)))

    def _named(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """The inputs by name; images on a CPU in channels_last, in which its convolutions are faster."""
        if len(inputs) != len(self.inputs):
            expected = f"expected {len(self.inputs)} inputs ({', '.join(self.inputs)})"
            raise ValueError(f"{self.name or 'CaffeNet'}: {expected}, got {len(inputs)}")
        last = not transforms_active()
        fast = [x.contiguous(memory_format=torch.channels_last) if last and x.is_cpu and x.dim() == 4 else x
                for x in inputs]  # fmt: skip
        return dict(zip(self.inputs, fast))

    def extra_repr(self) -> str:
        return f"{self.name!r}: {', '.join(self.inputs)} -> {', '.join(self.outputs)}"


def load(
    prototxt: Source, caffemodel: Source | None = None, *, phase: str = "TEST", stages: Sequence[str] = ()
) -> CaffeNet:
    """A feed-forward network of Caffe as a torch module, in evaluation mode, with this package's kernels.

    Equivalent to pycaffe's `caffe.Net(prototxt, caffemodel, caffe.TEST)`. Deploy and train_val files of every age are
    read; layers that compare scores with labels are left out, so that the scores are the outputs. docs/caffe.md lists
    the layers.

        net = alexnet_cuda.caffe.load("deploy.prototxt", "bvlc_googlenet.caffemodel")
        scores = net(torch.randn(8, 3, 224, 224))  # BGR, 0..255 minus the mean

    Args:
        prototxt: the network, a text file.
        caffemodel: its weights (binary, text or HDF5). None: drawn as the layers' fillers say, or as torch does.
        phase: "TEST", or "TRAIN" for the layers that the network has in training; both are modules that train.
        stages: stages of the network to include, such as "deploy".

    Raises: OSError if a file cannot be read; ValueError, with the layer and its line, for a layer that is not known or
        does not fit what it takes, and for layers without weights in the caffemodel.
    """
    if phase not in ("TRAIN", "TEST"):
        raise ValueError(f"load: expected phase to be 'TRAIN' or 'TEST', got {phase!r}")
    net, layers = read_network(prototxt)
    layers = selected(net, layers, phase, stages)
    weights = None if caffemodel is None else read_caffemodel(caffemodel)
    if not any(layer.message.type in INPUTS for layer in layers):
        raise ValueError(f"{fspath(prototxt)} has no input and no Data layer in the phase {phase}")
    return assembled(net.name, layers, weights, phase, fspath(caffemodel or ""))


def assembled(name: str, layers: Sequence[Layer], weights: Blobs | None, phase: str, origin: str) -> CaffeNet:
    """The network of these layers, with `weights` from the file `origin`, or drawn where they are None."""
    net = CaffeNet(name, layers, weights, phase == "TRAIN").to_empty(device="cpu")
    own = [layer for layer in layers if layer.message.name in net.layers]
    blobs = weights or {}
    missing = [layer.message for layer in own if not blobs.get(layer.message.name)]
    lacking = [m.name for m in missing if parameters.targets(net.layer(m.name)) and not parameters.is_fixed(m)]
    if lacking and weights is not None:
        spare = [name for name, blobs in weights.items() if blobs and name not in net.layers] or ["none"]
        others = f"layers in it that the network does not have: {', '.join(spare)}"
        raise ValueError(f"{origin} has no weights for {', '.join(lacking)}; {others}")
    shared: dict[str, nn.Parameter] = {}
    for layer in own:
        message, module = layer.message, net.layer(layer.message.name)
        with _naming(layer):
            if not blobs.get(message.name):
                parameters.draw(module, message)
            elif parameters.targets(module):
                parameters.load(module, blobs[message.name], message.inner_product_param.transpose)
            _share(module, message, shared)
    return accelerate(net.eval(), inplace=True).to(memory_format=torch.channels_last)


def _share(module: nn.Module, message: Any, shared: dict[str, nn.Parameter]) -> None:
    """Makes parameters of the same name (`param { name: "w" }`) one and the same."""
    for target, param in zip(parameters.targets(module), message.param):
        own = getattr(module, target, None)
        if param.name and isinstance(own, nn.Parameter):
            first = shared.setdefault(param.name, own)
            if first.shape != own.shape:
                shapes = f"{tuple(first.shape)} and {tuple(own.shape)}"
                raise ValueError(f"the shared parameter {param.name} has the shapes {shapes}")
            setattr(module, target, first)


def selected(net: Any, layers: Sequence[Layer], phase: str, stages: Sequence[str] = ()) -> list[Layer]:
    """The layers that are part of the network in this phase and these stages."""
    present = {*stages, *net.state.stage}

    def met(rule: Any) -> bool:
        return (
            (not rule.HasField("phase") or rule.phase == ("TRAIN", "TEST").index(phase))
            and (not rule.HasField("min_level") or net.state.level >= rule.min_level)
            and (not rule.HasField("max_level") or net.state.level <= rule.max_level)
            and present.issuperset(rule.stage)
            and present.isdisjoint(rule.not_stage)
        )

    def kept(message: Any) -> bool:
        if message.include:
            return any(map(met, message.include))
        return not any(map(met, message.exclude))

    return [layer for layer in layers if kept(layer.message)]


@contextmanager
def _naming(layer: Layer) -> Iterator[None]:
    """Errors name the layer, its type and its line."""
    try:
        yield
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        name = f"layer {layer.message.name} ({layer.message.type}, {layer.where})"
        raise ValueError(f"{name}: {next(iter(str(error).splitlines()), type(error).__name__)}") from error


def _plan(steps: Sequence[Step], outputs: Sequence[str]) -> list[Step]:
    """The steps with neighbours joined where one takes nothing but what the other makes, so that `fusion` can run them
    as one operator; and with the blobs that are not needed after each."""
    needed = [set(outputs)]  # after each step, from the last
    for step in reversed(steps):
        needed.append((needed[-1] - set(step.tops)) | set(step.bottoms))
    needed = needed[-2::-1]
    plan: list[Step] = []
    for step, after in zip(steps, needed):
        last = plan[-1] if plan else None
        single = len(step.bottoms) == len(step.tops) == 1
        joins = single and last is not None and last.tops == step.bottoms and len(last.bottoms) == 1
        if joins and last and (step.tops == step.bottoms or step.bottoms[0] not in after):
            last.modules, last.tops = [*last.modules, *step.modules], step.tops
            last.dead = _unneeded(last, after)
            continue
        plan.append(Step(list(step.modules), step.bottoms, step.tops, _unneeded(step, after)))
    return plan


def _unneeded(step: Step, needed: set[str]) -> list[str]:
    return [blob for blob in dict.fromkeys((*step.bottoms, *step.tops)) if blob not in needed]
