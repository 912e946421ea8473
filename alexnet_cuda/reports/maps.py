"""What goes on inside a network: class activation maps, the output of every layer, the filters that answer."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = {
    nn.Conv2d: "conv",
    nn.ReLU: "relu",
    nn.LocalResponseNorm: "lrn",
    nn.MaxPool2d: "pool",
    nn.BatchNorm2d: "bn",
    nn.ZeroPad2d: "pad",
}


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model.features` (of the whole network where it has none), by name, in their order.

    A name is the kind of layer and how many convolutions there were so far, as in conv1, relu1, lrn1, pool1, conv2.
    """
    named: dict[str, nn.Module] = {}
    convolutions = 0
    for module in getattr(model, "features", model).modules():
        if next(module.children(), None) is not None or isinstance(module, nn.Identity):
            continue
        convolutions += isinstance(module, nn.Conv2d)
        kind = next((name for type_, name in KINDS.items() if isinstance(module, type_)), type(module).__name__.lower())
        name = f"{kind}{convolutions + (kind == 'pad')}"
        while name in named:
            name += "'"
        named[name] = module
    return named


def grad_cam(model: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """Where the last convolution saw what speaks for a class: maps (N, H, W) in 0..1, each with its maximum at 1.

    For images x (N, C, H, W) as the network takes them, and classes (N,), of a network in evaluation mode:
    ReLU(sum over k of w_k A_k), where A_k is channel k of the convolution's output and w_k the mean of the class
    score's derivative by it; resized to the image and divided by its maximum. A map is 0 where nothing speaks for it.

    Source: R. Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
    ICCV 2017, equations 1 and 2.
    """
    leaves: list[Tensor] = []

    def cut(_: nn.Module, __: object, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # a ReLU that works in place would change the leaf

    with torch.inference_mode(False), torch.enable_grad():
        if any(p.is_inference() for p in model.parameters()):  # it was moved to its device in inference mode
            model = copy.deepcopy(model)
        module = [m for m in layers(model).values() if isinstance(m, nn.Conv2d)][-1]
        handle = module.register_forward_hook(cut)
        try:
            scores = model(x.clone())  # x and classes, too, may be from inference mode
        finally:
            handle.remove()
        chosen = scores.gather(1, classes.to(scores.device).clone()[:, None])
        (slopes,) = torch.autograd.grad(chosen.sum(), leaves[-1])
    a = leaves[-1].detach().float()
    weights = slopes.float().mean((2, 3), keepdim=True)
    maps = F.relu((weights * a).sum(1, keepdim=True))
    maps = F.interpolate(maps, x.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


@torch.no_grad()
def feature_maps(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output (C, h, w) of every layer of `layers(model)` for one image (C, H, W) or (1, C, H, W), on the CPU.

    Layers that the network runs as one fused op run one by one here.
    """
    return {name: output[0] for name, output in _outputs(model, x if x.dim() == 4 else x[None], layers(model)).items()}


@torch.no_grad()
def strongest_filters(model: nn.Module, x: Tensor, count: int = 8) -> tuple[Tensor, Tensor]:
    """The first layer's filters that fire most for images x (N, C, H, W), and how much: both (N, count), on the CPU.

    Returns (indices, answers), the strongest first. An answer is the mean over all positions of what ReLU would let
    through.
    """
    name, module = next((n, m) for n, m in layers(model).items() if isinstance(m, nn.Conv2d))
    fired = F.relu(_outputs(model, x, {name: module})[name]).mean((2, 3))
    answers, indices = fired.topk(min(count, fired.shape[1]), dim=1)
    return indices, answers


def first_filters(model: nn.Module, grey: bool = False) -> Tensor:
    """The first convolution's weights (K, C, k, k), on the CPU; with `grey`, summed over the channels (K, 1, k, k).

    An image whose channels are copies of one grey channel sees the sum.
    """
    weight = next(m.weight for m in layers(model).values() if isinstance(m, nn.Conv2d)).detach().float().cpu()
    return weight.sum(1, keepdim=True) if grey else weight


def _outputs(model: nn.Module, x: Tensor, named: dict[str, nn.Module]) -> dict[str, Tensor]:
    """What each module gives for x; AlexNet fuses no module that has a hook."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            if output.dim() == 4:
                outputs[name] = output.detach().float().cpu().clone()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in named.items()]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return outputs
