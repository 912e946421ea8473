"""What a network computes for an image: class activation maps, the outputs of its layers, its strongest filters."""

import copy
from contextlib import ExitStack
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..summary import layer_names


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions of a network, by the names of `summary.layer_names`: conv1, conv2, ..."""
    return {name: module for name, module in _layers(model).items() if isinstance(module, nn.Conv2d)}


def grad_cam(model: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """Grad-CAM of the last convolution: maps (N, H, W) in 0..1, each divided by its maximum.

    For normalised images x (N, C, H, W), classes (N,) and a network in evaluation mode: ReLU(sum over k of w_k A_k),
    resized to the image, where A_k is channel k of the convolution's output and w_k the mean of the derivative of the
    class score with respect to A_k. Where this is 0 everywhere, LayerCAM takes its place: ReLU of each derivative by
    itself as w_k. A map is 0 everywhere if no position raises the score.

    Sources: R. Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
    ICCV 2017, equations 1 and 2; P.-T. Jiang et al., "LayerCAM", IEEE Transactions on Image Processing, 2021.
    """
    leaves: list[Tensor] = []

    def cut(_: nn.Module, __: object, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # an in-place ReLU would change the leaf

    with torch.inference_mode(False), torch.enable_grad():
        if any(p.is_inference() for p in model.parameters()):
            model = copy.deepcopy(model)
        with list(convolutions(model).values())[-1].register_forward_hook(cut):
            scores = model(x.clone())  # clones, because x and classes may be inference tensors
        chosen = scores.gather(1, classes.to(scores.device).clone()[:, None])
        (derivatives,) = torch.autograd.grad(chosen.sum(), leaves[-1])
    a = leaves[-1].detach().float()
    derivatives = derivatives.float()
    maps = F.relu((derivatives.mean((2, 3), keepdim=True) * a).sum(1, keepdim=True))
    layer_cam = F.relu((F.relu(derivatives) * a).sum(1, keepdim=True))
    maps = torch.where(maps.amax((1, 2, 3), keepdim=True) == 0, layer_cam, maps)
    maps = F.interpolate(maps, x.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


@torch.no_grad()
def feature_maps(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The outputs (C, h, w) of all layers that compute such maps, for one image (C, H, W) or (1, C, H, W), on the CPU.
    Their names are those of `summary.layer_names`. No layers are fused."""
    batch = x if x.dim() == 4 else x[None]
    return {name: output[0] for name, output in _outputs(model, batch, _layers(model)).items()}


@torch.no_grad()
def strongest_filters(model: nn.Module, x: Tensor, count: int = 8) -> tuple[Tensor, Tensor]:
    """Indices and responses of the first layer's filters with the largest responses, both (N, count), on the CPU. The
    response of a filter to an image of x (N, C, H, W) is the mean over all positions of ReLU of its output."""
    name, module = next(iter(convolutions(model).items()))
    responses = F.relu(_outputs(model, x, {name: module})[name]).mean((2, 3))
    values, indices = responses.topk(min(count, responses.shape[1]), dim=1)
    return indices, values


def first_filters(model: nn.Module, grey: bool = False) -> Tensor:
    """The first convolution's weights (K, C, k, k), on the CPU; with `grey`, their sums over the channels (K, 1, k, k).
    The sum is the filter that applies to an image whose channels are equal."""
    weight = next(iter(convolutions(model).values())).weight.detach().float().cpu()
    return weight.sum(1, keepdim=True) if grey else weight


def _outputs(model: nn.Module, x: Tensor, named: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The 4-D outputs of modules for x. The hooks keep AlexNet from fusing these modules."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, __: object, output: Tensor) -> None:
        if output.dim() == 4:
            outputs[name] = output.detach().float().cpu().clone()

    with ExitStack() as hooks:
        for name, module in named.items():
            hooks.enter_context(module.register_forward_hook(partial(keep, name)))
        model(x)
    return outputs


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: model.get_submodule(path) for path, name in layer_names(model).items()}
