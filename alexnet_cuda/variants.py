"""The networks called AlexNet, as data: every layer in its order, every constant, every initialisation.

`model.AlexNet` builds a network from a `Variant`; `docs/variants.md` compares them. Sources:
  paper            Krizhevsky, Sutskever, Hinton 2012, "ImageNet classification with deep convolutional neural networks"
  original2012     github.com/computerhistory/AlexNet-Source-Code, layers/layers-145.cfg and layer-params-145.cfg
  caffe, caffenet  github.com/BVLC/caffe, train_val.prototxt of models/bvlc_alexnet and models/bvlc_reference_caffenet
  owt              Krizhevsky 2014, "One weird trick"; cuda-convnet2, layers/layers-imagenet-1gpu.cfg
  torchvision      github.com/pytorch/vision, torchvision/models/alexnet.py
  tf_slim          github.com/google-research/tf-slim, tf_slim/nets/alexnet.py
"""

from collections.abc import Sequence
from dataclasses import replace

from .errors import RecipeError
from .specification import LRN, BatchNorm, Conv, Dropout, Init, Layer, Linear, MaxPool, ReLU, Tanh, Variant
from .words import unknown


def _head(hidden: Init, last: Init) -> tuple[Layer, ...]:
    """Two hidden layers of 4096 units, each with dropout behind its ReLU, and the classes."""
    block = (Linear(4096, hidden), ReLU(), Dropout())
    return (*block, *block, Linear(None, last))


def _grouped(name: str, description: str, lrn: LRN, biases: float, hidden: float, pool_first: bool = False) -> Variant:
    """The two-column net on 227x227: paper and Caffe differ in LRN, its place, start biases and hidden std."""
    tail = (ReLU(), MaxPool(), lrn) if pool_first else (ReLU(), lrn, MaxPool())
    zero, shifted = Init("normal", 0.01, 0.0), Init("normal", 0.01, biases)
    return Variant(
        name,
        description,
        features=(
            *(Conv(96, 11, 4, init=zero), *tail),
            *(Conv(256, 5, 1, 2, groups=2, init=shifted), *tail),
            *(Conv(384, 3, 1, 1, init=zero), ReLU()),
            *(Conv(384, 3, 1, 1, groups=2, init=shifted), ReLU()),
            *(Conv(256, 3, 1, 1, groups=2, init=shifted), ReLU(), MaxPool()),
        ),
        classifier=_head(Init("normal", hidden, biases), zero),
        pixels=True,
    )


# cuda-convnet gives the ReLU to the pooling layer where it says "neuron=relu" there: the order below is its order.
_COLUMN_LRN = LRN(k=2.0, groups=2)
_ORIGINAL_2012 = Variant(
    "original2012",
    "net #145 of the released 2012 code: 224 by ceil, LRN per column and before the first ReLU, a second same-map LRN",
    features=(
        *(Conv(96, 11, 4, ceil_mode=True, init=Init("normal", 0.01, 0)), _COLUMN_LRN, MaxPool(), ReLU()),
        *(Conv(256, 5, 1, 2, groups=2, init=Init("normal", 0.01, 1)), ReLU(), _COLUMN_LRN),
        *(LRN(alpha=1e-3, across="spatial"), MaxPool()),
        *(Conv(384, 3, 1, 1, init=Init("normal", 0.03, 0)), ReLU()),
        *(Conv(384, 3, 1, 1, groups=2, init=Init("normal", 0.03, 1)), ReLU()),
        *(Conv(256, 3, 1, 1, groups=2, init=Init("normal", 0.03, 1)), MaxPool(), ReLU()),
    ),
    classifier=_head(Init("normal", 0.01, 1), Init("normal", 0.01, 0)),
    input_size=224, pixels=True,
)  # fmt: skip

_OWT = Variant(
    "owt",
    '"One weird trick" (2014), the 1-GPU net of cuda-convnet2, with its LRN: 64 filters first, no groups',
    features=(
        *(Conv(64, 11, 4, ceil_mode=True, init=Init("normal", 0.01, 0)), LRN(k=2.0), MaxPool(), ReLU()),
        *(Conv(192, 5, 1, 2, init=Init("normal", 0.01, 1)), ReLU(), LRN(k=2.0), MaxPool()),
        *(Conv(384, 3, 1, 1, init=Init("normal", 0.03, 0)), ReLU()),
        *(Conv(256, 3, 1, 1, init=Init("normal", 0.03, 1)), ReLU()),
        *(Conv(256, 3, 1, 1, init=Init("normal", 0.03, 1)), MaxPool(), ReLU()),
    ),
    classifier=_head(Init("normal", 0.01, 1), Init("normal", 0.01, -7)),
    input_size=224, pixels=True,
)  # fmt: skip

