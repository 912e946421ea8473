"""Other runtimes on the CPU: torch.nn layers as an ONNX graph, for ONNX Runtime and OpenVINO where installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def onnx_model(modules: Iterable[nn.Module], scale: float, shape: tuple[int, ...]) -> bytes:
    """The chain of `modules` on `scale` * x, with ONNX's own LRN operator."""
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    weights: list[Any] = []
    last = "x"

    def weight(t: Tensor) -> str:
        weights.append(numpy_helper.from_array(t.detach().contiguous().numpy(), f"w{len(weights)}"))
        return weights[-1].name

    def node(kind: str, *inputs: str, **attributes: Any) -> None:
        nonlocal last
        nodes.append(helper.make_node(kind, [last, *inputs], [f"y{len(nodes)}"], **attributes))
        last = nodes[-1].output[0]

    pair = lambda v: [v, v] if isinstance(v, int) else list(v)
    if scale != 1:
        node("Mul", weight(torch.tensor(scale)))
    for m in modules:
        if isinstance(m, nn.Conv2d):
            padding: Any = m.padding
            inputs = [weight(t) for t in (m.weight, m.bias) if t is not None]
            node("Conv", *inputs, strides=m.stride, pads=padding * 2, group=m.groups)
        elif isinstance(m, nn.LocalResponseNorm):
            node("LRN", size=m.size, alpha=m.alpha, beta=m.beta, bias=m.k)
        elif isinstance(m, nn.MaxPool2d):
            window = dict(kernel_shape=pair(m.kernel_size), strides=pair(m.stride), pads=pair(m.padding) * 2)
            node("MaxPool", ceil_mode=int(m.ceil_mode), **window)
        elif isinstance(m, nn.Linear):
            node("Gemm", weight(m.weight), weight(m.bias), transB=1)
        elif isinstance(m, nn.ReLU | nn.Flatten):
            node("Relu" if isinstance(m, nn.ReLU) else "Flatten")
        elif not isinstance(m, nn.Dropout | nn.Identity):
            raise ValueError(f"onnx_model: no ONNX form of {m}")
    info = partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
    graph = helper.make_graph(nodes, "benchmark", [info("x", shape=shape)], [info(last, shape=None)], weights)
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def runtimes(
    modules: Iterable[nn.Module], x: Tensor, scale: float = 1.0, bfloat16: bool = False
) -> dict[str, Callable[[], Any]]:
    """Name and call of every other runtime that is installed, for a float32 x on the CPU; those that can may compute in
    bfloat16."""
    found = {name for name in ("onnx", "onnxruntime", "openvino") if importlib.util.find_spec(name)}
    if "onnx" not in found or len(found) == 1:
        return {}
    model, threads, array = onnx_model(modules, scale, tuple(x.shape)), torch.get_num_threads(), x.contiguous().numpy()
    calls: dict[str, Callable[[], Any]] = {}
    if "onnxruntime" in found and not bfloat16:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would take a core from the others
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        calls["onnxruntime"] = lambda: session.run(None, {"x": array})
    if "openvino" in found:
        import openvino

        precision = "bf16" if bfloat16 else "f32"
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision,
                    "PERFORMANCE_HINT": "LATENCY"}  # fmt: skip
        core = openvino.Core()
        request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
        name = "openvino bfloat16" if bfloat16 else "openvino"
        calls[name] = lambda: request.infer([array], share_inputs=True, share_outputs=True)
    return calls
