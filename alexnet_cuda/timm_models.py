"""The variants as models of timm: after `import alexnet_cuda.timm_models`, timm.create_model("alexnet_cuda_paper")."""

import sys
from collections.abc import Callable
from typing import Any

from timm.models import register_model

from .model import AlexNet
from .variants import VARIANTS, Variant

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bilinear"}
WEIGHTS = {"cifar": ("cifar10", {"mean": (0.4914, 0.4822, 0.4465), "std": (0.247, 0.2435, 0.2616)})}


def _entry(variant: Variant) -> Callable[..., AlexNet]:
    weights, normalisation = WEIGHTS.get(variant.name, (None, IMAGENET))

    def create(
        pretrained: bool = False, num_classes: int | None = None, in_chans: int | None = None,
        drop_rate: float | None = None, **ignored: Any,
    ) -> AlexNet:  # fmt: skip
        """The variant; with `pretrained` its weights of the package, or ValueError where it has none."""
        if pretrained and weights is None:
            raise ValueError(f"{create.__name__}: no weights come with this variant; pretrained must be False")
        model = AlexNet(variant, num_classes, in_chans, drop_rate, weights=weights if pretrained else None)
        size = (model.in_channels, variant.input_size, variant.input_size)
        config = {"input_size": size, "num_classes": model.num_classes, "crop_pct": 0.875, **normalisation}
        model.pretrained_cfg = model.default_cfg = config  # type: ignore[assignment]
        return model

    create.__name__ = f"alexnet_cuda_{variant.name}"
    return create


for _variant in VARIANTS.values():
    _function = _entry(_variant)
    setattr(sys.modules[__name__], _function.__name__, _function)
    register_model(_function)
