"""Checks every operator on a device against float64: the part of gpu_check.py that looks at numbers.

Each check (parity_checks.py) is one JSON line in --output: {"op", "check", "ok", "error" (norm of the difference over
norm), "message"}; "ok" is null where it could not run for lack of memory. --large looks at offsets beyond 2^31 alone,
which takes up to 60 GB. --smoke instead runs every kernel on small inputs, AlexNet's own first, and checks nothing:
what the sanitizers look at. The exit code is 77 if nothing failed but something could not run.

--device emulator runs the tiny checks of the CUDA operators, host code and kernels, on the CPU (docs/emulator.md);
streams, graphs and large sizes need a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import INCOMPLETE
from parity_cases import OPS, Case, small
from parity_checks import LAYOUTS, checks, in_layout, large_checks
from torch import Tensor

from alexnet_cuda._library import EMULATED
from alexnet_cuda.kernels import VARIABLE


def smoke_runs(device: str) -> Iterator[tuple[Case, torch.dtype, str, int, bool]]:
    """(case, dtype, layout, images, whether with TF32 and wgmma)."""
    more_than_processors = torch.cuda.get_device_properties(0).multi_processor_count + 8 if device == "cuda" else 5
    first = [small(op)[0] for op in OPS]
    others = [case for op in OPS for case in small(op)[1:]]
    dtypes = torch.float16, torch.bfloat16, torch.float32
    for run in (
        *product(first, dtypes, LAYOUTS[:3], [2], (False, True)),
        *product(first, [torch.bfloat16], LAYOUTS[:2], [more_than_processors], (False, True)),
        *product(others, dtypes[1:], LAYOUTS[:2], [2], (False, True)),
    ):
        if run[0].filters or not run[-1]:
            yield run


def smoke(device: str, end: float) -> int:
    def here(t: Tensor) -> Tensor:
        """On the device, with its strides and offset, and written by a copy: by no kernel but ours."""
        whole = t.as_strided((t.storage_offset() + t.numel(),), (1,), 0).to(device)
        return whole.as_strided(t.shape, t.stride(), t.storage_offset())

    runs = list(smoke_runs(device))
    for i, (case, dtype, layout, n, other) in enumerate(runs):
        if time.monotonic() > end:
            print(f"no time left after {i} of {len(runs)} runs")
            return INCOMPLETE
        kernels = "wgmma" if other else "auto"
        print(f"{case.op} {case} n={n} {dtype} {layout} {'TF32 or wgmma' if other else ''}", flush=True)
        torch.backends.cudnn.allow_tf32, os.environ[VARIABLE] = other, kernels
        x, *weights = case.inputs(n, dtype, "cpu")
        leaves = [here(t).requires_grad_() for t in (in_layout(x, layout), *weights)]
        with torch.no_grad():
            case.function()(*leaves)
        y = case.function()(*leaves)
        torch.autograd.grad(y, leaves, here(in_layout(torch.randn(y.shape).to(dtype), layout)))
        if device == "cuda":
            torch.cuda.synchronize()  # so that an error stands behind its case
    print(f"{len(runs)} runs")
    return 0


def main(arguments: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--device", choices=("cpu", "cuda", "emulator"), default="cuda")
    flags.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    flags.add_argument("--output", type=Path)
    flags.add_argument("--time", type=float, default=float("inf"), help="seconds; checks not reached by then fail")
    flags.add_argument("--tiny", action="store_true", help="small shapes only")
    flags.add_argument("--large", action="store_true", help="offsets beyond 2^31 only")
    flags.add_argument("--smoke", action="store_true", help="run every kernel, check nothing")
    args = flags.parse_args(arguments)
    if args.device == "emulator":
        if not EMULATED:  # which is decided when the package is imported
            command = [sys.executable, __file__, *(sys.argv[1:] if arguments is None else arguments)]
            return subprocess.run(command, env=os.environ | {"ALEXNET_CUDA_EMULATED": "1"}).returncode
        args.device, args.tiny = "cpu", True
    end = time.monotonic() + args.time
    if args.smoke:
        return smoke(args.device, end)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, but where a check says TF32
    results: list[bool | None] = []
    file = open(args.output, "w") if args.output else sys.stdout  # noqa: SIM115
    for op in args.ops:
        torch.manual_seed(0)
        for name, check in (large_checks if args.large else checks)(op, args.device, args.tiny):
            record: dict[str, Any] = {"op": op, "check": name, "ok": True}
            try:
                if time.monotonic() > end:
                    raise TimeoutError(f"not reached within {args.time:g} s, nor what follows")
                record["error"] = check()
            except torch.OutOfMemoryError as error:  # other processes use the device too
                record |= {"ok": None, "message": f"could not run: {error}"[:200]}
            except Exception as error:
                record |= {"ok": False, "message": f"{type(error).__name__}: {error}"[:500]}
            results.append(record["ok"])
            file.write(json.dumps(record) + "\n")
            file.flush()
            if record.get("message", "").startswith(("TimeoutError", "AcceleratorError")):
                break  # after a CUDA error nothing runs in this process
            if args.device == "cuda" and (args.large or record["ok"] is None):
                torch.cuda.empty_cache()
    failed, lacking = results.count(False), results.count(None)
    print(f"{len(results)} checks, {failed} failed" + f", {lacking} could not run" * (lacking > 0))
    return 1 if failed else INCOMPLETE if lacking else 0


if __name__ == "__main__":
    sys.exit(main())
