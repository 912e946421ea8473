"""Networks for other programs: ONNX with its LRN node, safetensors, and torch.export without our operators."""

import copy
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from ._library import KERNEL_DTYPES
from .data import DataError, atomic_path, source

OPSET = 18
INPUT, OUTPUT = "images", "scores"
LARGEST = 2**31 - 2**20  # bytes of weights: an ONNX file is one protobuf message, which ends at 2 GiB
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
GREY = ("digits", "mnist", "fashion-mnist")


def description(recipe, classes: list[str]) -> dict[str, str]:
    """What every file says about its network, as text.

    `classes` (JSON list, in the order of the scores), `recipe` (YAML, without its folders), `variant`, and
    `preprocessing` (JSON): its `steps` say in words what makes a picture the input, the other keys are their numbers.
    """
    from . import __version__

    size, photograph = recipe.input_size, source(recipe).SIZE is None
    short_side = (recipe.short_side or size * 8 // 7) if photograph else None
    if photograph:
        steps = [f"resize the shorter side to {short_side}", f"crop the centre, {size}x{size}"]
    else:
        steps = ["a bright shape on black"] * (recipe.data in GREY) + [f"resize to {size}x{size}"]
    grey = recipe.channels == 1 or recipe.data in GREY
    steps += [
        "divide by 255, subtract mean, divide by std",
        f"{'grey' if grey else 'RGB'}, {recipe.channels} channel(s)",
    ]
    preprocessing = {
        "steps": steps,
        "size": size,
        "short_side": short_side,
        "channels": recipe.channels,
        "mean": list(recipe.mean),
        "std": list(recipe.std),
    }
    return {
        "format": "pt",
        "variant": recipe.variant,
        "classes": json.dumps(classes),
        "recipe": recipe.replace({"data_path": None, "output": None}).to_yaml(),  # the file is for other machines
        "preprocessing": json.dumps(preprocessing),
        "writer": f"alexnet_cuda {__version__}",
    }


def save_onnx(path: Path, model: nn.Module, recipe, classes: list[str]) -> None:
    """Writes one file for any ONNX runtime: opset 18, float32, weights inside, `description` as metadata_props.

    Input `images` (batch, C, H, W) of any batch, output `scores` (batch, classes), before softmax. Raises DataError for
    a network of more than 2 GiB.
    """
    import onnx

    from . import onnx_translations

    size = sum(4 * tensor.numel() for tensor in model.state_dict().values())
    if size > LARGEST:
        raise DataError(
            f"{path} would hold {size / 2**30:.1f} GiB, and an ONNX file ends at 2; safetensors and torch files do not"
        )
    exported = torch.onnx.export(
        _program(model, recipe),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=[OUTPUT],
        custom_translation_table=onnx_translations.table(),
    )
    assert exported is not None
    exported.model.metadata_props.update(description(recipe, classes))
    for node in exported.model.graph:
        node.metadata_props.clear()  # lines of source code, in somebody's folders
    with atomic_path(path) as temporary:
        exported.save(temporary, external_data=False)
        onnx.checker.check_model(temporary, full_check=True)


def save_safetensors(path: Path, model: nn.Module, recipe, classes: list[str], dtype: str = "float32") -> None:
    """Writes the tensors, floating-point ones as `dtype`, with `description`: a file as that of a run, so that
    `evaluation.load_weights` reads it, too."""
    from .training.evaluation import write_tensors

    state = model.state_dict()
    tensors = {name: t.to(DTYPES[dtype]) if t.is_floating_point() else t for name, t in state.items()}
    write_tensors(path, tensors, description(recipe, classes))


def save_torch(path: Path, model: nn.Module, recipe, classes: list[str]) -> None:
    """Writes a torch.export program of torch's own operators: `torch.export.load(path).module()` needs torch alone.

    `description` is its extra file metadata.json.
    """
    program = _program(model, recipe).run_decompositions(_decompositions())
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # as above
    program.example_inputs = None
    buffer = io.BytesIO()  # a file would repeat its temporary name inside
    torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(description(recipe, classes))})
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def difference(path: Path, model: nn.Module, recipe) -> tuple[float, float] | None:
    """(largest absolute difference, largest absolute score) of file and network on 3 random images.

    None for an ONNX file where onnxruntime is not installed.
    """
    model, x = _plain(model), _images(recipe, 3)
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
            import safetensors.torch

            model.load_state_dict(safetensors.torch.load_file(path))
            actual = model(x)
    return (actual - expected).abs().max().item(), expected.abs().max().item()


def onnx_nodes(path: Path) -> Counter[str]:
    """How many nodes of which type an ONNX file has."""
    import onnx

    return Counter(node.op_type for node in onnx.load(path).graph.node)


def _plain(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).cpu().float().eval()
    return model.to(memory_format=torch.contiguous_format)


def _images(recipe, count: int) -> Tensor:
    shape = count, recipe.channels, recipe.input_size, recipe.input_size
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _program(model: nn.Module, recipe) -> torch.export.ExportedProgram:
    """The network in evaluation mode, for any number of images."""
    with torch.no_grad():
        return torch.export.export(
            _plain(model), (_images(recipe, 2),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )


def _decompositions() -> dict[Any, Callable]:
    """Our operators in torch's; the results that only backward needs stay empty."""
    if not KERNEL_DTYPES:  # then nothing but torch's are there
        return {}
    from .ops.local_response_norm import _lrn_plain
    from .ops.relu_lrn_max_pool2d import _tail_plain

    op = torch.ops.alexnet_cuda

    def pool(x, *window):
        return reference.max_pool2d(x, *window[:-1]), x.new_empty(0, dtype=torch.uint8)

    def tail(x, *constants):
        return _tail_plain(x, *constants[:-1]), x.new_empty(0, dtype=torch.uint8)

    def block(x, weight, bias, stride, padding, ceil_mode, *constants):
        pooled, code = tail(reference.conv2d(x, weight, bias, stride, padding, ceil_mode), *constants[:-1])
        return pooled, x.new_empty(0), code

    return {
        op.conv2d.default: reference.conv2d,
        op.local_response_norm.default: _lrn_plain,
        op.max_pool2d.default: pool,
        op.relu_lrn_max_pool2d.default: tail,
        op.conv2d_relu_lrn_max_pool2d.default: block,
    }
