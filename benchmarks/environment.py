"""The machine, and how fast it copies and multiplies, as FILE (JSON).

Exit code 1 without kernels for the device, 77 without the rates.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import common
import timing
import torch

import alexnet_cuda


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    flags.add_argument("--output", type=Path, required=True, metavar="FILE")
    args = flags.parse_args()
    if args.device == "cuda":
        try:
            common.console.print(subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20).stdout)
        except (OSError, subprocess.TimeoutExpired) as error:
            common.console.print(error)
        state = alexnet_cuda.build_info()["CUDA kernels"]
        why = "torch finds no GPU" if not torch.cuda.is_available() else "" if state == "loaded" else state
        if why:
            common.console.print(f"no CUDA kernels: {why}")
            return 1
    machine = common.machine(args.device)
    args.output.write_text(json.dumps({"machine": machine}) + "\n")
    dtypes = ["float32", "bfloat16"] if args.device == "cpu" else list(common.DTYPES)
    try:
        ceilings = timing.measure_ceilings(args.device, dtypes, timing.Timer(args.device), small=args.device == "cpu")
    except RuntimeError as error:
        common.console.print(f"no rates: {error}", markup=False)
        return common.INCOMPLETE
    args.output.write_text(json.dumps({"machine": machine, "ceilings": ceilings}, indent=1) + "\n")
    common.console.print(f"{machine['device']}, torch {machine['torch']}, commit {machine['commit']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
