"""Times three problems of KernelBench (ScalingIntelligence/KernelBench) and three with LRN in the same form: problems/.

Its rules: float32, random inputs, forward only, NCHW; one seed gives `Model` and `ModelNew` the same weights; on five
inputs |y - y of Model| <= 1e-4 (1 + |y of Model|), recorded as `difference`; times are `mean_ms` of 100 calls between
CUDA events, each after the L2 cache was overwritten. Its harness loads the files of problems/, too, as reference and as
solution. "ours" is `ModelNew`, "eager" `Model`, "compile" `Model` under torch.compile (--compile). --dtype tf32 allows
TF32 in every product of every form; the difference is no failure then.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import common
import timing
import torch
from timing import Form
from torch.utils.flop_counter import FlopCounterMode

PROBLEMS = {path.stem: path for path in sorted((Path(__file__).parent / "problems").glob("*.py"))}
SEED, TRIALS, TOLERANCE = 42, 5, 1e-4


def load(name: str, batch: int | None) -> dict[str, Any]:
    """What the file of a problem defines."""
    context: dict[str, Any] = {"__name__": name}
    exec(compile(PROBLEMS[name].read_text(), PROBLEMS[name], "exec"), context)
    context["batch_size"] = batch or context["batch_size"]
    return context


def models(problem: dict[str, Any], device: str) -> list[torch.nn.Module]:
    """Model and ModelNew, with the same weights."""
    made = []
    for name in ("Model", "ModelNew"):
        torch.manual_seed(SEED)
        made.append(problem[name](*problem["get_init_inputs"]()).to(device))
    return made


@torch.no_grad()
def difference(problem: dict[str, Any], model: Any, ours: Any, device: str) -> float:
    """The largest |ours - y| / (1 + |y|)."""
    worst = 0.0
    for seed in range(TRIALS):
        torch.manual_seed(seed)
        inputs = [x.to(device) for x in problem["get_inputs"]()]
        y, got = model(*inputs), ours(*inputs)
        worst = max(worst, ((got - y).abs() / (1 + y.abs())).max().nan_to_num(torch.inf).item())
    return worst


def wrong(found: float) -> None:
    raise ValueError(f"differs from Model by {found:.1e} (1 + |y|), allowed are {TOLERANCE:.0e}")


def main(arguments: list[str] | None = None) -> int:
    flags = common.parser(__doc__)
    flags.add_argument("--dtype", nargs="+", choices=("float32", "tf32"), help="none: float32, and on CUDA tf32")
    flags.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    flags.set_defaults(repeats=20)
    args = flags.parse_args(arguments)
    args.dtype = args.dtype or ["float32", "tf32"][: 2 if args.device == "cuda" else 1]
    timer, ceilings = timing.start(flags, args, "float32")
    batches = args.batch or [None]
    cases = {f"{p} {d}": (p, d, b) for p in args.problems for d in args.dtype for b in batches}

    def prepare(name: str, dtype: str, batch: int | None) -> tuple[dict, Iterator[Form]]:
        problem, settings = load(name, batch), {"tf32": dtype == "tf32"}
        model, ours = models(problem, args.device)
        timing.configure(**settings)
        found = difference(problem, model, ours, args.device)
        inputs = [x.to(args.device) for x in problem["get_inputs"]()]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            y = model(*inputs)
        size = sum(t.nbytes for t in (*inputs, y, *model.parameters()))
        case = {"case": name, "shape": list(inputs[0].shape[1:]), "pass": "inference", "dtype": dtype,
                "batch": len(inputs[0]), "bytes": size, "flops": counter.get_total_flops(),
                "difference": found}  # fmt: skip

        def forms() -> Iterator[Form]:
            run = lambda call: partial(torch.no_grad()(call), *inputs)
            bad = dtype == "float32" and found > TOLERANCE
            yield Form("ours", "contiguous", partial(wrong, found) if bad else run(ours), settings=settings)
            yield Form("eager", "contiguous", run(model), settings=settings)
            for mode in args.compile:
                compiled = torch.compile(model, mode=mode, dynamic=False)
                memory = timing.sees_memory(mode, timer.cuda)
                yield Form(f"compile {mode}", "contiguous", run(compiled), settings=settings, memory=memory)

        return case, forms()

    return timing.run("kernelbench", cases, prepare, timer, args, ceilings)


if __name__ == "__main__":
    sys.exit(main())
