"""Networks as files for other programs: ONNX, safetensors, and torch.export programs of torch's own operators."""

import copy
import io
import json
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from .. import weights
from .._library import KERNEL_DTYPES
from .._version import VERSION
from ..data import source
from ..errors import DataError
from ..files import atomic_path
from ..recipe import Recipe
from .tensors import as_state, read_content

OPSET = 18
INPUT, OUTPUT = "images", "scores"
ONNX_MAX_BYTES = 2**31 - 2**20  # of weights: an ONNX file is one protobuf message, which holds at most 2 GiB
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
GREY = ("digits", "mnist", "fashion-mnist")


def description(recipe: Recipe, classes: list[str]) -> dict[str, str]:
    """The metadata of every exported file, as text.

    `classes` (JSON list, in the order of the scores), `recipe` (YAML, without its folders), `variant`, and
    `preprocessing` (JSON): `steps` describes in words how a picture becomes the input, the other keys are numbers.
    """
    size, photograph = recipe.input_size, source(recipe).SIZE is None
    short_side = recipe.test_short_side if photograph else None
    if photograph:
        steps = [f"resize the shorter side to {short_side}", f"crop the centre, {size}x{size}"]
    else:
        steps = ["a bright shape on black"] * (recipe.data in GREY) + [f"resize to {size}x{size}"]
    colours = "grey" if recipe.channels == 1 or recipe.data in GREY else "RGB"
    steps += ["divide by 255, subtract mean, divide by std", f"{colours}, {recipe.channels} channel(s)"]
    numbers = dict(size=size, short_side=short_side, channels=recipe.channels, mean=recipe.mean, std=recipe.std)
    return {
        "format": "pt",
        "variant": recipe.variant,
        "classes": json.dumps(classes),
        "recipe": recipe.replace({"data_path": None, "output": None}).to_yaml(),
        "preprocessing": json.dumps({"steps": steps, **numbers}),
        "writer": f"alexnet_cuda {VERSION}",
    }


def save_onnx(path: Path, model: nn.Module, recipe: Recipe, classes: list[str]) -> None:
    """Writes one ONNX file: opset 18, float32, weights inside, `description` as metadata_props. Input `images` (N, C,
    H, W) for any N, output `scores` (N, classes), before softmax. Raises DataError for a network of more than 2 GiB."""
    import onnx

    from . import onnx_translations

    size = sum(4 * tensor.numel() for tensor in model.state_dict().values())
    if size > ONNX_MAX_BYTES:
        limit = "an ONNX file holds at most 2; other formats have no limit"
        raise DataError(f"{path} would hold {size / 2**30:.1f} GiB, {limit}")
    exported = torch.onnx.export(
        _program(model, recipe), dynamo=True, verbose=False, opset_version=OPSET,
        input_names=[INPUT], output_names=[OUTPUT], custom_translation_table=onnx_translations.table(),
    )  # fmt: skip
    assert exported is not None
    exported.model.metadata_props.update(description(recipe, classes))
    for node in exported.model.graph:
        node.metadata_props.clear()  # lines and paths of source code
    with atomic_path(path) as temporary:
        exported.save(temporary, external_data=False)
        onnx.checker.check_model(temporary, full_check=True)


def save_safetensors(path: Path, model: nn.Module, recipe: Recipe, classes: list[str], dtype: str = "float32") -> None:
    """Writes the tensors, floating-point ones as `dtype`, with `description`; `weights.load_weights` reads the file."""
    state = model.state_dict()
    tensors = {name: t.to(DTYPES[dtype]) if t.is_floating_point() else t for name, t in state.items()}
    weights.write_tensors(path, tensors, description(recipe, classes) | weights.network_description(model))


def save_torch(path: Path, model: nn.Module, recipe: Recipe, classes: list[str]) -> None:
    """Writes a torch.export program of torch's own operators: `torch.export.load(path).module()` needs torch alone.
    `description` is its extra file metadata.json."""
    with patch.dict(KERNEL_DTYPES, clear=True):  # `ops` are composed of torch's operators
        program = _program(model, recipe).run_decompositions({})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines and paths of source code
    program.example_inputs = None
    buffer = io.BytesIO()  # torch.export.save writes the name of a file into the file
    torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(description(recipe, classes))})
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def difference(path: Path, model: nn.Module, recipe: Recipe) -> tuple[float, float] | None:
    """(largest absolute difference, largest absolute score) of file and network on 3 random images. None for an ONNX
    file where onnxruntime is not installed."""
    model, x = _network_and_images(model, recipe, 3)
    with torch.no_grad():
        expected = model(x)
        if path.suffix == ".onnx":
            try:
                import onnxruntime
            except ModuleNotFoundError:
                return None
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            actual = torch.from_numpy(session.run([OUTPUT], {INPUT: x.numpy()})[0])
        elif path.suffix == ".pt2":
            actual = torch.export.load(path).module()(x)
        else:
            model.load_state_dict(as_state(read_content(path)[0], model))
            actual = model(x)
    return (actual - expected).abs().max().item(), expected.abs().max().item()


def onnx_nodes(path: Path) -> Counter[str]:
    """Number of nodes of each type in an ONNX file."""
    import onnx

    return Counter(node.op_type for node in onnx.load(path).graph.node)


def _network_and_images(model: nn.Module, recipe: Recipe, count: int) -> tuple[nn.Module, Tensor]:
    """A contiguous copy of the network on the CPU in float32, in evaluation mode, and random images."""
    model = copy.deepcopy(model).cpu().float().eval().to(memory_format=torch.contiguous_format)
    shape = count, recipe.channels, recipe.input_size, recipe.input_size
    return model, torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _program(model: nn.Module, recipe: Recipe) -> torch.export.ExportedProgram:
    """The network for any number of images."""
    model, images = _network_and_images(model, recipe, 2)
    return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
