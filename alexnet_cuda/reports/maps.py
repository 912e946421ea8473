"""What a network computes for an image: class activation and occlusion maps, the outputs of its layers, its strongest
filters, and the image that a filter responds to most."""

import copy
import warnings
from collections.abc import Mapping
from contextlib import ExitStack, suppress
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


def occlusion(model: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """How much of a class's probability is lost where a grey square covers the image: maps (N, H, W) on the CPU,
    averaged over the squares that cover a pixel. Negative where the class becomes more probable.

    For normalised images x (N, C, H, W), classes (N,) and a network in evaluation mode. The square has a quarter of the
    image's edge and moves by half its own.

    Source: M. Zeiler and R. Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014, section 4.2.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IProgress not found")  # of tqdm, in a notebook
        from captum.attr import Occlusion
    edge = max(1, x.shape[-1] // 4)
    window, step = (x.shape[1], edge, edge), (x.shape[1], max(1, edge // 2), max(1, edge // 2))
    with torch.inference_mode():
        method = Occlusion(lambda images: model(images).float().softmax(1))
        lost = method.attribute(x, window, step, target=classes.to(x.device), perturbations_per_eval=8)
    return lost.mean(1).cpu()


class _Stop(Exception):
    """Ends a forward pass behind the layer that is looked at."""


def preferred_images(
    model: nn.Module, name: str, channels: list[int], shape: tuple[int, ...], steps: int = 24
) -> Tensor:
    """Normalised images (N, C, H, W) that raise the mean output of channels of a convolution as far as `steps` of
    gradient ascent do, from grey with a little noise. `name` is one of `convolutions`, shape (C, H, W) of an image.

    Each step has the length of a unit of deviation. The image is shifted by up to an eighth of its edge before a step
    and smoothed after it: without both, it would be noise of high frequency.

    Source: C. Olah, A. Mordvintsev and L. Schubert, "Feature Visualization", Distill, 2017.
    """
    some = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    x = (0.1 * torch.randn(len(channels), *shape, generator=generator)).to(some)
    order, reach = torch.arange(len(channels)), max(1, shape[-1] // 8)
    slopes: list[Tensor] = []

    def climb(_: nn.Module, __: object, output: Tensor) -> None:
        slopes.extend(torch.autograd.grad(output[order, channels].mean((1, 2)).sum(), leaf))
        raise _Stop

    with torch.inference_mode(False), torch.enable_grad(), convolutions(model)[name].register_forward_hook(climb):
        for _ in range(steps):
            shift = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
            leaf = x.roll(shift, (2, 3)).requires_grad_()
            with suppress(_Stop):
                model(leaf)
            slope = slopes.pop()
            slope = slope / slope.std((1, 2, 3), keepdim=True).clamp(min=1e-12)
            x = blur((leaf.detach() + slope).clamp(-3, 3)).roll([-n for n in shift], (2, 3))
    return x.float().cpu()


def blur(x: Tensor) -> Tensor:
    """Images (N, C, H, W), each pixel mixed with its neighbours by the weights 1, 6, 1 along both axes."""
    weights = torch.tensor([1.0, 6, 1], device=x.device, dtype=x.dtype) / 8
    kernel = (weights[:, None] * weights).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1])


@torch.no_grad()
def last_hidden(model: nn.Module, x: Tensor) -> Tensor | None:
    """The outputs of the last hidden layer, those that the last linear layer takes: (N, units) on the CPU for images
    x (N, C, H, W). None of a network without a linear layer."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        return None
    inputs: list[Tensor] = []
    with linear[-1].register_forward_pre_hook(lambda _, given: inputs.append(given[0])):
        model(x)
    return inputs[0].detach().float().cpu().flatten(1)


@torch.no_grad()
def feature_maps(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The outputs (C, h, w) of all layers that compute such maps, for one image (C, H, W) or (1, C, H, W), on the CPU.
    Their names are those of `summary.layer_names`. No layers are fused."""
    batch = x if x.dim() == 4 else x[None]
    return {name: output[0] for name, output in outputs(model, batch, _layers(model)).items()}


@torch.no_grad()
def strongest_filters(model: nn.Module, x: Tensor, count: int = 8) -> tuple[Tensor, Tensor]:
    """Indices and responses of the first layer's filters with the largest responses, both (N, count), on the CPU. The
    response of a filter to an image of x (N, C, H, W) is the mean over all positions of ReLU of its output."""
    name, module = next(iter(convolutions(model).items()))
    responses = F.relu(outputs(model, x, {name: module})[name]).mean((2, 3))
    values, indices = responses.topk(min(count, responses.shape[1]), dim=1)
    return indices, values


def first_filters(model: nn.Module, grey: bool = False) -> Tensor:
    """The first convolution's weights (K, C, k, k), on the CPU; with `grey`, their sums over the channels (K, 1, k, k).
    The sum is the filter that applies to an image whose channels are equal."""
    weight = next(iter(convolutions(model).values())).weight.detach().float().cpu()
    return weight.sum(1, keepdim=True) if grey else weight


def outputs(model: nn.Module, x: Tensor, named: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The 4-D outputs of modules for x. The hooks keep AlexNet from fusing these modules."""
    found: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, __: object, output: Tensor) -> None:
        if output.dim() == 4:
            found[name] = output.detach().float().cpu().clone()

    with ExitStack() as hooks:
        for name, module in named.items():
            hooks.enter_context(module.register_forward_hook(partial(keep, name)))
        model(x)
    return found


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: model.get_submodule(path) for path, name in layer_names(model).items()}
