"""Times every operator of `alexnet_cuda.ops` against other implementations of the same layers.

Forms of a case are run in turn in one process. "ours" is the operator; "eager" the torch.nn modules; "compile" those
under torch.compile (--compile); "space-to-depth" conv1 as a 3x3 convolution of 48 channels; on the CPU "onnxruntime"
and "openvino" if they are installed; on CUDA also "graph" (a captured CUDA graph), for convolutions "benchmark"
(cudnn.benchmark, on in every form but "eager"), for the first block "ours without wgmma" (elsewhere than on Hopper the
same kernel), and "ours deterministic" (torch.use_deterministic_algorithms). --dtype tf32 is float32 with TF32 allowed,
for every form of the operators with a convolution. In bfloat16 on the CPU, where torch has no LRN, "eager autocast" and
"openvino bfloat16" get float32 and compute in bfloat16 what they can.

inference: the forward pass under no_grad. training: forward and backward; a convolution's image has no gradient, as in
the first layer of a network.
"""

import copy
import math
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import common
import timing
import torch
import torch.nn.functional as F
from common import DTYPES, LAYOUTS
from runtimes import runtimes
from timing import Form
from torch import Tensor, nn

from alexnet_cuda import accelerate, ops

FILTERS, LRN, BLOCKS = 96, (5, 1e-4, 0.75, 2.0), ((96, 55, 55), (256, 27, 27))
OPS: dict[str, tuple[tuple[str, ...], Callable[..., Tensor]]] = {  # its layers; the operator, given (x, weight, bias)
    "local_response_norm": (("lrn",), lambda x: ops.local_response_norm(x, *LRN)),
    "max_pool2d": (("pool",), ops.max_pool2d),
    "relu_lrn_max_pool2d": (("relu", "lrn", "pool"), lambda x: ops.relu_lrn_max_pool2d(x, *LRN)),
    "conv2d_relu_lrn_max_pool2d": (
        ("conv", "relu", "lrn", "pool"),
        lambda x, weight, bias: ops.conv2d_relu_lrn_max_pool2d(x, weight, bias, *LRN),
    ),
    "conv2d": (("conv",), ops.conv2d),
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(3, FILTERS, 11, 4),
    "relu": nn.ReLU,
    "lrn": lambda: nn.LocalResponseNorm(*LRN),
    "pool": lambda: nn.MaxPool2d(3, 2),
}


def shapes(op: str) -> list[tuple[int, int, int]]:
    return [(3, 227, 227)] if op.startswith("conv2d") else list(BLOCKS)


