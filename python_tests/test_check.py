"""`alexnet-cuda check`: that it passes, names what is wrong, and fails then."""

from dataclasses import replace

import pytest
import torch
from training_helpers import cli

from alexnet_cuda import check, ops, reference
from alexnet_cuda._library import KERNEL_DTYPES


@pytest.fixture
def few(monkeypatch):
    """Two small cases of two operators."""
    few = [case for case in check.CASES if case.small and case.op in ("max_pool2d", "relu_lrn_max_pool2d")]
    monkeypatch.setattr(check, "CASES", few[:2] + few[-2:])


def test_every_operator_passes():
    output = cli("check", "--device", "cpu", "--small")
    assert all(f"{name} " in output for name in ops.__all__)
    assert all(dtype in output for dtype in ("float32", "float16", "bfloat16", "float64"))
    assert "all correct" in output


def test_alexnets_layers_run_on_the_kernels(monkeypatch):
    layers = [case for case in check.CASES if not case.small and "order" not in case.args]
    monkeypatch.setattr(check, "CASES", [replace(case, images=1) for case in layers])
    monkeypatch.setattr(check, "DTYPES", {"float32": torch.float32})
    rows = list(check.check("cpu"))
    assert not [line for row in rows for line in row.wrong]
    expected = sum(row.cases for row in rows) if "cpu" in KERNEL_DTYPES else 0
    assert sum(row.kernels for row in rows) == expected


@pytest.mark.parametrize("wrong", ["output", "inference", "gradient", "error", "shape", "nan"])
def test_finds_a_wrong_operator(few, wrong, monkeypatch):
    def broken(x, *args, **kwargs):
        if wrong == "error":
            raise RuntimeError("no kernel image")
        if wrong == "gradient":
            x = x * 0.9 + (x * 0.1).detach()
        y = reference.max_pool2d(x, *args, **kwargs)
        if wrong == "shape":
            return y[..., 1:]
        if wrong == "nan":
            return y.where(y != y.max(), torch.nan)
        last_column = torch.arange(y.shape[-1]) == y.shape[-1] - 1
        spoiled = wrong == "output" or (wrong == "inference" and not torch.is_grad_enabled())
        return y * (1 - 0.05 * spoiled * last_column).to(y)

    monkeypatch.setattr(ops, "max_pool2d", broken)
    output = cli("check", "--device", "cpu", "--small", code=1)
    reason = {
        "error": "RuntimeError: no kernel image",
        "shape": "ValueError: expected a result of shape (2, 5, 6, 4) of torch.float16, got (2, 5, 6, 3)",
    }.get(wrong, "too far from float64")
    assert f"max_pool2d of 2x5x12x9, ceil_mode=True, float16, channels_last on cpu: {reason}" in output
    assert "relu_lrn_max_pool2d of" not in output
    assert "16 wrong" in output


def test_a_fused_gradient_may_differ_at_few_elements_only(few, monkeypatch):
    """Another maximum of a window is allowed where rounding decides; another share of the gradient is not."""
    original = ops.relu_lrn_max_pool2d
    monkeypatch.setattr(ops, "relu_lrn_max_pool2d", lambda x, *a, **k: original(x * 0.7 + (x * 0.3).detach(), *a, **k))
    rows = {(row.op, row.dtype): row for row in check.check("cpu", small=True)}
    assert all(len(row.wrong) == 4 * (op != "max_pool2d") for (op, _), row in rows.items())


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no GPU" in cli("check", "--device", "cuda", code=2)
