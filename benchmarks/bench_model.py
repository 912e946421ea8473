"""Times whole networks: ours against the same network of torch's own layers, inference and training step.

"ours" is `alexnet_cuda.AlexNet`, or what `accelerate` makes of torchvision/NAME (with random weights); "eager" a copy
with torch.nn's layers; "compile" that copy and "ours compile" ours, under torch.compile (--compile); on the CPU
"onnxruntime" and "openvino" if they are installed (AlexNets, inference; with autocast "openvino bfloat16"), and
"keras", the network of the Keras tutorials on TensorFlow (training, three variants); on CUDA "graph" is a captured CUDA
graph, and cudnn.benchmark is on for every form. "ours with epilogues" is ours with ReLU in the epilogue of cuDNN's
convolutions and cuBLASLt's products (inference on CUDA): not in the package before it has won on a GPU.

inference: model.eval() under no_grad. training: forward, cross-entropy, backward and a step of SGD with momentum and
weight decay (torch's fused one), dropout on. The weights are float32; --dtype tf32 allows TF32 (CUDA), and autocast
computes in bfloat16.
"""

import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import common
import timing
import torch
import torch.nn.functional as F
from common import LAYOUTS
from keras_nets import keras_training_step
from runtimes import runtimes
from timing import Form
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from alexnet_cuda import AlexNet, accelerate, fusion, list_variants
from alexnet_cuda import nn as layers
from alexnet_cuda.ops.conv2d import autocast as cast


def network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """This package's network of that name, and the shape of an image for it."""
    if not name.startswith("torchvision/"):
        model = AlexNet(name)
        return model, (model.in_channels, *[model.variant.input_size] * 2)
    from alexnet_cuda.networks import build
    from alexnet_cuda.recipe import Recipe

    return accelerate(build(Recipe(variant=name), 1000), inplace=True), (3, 224, 224)


def stock(model: nn.Module) -> nn.Module:
    """A copy made of torch.nn's layers: the inverse of `accelerate`."""
    model = copy.deepcopy(model)
    if isinstance(model, AlexNet):
        model.fused = False
    for module in model.modules():
        if isinstance(module, layers.LocalResponseNorm):
            if module.groups != 1 or module.across != "channels" or module.window != "torch":
                raise ValueError(f"stock: torch.nn has no form of {module}, in {model.extra_repr()}")
            if not module.divide_alpha:
                module.alpha *= module.size
            module.__class__ = nn.LocalResponseNorm  # type: ignore[assignment]
        elif isinstance(module, layers.MaxPool2d):
            module.__class__ = nn.MaxPool2d  # type: ignore[assignment]
        elif isinstance(module, layers.Conv2d):
            if module.ceil_mode:
                module.register_forward_pre_hook(_pad)
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
    return model