def least_work(op: str, shape: tuple[int, ...], itemsize: int, training: bool) -> tuple[int, int]:
    """(bytes, flops) at least: every input, saved tensor and gradient is read or written once in each pass."""
    n, c, h, w = shape
    conv, pool = op.startswith("conv2d"), op != "conv2d" and op != "local_response_norm"
    x, weight, flops = math.prod(shape) * itemsize, 0, 0
    if conv:
        weight = FILTERS * c * 121 * itemsize
        h, w = (h - 11) // 4 + 1, (w - 11) // 4 + 1
        flops = 2 * n * FILTERS * h * w * c * 121
        c = FILTERS
    y = convolved = n * c * h * w * itemsize
    if pool:
        y = n * c * ((h - 3) // 2 + 1) * ((w - 3) // 2 + 1) * itemsize
    forward = x + weight + y
    if not training:
        return forward, flops
    saved = pool * (y // itemsize + conv * convolved)  # the code of the maxima; what the LRN divides
    reread = 0 if op == "max_pool2d" else x
    gradient = weight if conv else x
    return forward + saved + y + saved + reread + gradient, 2 * flops


def depth_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """conv1 as a 3x3 convolution of 48 channels: 4x4 pixels, of image and weight (as 12x12), become channels."""
    depth = lambda t: F.pixel_unshuffle(F.pad(t, (0, 1, 0, 1)), 4)
    return F.conv2d(depth(x), depth(weight), bias)


def forms(
    op: str, x: Tensor, layouts: list[str], training: bool, modes: list[str], tf32: bool = False
) -> Iterator[Form]:
    layers, ours = OPS[op]
    conv, cuda = "conv" in layers, x.is_cuda
    for layout in layouts:
        single = nn.Sequential(*(LAYERS[layer]() for layer in layers)).to(x.device, memory_format=LAYOUTS[layout])
        stock = copy.deepcopy(single).to(x.dtype)
        parameters = list(stock.parameters())
        data = x.detach().clone(memory_format=LAYOUTS[layout]).requires_grad_(training and not conv)

        def form(name: str, function: Callable, settings: dict[str, bool], data: Tensor = data, layout: str = layout,
                 graph: bool = False, mode: str = "", parameters: list[Any] = parameters) -> Form:  # fmt: skip
            function = partial(function, data)
            run: Callable[[], Any] = torch.no_grad()(function)
            if training:
                run = partial(gradients, function, parameters if conv else [data])
            if graph:
                run = timing.graphed(run)
            forward = function if training and not graph and not mode else None
            memory = not graph and timing.sees_memory(mode, cuda)
            return Form(name, layout, run, forward, settings, memory, parameters)

        call = lambda x, parameters=parameters: ours(x, *parameters)
        settings = {"benchmark": cuda and conv, "tf32": tf32}
        yield form("eager", stock, {"tf32": tf32})
        yield form("ours", call, settings)
        if cuda and conv:
            yield form("eager benchmark", stock, settings)
        if conv:
            depth = lambda x, stock=stock: stock[1:](depth_conv(x, stock[0].weight, stock[0].bias))
            yield form("space-to-depth", depth, settings)
        for mode in modes:
            yield form(f"compile {mode}", torch.compile(stock, mode=mode, dynamic=False), settings, mode=mode)
        if cuda:
            yield form("ours graph", call, settings, graph=True)
            yield form("eager graph", stock, settings, graph=True)
        if cuda and training:
            yield form("ours deterministic", call, settings | {"deterministic": True})
        if cuda and len(layers) == 4:
            yield form("ours without wgmma", call, settings | {"wgmma": False})
        autocast = x.dtype == torch.bfloat16 and op != "max_pool2d"
        if cuda or not (autocast or x.dtype == torch.float32):
            continue
        wide = data.detach().float().requires_grad_(data.requires_grad)
        if autocast:
            inside = torch.autocast("cpu", torch.bfloat16)(single)
            yield form("eager autocast", inside, {}, wide, parameters=list(single.parameters()))
        if not training and layout == "contiguous":
            for name, run in runtimes(accelerate(single), wide, autocast).items():
                yield Form(name, layout, run, memory=False)


def gradients(function: Callable[[], Tensor], leaves: list[Tensor]) -> Any:
    y = function()
    return torch.autograd.grad(y, leaves, gradient_of(y.shape, y.stride(), y.dtype, y.device))


@cache
def gradient_of(shape: tuple, stride: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers, the same at every call."""
    return torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_()


def main(arguments: list[str] | None = None) -> int:
    flags = common.parser(__doc__)
    flags.add_argument("--dtype", nargs="+", choices=DTYPES, help="none: float32 on the CPU, bfloat16 on CUDA")
    flags.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    flags.add_argument("--blocks", type=int, nargs="+", choices=(1, 2), default=[1, 2], help="96x55x55, 256x27x27")
    args = flags.parse_args(arguments)
    timer, ceilings = timing.start(flags, args, "bfloat16")
    wanted = [(op, shape) for op in args.ops for i, shape in enumerate(shapes(op)) if i + 1 in args.blocks]
    cases = {
        f"{op} {batch}x{'x'.join(map(str, shape))} {dtype} {kind}": (batch, dtype, op, shape, kind)
        for batch in args.batch or [256 if timer.cuda else 32] for dtype in args.dtype
        for op, shape in wanted if dtype != "tf32" or op.startswith("conv2d") for kind in args.passes
    }  # fmt: skip

    def prepare(batch: int, dtype: str, op: str, shape: tuple[int, ...], kind: str) -> tuple[dict, Iterator[Form]]:
        gradient_of.cache_clear()
        x = torch.randn(batch, *shape, device=args.device).to(DTYPES[dtype])
        training = kind == "training"
        least, flops = least_work(op, x.shape, x.element_size(), training)
        case = {"case": op, "shape": list(shape), "pass": kind, "dtype": dtype, "batch": batch, "bytes": least,
                "flops": flops}  # fmt: skip
        return case, forms(op, x, args.layouts, training, args.compile, dtype == "tf32")

    return timing.run("ops", cases, prepare, timer, args, ceilings)


if __name__ == "__main__":
    sys.exit(main())
