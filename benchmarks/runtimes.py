"""Other runtimes on the CPU, on the ONNX graph of our layers: ONNX Runtime and OpenVINO where installed."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def runtimes(model: nn.Module, x: Tensor, bfloat16: bool = False) -> dict[str, Callable[[], Any]]:
    """Name and call of every other runtime that is installed, for a float32 x on the CPU; those that can may compute in
    bfloat16."""
    names = ["openvino"] if bfloat16 else ["onnxruntime", "openvino"]
    found = [name for name in names if importlib.util.find_spec(name)]
    if not found or not importlib.util.find_spec("onnxscript"):
        return {}
    from alexnet_cuda.formats import onnx_translations

    translations: Any = onnx_translations.table()
    with torch.no_grad():
        exported = torch.onnx.export(model.eval(), (x,), dynamo=True, verbose=False, opset_version=18,
                                     input_names=["x"], custom_translation_table=translations)  # fmt: skip
    assert exported is not None
    graph, threads = exported.model_proto.SerializeToString(), torch.get_num_threads()
    array, calls = x.contiguous().numpy(), {}
    if "onnxruntime" in found:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would take a core from the others
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        calls["onnxruntime"] = lambda: session.run(None, {"x": array})
    if "openvino" in found:
        import openvino

        precision = "bf16" if bfloat16 else "f32"
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision,
                    "PERFORMANCE_HINT": "LATENCY"}  # fmt: skip
        core = openvino.Core()
        request = core.compile_model(core.read_model(graph), "CPU", settings).create_infer_request()
        name = "openvino bfloat16" if bfloat16 else "openvino"
        calls[name] = lambda: request.infer([array], share_inputs=True, share_outputs=True)
    return calls