class WithEpilogues(nn.Module):
    """The network, with torch's operators for convolution + ReLU (cuDNN's; AlexNet's first layer stays ours) and for
    linear layer + ReLU (cuBLASLt's)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        with patch.dict(fusion.PATTERNS, {("conv", "relu"): _conv2d_relu, ("linear", "relu"): _linear_relu}):
            return self.network(x)


def _conv2d_relu(x: Tensor, modules: dict[str, Any], scale: float) -> Tensor:
    conv = modules["conv"]
    if conv.kernel_size == (11, 11):
        return fusion._conv2d(x, modules, scale)
    x, weight, bias = cast(x, conv.weight * scale if scale != 1 else conv.weight, conv.bias)
    return torch.cudnn_convolution_relu(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _linear_relu(x: Tensor, modules: dict[str, Any], scale: float) -> Tensor:
    layer = modules["linear"]
    return torch._addmm_activation(layer.bias, x, layer.weight.t())


def has_keras_network(model: Any) -> bool:
    """Variants that began as networks of Keras, where TensorFlow is installed."""
    names = ("keras_mnist", "flowers_bn", "ungrouped")
    return isinstance(model, AlexNet) and model.variant.name in names and bool(importlib.util.find_spec("tensorflow"))


def _pad(conv: Any, inputs: tuple[Tensor]) -> Tensor:
    """Zeros at the right and bottom edge, so that the output size is rounded up."""
    over = [-(inputs[0].shape[d] + 2 * int(conv.padding[d]) - conv.kernel_size[d]) % conv.stride[d] for d in (-2, -1)]
    return F.pad(inputs[0], (0, over[1], 0, over[0]))


def training_step(model: Callable[[Tensor], Tensor], parameters: list[Any], x: Tensor, target: Tensor) -> Callable:
    """The learning rate is so small that the weights hardly move while they are measured."""
    optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, weight_decay=5e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), target).backward()
        optimizer.step()

    return step


def forms(model: nn.Module, x: Tensor, layouts: list[str], training: bool, dtype: str, modes: list[str]
          ) -> Iterator[Form]:  # fmt: skip
    cuda, settings, autocast = x.is_cuda, {"benchmark": x.is_cuda, "tf32": dtype == "tf32"}, dtype == "autocast"
    target = torch.randint(10, x.shape[:1], device=x.device)  # no network has fewer classes
    networks = {"ours": model}
    try:
        networks["eager"] = stock(model)
    except ValueError as error:
        common.console.print(str(error), markup=False)
    wanted = [*product(networks, ["", *modes])]
    if cuda and not training:
        networks["ours with epilogues"] = WithEpilogues(model)
        wanted.append(("ours with epilogues", ""))
    for layout in layouts:
        data = x.contiguous(memory_format=LAYOUTS[layout])
        for base, mode in wanted:
            name = f"{base} compile {mode}".removeprefix("eager ") if mode else base
            network = copy.deepcopy(networks[base]).to(memory_format=LAYOUTS[layout]).train(training)
            parameters = list(network.parameters())
            call: Any = torch.compile(network, mode=mode, dynamic=False) if mode else network
            if autocast:
                call = torch.autocast(x.device.type, torch.bfloat16)(call)
            run = training_step(call, parameters, data, target) if training else partial(torch.no_grad()(call), data)
            forward = partial(call, data) if training and not mode else None
            yield Form(name, layout, run, forward, settings, timing.sees_memory(mode, cuda), parameters)
            if cuda and not mode:
                yield Form(f"{name} graph", layout, timing.graphed(run), None, settings, memory=False)
        if training and layout == "contiguous" and not (cuda or autocast) and has_keras_network(model):
            yield Form("keras", layout, keras_training_step(model.variant, len(x)), memory=False)
        peer = networks.get("eager")
        if isinstance(peer, AlexNet) and not (cuda or training) and layout == "contiguous" and not any(
            isinstance(m, nn.AdaptiveAvgPool2d | nn.BatchNorm2d) for m in peer.modules()
        ):  # fmt: skip
            for name, run in runtimes(model, data, autocast).items():
                yield Form(name, layout, run, memory=False)


def main(arguments: list[str] | None = None) -> int:
    flags = common.parser(__doc__)
    flags.add_argument(
        "--variants", nargs="+", default=["paper"], help=f"{', '.join(list_variants())}, torchvision/NAME"
    )
    flags.add_argument("--dtype", nargs="+", choices=("float32", "tf32", "autocast"), default=None,
                       help="none: float32 on the CPU, autocast (to bfloat16) on CUDA")  # fmt: skip
    flags.set_defaults(budget=20.0)
    args = flags.parse_args(arguments)
    unknown = {v for v in args.variants if not v.startswith("torchvision/")} - set(list_variants())
    if unknown:
        flags.error(f"--variants: expected {', '.join(list_variants())} or torchvision/NAME, got {', '.join(unknown)}")
    timer, ceilings = timing.start(flags, args, "autocast")
    cases = {
        f"{variant} batch {batch} {dtype} {kind}": (variant, dtype, batch, kind)
        for variant, dtype, batch, kind in product(
            args.variants, args.dtype, args.batch or ([256] if timer.cuda else [1, 32]), args.passes
        )
    }

    def prepare(variant: str, dtype: str, batch: int, kind: str) -> tuple[dict, Iterator[Form]]:
        (model, shape), training = network(variant), kind == "training"
        x = torch.randn(batch, *shape, device=args.device)
        case = {"case": variant, "shape": list(shape), "pass": kind, "dtype": dtype, "batch": batch,
                "flops": batch * flops(model, shape, training)}  # fmt: skip
        return case, forms(model.to(args.device), x, args.layouts, training, dtype, args.compile)

    return timing.run("model", cases, prepare, timer, args, ceilings)


def flops(model: nn.Module, shape: tuple[int, ...], training: bool) -> int:
    """Of the convolutions and linear layers, per image. Training takes three times as many, without the gradient of
    the image, which the first layer need not compute."""
    model = copy.deepcopy(model).to("meta").eval()
    model.fused = False  # every layer is counted under its own name
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *shape, device="meta"))
    if not training:
        return counter.get_total_flops()
    first = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    counts = counter.get_flop_counts()[f"{type(model).__name__}.{first}"]
    return 3 * counter.get_total_flops() - sum(counts.values())


if __name__ == "__main__":
    sys.exit(main())