_TORCHVISION = Variant(
    "torchvision",
    "torchvision.models.alexnet, state_dict interchangeable: owt without LRN, dropout before the linear layers",
    features=(
        *(Conv(64, 11, 4, 2), ReLU(), MaxPool()),
        *(Conv(192, 5, 1, 2), ReLU(), MaxPool()),
        *(Conv(384, 3, 1, 1), ReLU()),
        *(Conv(256, 3, 1, 1), ReLU()),
        *(Conv(256, 3, 1, 1), ReLU(), MaxPool()),
    ),
    classifier=(Dropout(), Linear(4096), ReLU(), Dropout(), Linear(4096), ReLU(), Linear()),
    input_size=224, average_pool=6,
)  # fmt: skip

_SLIM_CONV = Init("xavier_uniform", bias=0.1)
_TF_SLIM = Variant(
    "tf_slim",
    "alexnet_v2 of TensorFlow-Slim: 64 filters first without padding, no LRN, a 5x5x256 first linear layer",
    features=(
        *(Conv(64, 11, 4, init=_SLIM_CONV), ReLU(), MaxPool()),
        *(Conv(192, 5, 1, 2, init=_SLIM_CONV), ReLU(), MaxPool()),
        *(Conv(384, 3, 1, 1, init=_SLIM_CONV), ReLU()),
        *(Conv(384, 3, 1, 1, init=_SLIM_CONV), ReLU()),
        *(Conv(256, 3, 1, 1, init=_SLIM_CONV), ReLU(), MaxPool()),
    ),
    classifier=_head(Init("truncated_normal", 0.005, 0.1), Init("truncated_normal", 0.005)),
    input_size=224,
)  # fmt: skip

_GLOROT = Init("xavier_uniform")  # the default of Keras
_PAPER_LRN = LRN(k=2.0, divide_alpha=False)
_UNGROUPED = Variant(
    "ungrouped",
    "the one-column 227x227 net of most TensorFlow and Keras tutorials, with the paper's LRN",
    features=(
        *(Conv(96, 11, 4, init=_GLOROT), ReLU(), _PAPER_LRN, MaxPool()),
        *(Conv(256, 5, 1, 2, init=_GLOROT), ReLU(), _PAPER_LRN, MaxPool()),
        *(Conv(384, 3, 1, 1, init=_GLOROT), ReLU()),
        *(Conv(384, 3, 1, 1, init=_GLOROT), ReLU()),
        *(Conv(256, 3, 1, 1, init=_GLOROT), ReLU(), MaxPool()),
    ),
    classifier=_head(_GLOROT, _GLOROT),
)

# TensorFlow's SAME padding at 224: 3 before and, as the size is rounded up, 4 after the first layer (56), then 27 -> 7,
# 3 -> 1, 1 -> 1, 1 -> 1.
_TF_LRN = LRN(11, 1.0, 0.5, 1.0, divide_alpha=False)
_KERAS_MNIST = Variant(
    "keras_mnist",
    "the Keras tutorial net for MNIST upscaled to 224x224x3: stride 4 throughout, TensorFlow's default LRN before ReLU",
    features=(
        *(Conv(96, 11, 4, 3, ceil_mode=True, init=_GLOROT), _TF_LRN, ReLU(), MaxPool()),
        *(Conv(256, 5, 4, 1, init=_GLOROT), _TF_LRN, ReLU(), MaxPool()),
        *(Conv(384, 3, 4, 0, init=_GLOROT), ReLU()),
        *(Conv(384, 3, 4, 1, init=_GLOROT), ReLU()),
        *(Conv(256, 3, 4, 1, init=_GLOROT), ReLU()),
    ),
    classifier=_head(_GLOROT, _GLOROT),
    num_classes=10, input_size=224,
)  # fmt: skip

_KERAS_NORM = BatchNorm(eps=1e-3, momentum=0.01)  # Keras writes this momentum as .99
_FLOWERS_BN = Variant(
    "flowers_bn",
    "the Keras net for Oxford's 17 flowers: BatchNorm behind pooling and dropout, last three layers without padding",
    features=(
        *(Conv(96, 11, 4, init=_GLOROT), ReLU(), MaxPool(), _KERAS_NORM),
        *(Conv(256, 5, 1, 2, init=_GLOROT), ReLU(), MaxPool(), _KERAS_NORM),
        *(Conv(384, 3, init=_GLOROT), ReLU(), _KERAS_NORM),
        *(Conv(384, 3, init=_GLOROT), ReLU(), _KERAS_NORM),
        *(Conv(256, 3, init=_GLOROT), ReLU(), MaxPool(), _KERAS_NORM),
    ),
    classifier=(
        *(Linear(4096, _GLOROT), ReLU(), Dropout(0.4), _KERAS_NORM),
        *(Linear(4096, _GLOROT), ReLU(), Dropout(0.4), _KERAS_NORM),
        Linear(None, _GLOROT),
    ),
    num_classes=17, input_size=224,
)  # fmt: skip

# 32x32 images; docs/variants.md has the reasons. Convolutions followed by BatchNorm need no bias.
_HE = Init("kaiming_normal")
_CIFAR_LRN, _BN_RELU = LRN(alpha=0.05), (BatchNorm(), ReLU())
_CIFAR = Variant(
    "cifar",
    "our 32x32 net: AlexNet's five convolutions, LRN and overlapping pooling, with 3x3 filters and BatchNorm",
    features=(
        *(Conv(48, 3, 1, 1, bias=False, init=_HE), *_BN_RELU, _CIFAR_LRN, MaxPool(ceil_mode=True)),
        *(Conv(96, 3, 1, 1, bias=False, init=_HE), *_BN_RELU, _CIFAR_LRN, MaxPool(ceil_mode=True)),
        *(Conv(160, 3, 1, 1, bias=False, init=_HE), *_BN_RELU),
        *(Conv(160, 3, 1, 1, bias=False, init=_HE), *_BN_RELU),
        *(Conv(128, 3, 1, 1, bias=False, init=_HE), *_BN_RELU, MaxPool(ceil_mode=True)),
    ),
    classifier=(Linear(256, _HE), ReLU(), Dropout(0.3), Linear(None, _HE)),
    num_classes=10, input_size=32,
)  # fmt: skip

_DIRAC = Init("dirac")
_CIFAR_DEEP = Variant(
    "cifar_deep",
    "our deeper 32x32 net, for 94 % on CIFAR-10: seven convolutions with BatchNorm and LRN, and one linear layer",
    features=(
        *(Conv(32, 2, bias=False, init=_HE), *_BN_RELU),
        *(Conv(64, 3, 1, 1, bias=False, init=_DIRAC), MaxPool(), *_BN_RELU, _CIFAR_LRN),
        *(Conv(64, 3, 1, 1, bias=False, init=_DIRAC), *_BN_RELU),
        *(Conv(256, 3, 1, 1, bias=False, init=_DIRAC), MaxPool(), *_BN_RELU, _CIFAR_LRN),
        *(Conv(256, 3, 1, 1, bias=False, init=_DIRAC), *_BN_RELU),
        *(Conv(256, 3, 1, 1, bias=False, init=_DIRAC), MaxPool(), *_BN_RELU),
        *(Conv(256, 3, 1, 1, bias=False, init=_DIRAC), *_BN_RELU, MaxPool()),
    ),
    classifier=(Linear(None, Init("normal", 0.01)),),
    num_classes=10, input_size=32, average_pool=1,
)  # fmt: skip

_PAPER = _grouped(
    "paper", "the 2012 paper's text: two columns, conv-ReLU-LRN-pool, k 2, alpha not divided", _PAPER_LRN, 1.0, 0.01
)
_CAFFE = _grouped("caffe", "Caffe's bvlc_alexnet: the paper's order, k 1, alpha divided", LRN(), 0.1, 0.005)
_CAFFENET = _grouped(
    "caffenet", "Caffe's bvlc_reference_caffenet: pooling before LRN", LRN(), 1.0, 0.005, pool_first=True
)
_ALL = (
    *(_PAPER, _ORIGINAL_2012, _CAFFE, _CAFFENET, _UNGROUPED, _OWT),
    *(_TORCHVISION, _TF_SLIM, _KERAS_MNIST, _FLOWERS_BN, _CIFAR, _CIFAR_DEEP),
)
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _ALL}


def list_variants() -> dict[str, str]:
    """Every variant's name with one line about it."""
    return {name: variant.description for name, variant in VARIANTS.items()}


# What may follow a variant's name, as in "cifar:no-bn,tanh": what is each idea of the paper worth?
CHANGES: dict[str, str] = {
    "tanh": "tanh instead of ReLU",
    "no-lrn": "no local response normalisation",
    "no-bn": "no BatchNorm, and biases in the convolutions",
    "plain-pooling": "pooling windows of 2x2 with a step of 2, which do not overlap",
}


def get_variant(name: str) -> Variant:
    """The variant of that name, with the `CHANGES` that stand behind a colon, as in "cifar:no-bn,tanh". RecipeError, a
    ValueError, where there is no such variant or change."""
    own, _, listed = name.partition(":")
    if own not in VARIANTS:
        raise RecipeError(unknown("variant", own, VARIANTS))
    variant, changes = VARIANTS[own], listed.split(",") if listed else []
    for change in changes:
        if change not in CHANGES:
            raise RecipeError(unknown(f"change of {own}", change, CHANGES))
    if not changes:
        return variant
    features, classifier = (
        tuple(new for layer in layers if (new := _changed(layer, changes)))
        for layers in (variant.features, variant.classifier)
    )
    description = f"{own} with {'; '.join(CHANGES[change] for change in changes)}"
    return replace(variant, name=name, description=description, features=features, classifier=classifier)


def is_variant(name: str) -> bool:
    """Whether `get_variant` has it."""
    try:
        return bool(get_variant(name))
    except RecipeError:
        return False


def _changed(layer: Layer, changes: Sequence[str]) -> Layer | None:
    match layer:
        case ReLU() if "tanh" in changes:
            return Tanh()
        case LRN() if "no-lrn" in changes:
            return None
        case BatchNorm() if "no-bn" in changes:
            return None
        case Conv() if "no-bn" in changes:
            return replace(layer, bias=True)
        case MaxPool() if "plain-pooling" in changes:
            return MaxPool(2, 2)
    return layer
