"""Times and counts of the forms of a case, and the machine's ceilings."""

import argparse
import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from common import DTYPES, Results, console, machine
from torch import Tensor

from alexnet_cuda import _library


@dataclass
class Form:
    """An implementation of a case. `forward` is the part whose saved tensors are counted (training only); `settings`
    are those of `configure`; `memory` is False where `peak_bytes` would not see the memory."""

    name: str
    layout: str
    run: Callable[[], Any]
    forward: Callable[[], Any] | None = None
    settings: dict[str, bool] = field(default_factory=dict)
    memory: bool = True
    parameters: Iterable[Tensor] = ()
    seconds: list[float] = field(default_factory=list)  # of its calls
    error: str = ""  # what ended them


def configure(benchmark: bool = False, tf32: bool = False, deterministic: bool = False, wgmma: bool = True) -> None:
    os.environ["ALEXNET_CUDA_WGMMA"] = str(int(wgmma))
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32


class Timer:
    """Times functions in turn, so that other load on the machine affects all of them.

    CPU: wall clock of each call. CUDA: events around single calls, each after a write of four times the L2 cache,
    which leaves no input there and keeps the device busy while the host launches what follows.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            size = 4 * torch.cuda.get_device_properties(0).L2_cache_size
            self.flush = torch.empty(size // 4, dtype=torch.int32, device=device)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def attempt(self, form: Form, function: Callable, *arguments: Any) -> Any:
        """function(*arguments) with the form's settings; an error ends the form."""
        try:
            configure(**form.settings)
            return function(*arguments)
        except Exception as error:
            self.synchronize()  # raises if this process can no longer use the device
            form.error = f"{type(error).__name__}: {error}".splitlines()[0][:200]

    def warm_up(self, form: Form) -> None:
        for _ in range(5 if self.cuda else 2):
            form.run()
        self.synchronize()

    def sample(self, form: Form) -> Callable[[], list[float]]:
        """Start some calls; the result, called after a synchronisation, returns their seconds. On the CPU: as many as
        take 5 ms, up to 20, because the first call has to wake threads and load code into the caches."""
        if self.cuda:
            events = []
            for _ in range(5):
                self.flush.zero_()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                form.run()
                end.record()
                events.append((begin, end))
            return lambda: [begin.elapsed_time(end) / 1e3 for begin, end in events]
        calls = 1 if len(form.seconds) < 2 else max(1, min(20, int(0.005 / min(form.seconds))))
        time.sleep(0.003)  # until the thread pool of the form before has stopped spinning
        seconds = []
        for _ in range(calls):
            begin_s = time.perf_counter()
            form.run()
            seconds.append(time.perf_counter() - begin_s)
        return lambda: seconds

    def alternate(self, forms: list[Form], budget: float, repeats: int) -> None:
        """Adds the seconds of every call: up to `repeats` rounds, at least 3, within about `budget` seconds."""
        gc.collect()
        gc.disable()
        end, order = time.monotonic() + budget, random.Random(0)
        try:
            for turn in range(repeats):
                shuffled = order.sample(forms, len(forms))  # no form always follows the same other one
                samples = [(form, self.attempt(form, self.sample, form)) for form in shuffled if not form.error]
                self.synchronize()
                for form, sample in samples:
                    form.seconds += sample() if sample else []
                if turn >= 2 and time.monotonic() > end:
                    break
        finally:
            gc.enable()


def statistics_of(seconds: list[float]) -> dict[str, float]:
    """Median, quartiles, minimum and mean in ms; of one call, nothing."""
    if len(seconds) < 2:
        return {}
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    values = {"median_ms": median, "q1_ms": q1, "q3_ms": q3, "min_ms": min(seconds),
              "mean_ms": statistics.mean(seconds)}  # fmt: skip
    return {name: digits(1e3 * value) for name, value in values.items()} | {"calls": len(seconds)}


def digits(value: float) -> float:
    return float(f"{value:.5g}")


def measure(
    forms: Iterable[Form], timer: Timer, args: argparse.Namespace, ceilings: dict, case: dict, results: Results
) -> list[dict]:
    """Warm up, time in turn, and record every form of a case; `case` holds `bytes` and `flops` if they are known.

    Times measured before a form failed are recorded beside its error."""
    made, records = [], []
    for form in forms:
        timer.attempt(form, timer.warm_up, form)
        made.append(form)
    timer.alternate(made, args.budget, args.repeats)
    for form in sorted(made, key=lambda form: not form.seconds):  # those that failed at once come last
        record = {**case, "form": form.name, "layout": form.layout, **statistics_of(form.seconds)}
        timed = "median_ms" in record
        if timed and case.get("bytes"):
            record["copy_share"] = digits(case["bytes"] / record["median_ms"] * 1e3 / ceilings["copy"])
        if timed and case.get("flops"):
            gemm = case["dtype"].replace("autocast", "bfloat16")
            record["gemm_share"] = digits(case["flops"] / record["median_ms"] * 1e3 / ceilings["gemm"][gemm])
        if not form.error:
            timer.attempt(form, count, record, form, timer.cuda)
        if form.error:
            record["error"] = form.error
        records.append(record)
        results.add(record)
    configure()
    return records


def count(record: dict, form: Form, cuda: bool) -> None:
    """Memory, operators and kernels of one call."""
    if form.memory:
        record["peak_bytes"] = peak_bytes(form.run, cuda)
    record |= calls(form.run, cuda)
    if form.forward:
        record["saved_bytes"] = saved_bytes(form.forward, form.parameters)


def peak_bytes(run: Callable[[], Any], cuda: bool) -> int:
    """The most bytes that `run` allocates at the same time."""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    library = _library._C  # without a cache: the profiler sees only what torch allocates
    limit = library.set_cache_limit(0) if library else 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    if library:
        library.set_cache_limit(limit)
    profiler: Any = profile.profiler
    events = profiler.kineto_results.events()
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    return max(accumulate((c[2] for c in changes), initial=0))


def calls(run: Callable[[], Any], cuda: bool) -> dict[str, int]:
    """Of one call: operators that no other operator calls (another runtime has none), and on CUDA kernels (copies and
    fills, too) and launches, of which a CUDA graph needs one."""
    with torch.profiler.profile() as profile:
        run()
        if cuda:
            torch.cuda.synchronize()
    counted = counts(profile.events())
    return counted if cuda else {"operators": counted["operators"]}


def counts(events: Any) -> dict[str, int]:
    operators = sum(is_operator(event) and not is_operator(event.cpu_parent) for event in events)
    launches = sum(event.name.startswith("cu") and "Launch" in event.name for event in events)
    return {"operators": operators, "kernels": device_events(events), "launches": launches}


def is_operator(event: Any) -> bool:
    return event is not None and event.name.startswith(("aten::", "alexnet_cuda::"))


def device_events(events: Any) -> int:
    """How many of them ran on the device, without the ranges that an optimizer or a compiled graph annotates."""
    cuda = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == cuda and not event.is_user_annotation for event in events)


def saved_bytes(forward: Callable[[], Any], parameters: Iterable[Tensor] = ()) -> int:
    """Bytes kept for backward, each storage once, parameters not counted."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    for p in parameters:
        storages.pop(p.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def sees_memory(mode: str, cuda: bool) -> bool:
    """Whether `peak_bytes` sees what code of this torch.compile mode allocates ("": not compiled). On the CPU the
    profiler does not record it, and a CUDA graph allocates when it is captured, not when it runs."""
    return not mode or (cuda and not torch._inductor.list_mode_options(mode).get("triton.cudagraphs"))


def graphed(run: Callable[[], Any]) -> Callable[[], None]:
    """`run` as a CUDA graph, captured at the first call."""
    captured: list[torch.cuda.CUDAGraph] = []

    def call() -> None:
        if not captured:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            captured.append(graph)
        captured[0].replay()

    return call


def start(flags: argparse.ArgumentParser, args: argparse.Namespace, half: str) -> tuple[Timer, dict[str, Any]]:
    """Applies the flags that all benchmarks have; the timer and the ceilings. `half`: the default dtype on CUDA."""
    args.end = time.monotonic() + args.time
    if args.threads:
        torch.set_num_threads(args.threads)
    args.dtype = args.dtype or [half if args.device == "cuda" else "float32"]
    if "tf32" in args.dtype and args.device != "cuda":
        flags.error("--dtype tf32 needs --device cuda")
    configure()
    timer, products = Timer(args.device), [dtype.replace("autocast", "bfloat16") for dtype in args.dtype]
    if args.launch:
        return timer, {}
    return timer, measure_ceilings(args.device, products, timer, small=args.budget < 0.2)


def measure_ceilings(device: str, dtypes: Iterable[str], timer: Timer, small: bool = False) -> dict[str, Any]:
    """The machine's best copy rates in bytes/s (read plus written) and matrix product rates in flop/s, random data."""
    n, elements = (8192, 1 << 30) if device == "cuda" else (2048, 1 << 25)
    if small:
        n, elements = 256, 1 << 20
    source = torch.randn(elements, device=device)
    target = torch.randn(elements, device=device)

    def rate(run: Callable[[], Any], work: int, **settings: bool) -> float:
        form = Form("", "", run, settings=settings)
        timer.alternate([form], 2.0, 10)
        if form.error:
            raise RuntimeError(form.error)
        return digits(work / min(form.seconds))

    ceilings: dict[str, Any] = {"copy": rate(lambda: target.copy_(source), 8 * elements), "gemm": {}}
    for name in dtypes:
        a, b = (torch.randn(n, n, device=device).to(DTYPES[name]) for _ in range(2))
        pixels, filters = a.view(1, n, 1, n).permute(0, 3, 2, 1), b.view(n, n, 1, 1)
        product, convolution = partial(torch.mm, a, b), partial(torch.conv2d, pixels, filters)  # two libraries
        forms = (product, convolution) if device == "cpu" else (product,)
        ceilings["gemm"][name] = max(rate(form, 2 * n**3, tf32=name == "tf32") for form in forms)
    console.print(f"copy {ceilings['copy'] / 1e9:.4g} GB/s; matrix product "
                  + ", ".join(f"{k} {v / 1e9:.4g} GFLOP/s" for k, v in ceilings["gemm"].items()))  # fmt: skip
    return ceilings


def report(title: str, records: list[dict], results: Results, wanted: list[str] | None) -> None:
    """Prints our fastest form, the fastest other one and their ratio, then the forms that failed. `wanted`: the names
    of the forms to measure; None: all."""
    ours = [r for r in records if r["form"].startswith("ours")]
    missing = not ours and (not wanted or any(name.startswith("ours") for name in wanted))
    if missing or any("error" in r for r in ours):
        results.failed.append(title)
    timed = sorted((r for r in records if "median_ms" in r), key=lambda r: r["median_ms"])
    pair = [next((r for r in timed if r["form"].startswith("ours") == own), None) for own in (True, False)]
    line = "; ".join([title, *(f"{r['form']} {r['layout']} {r['median_ms']:.3g} ms" if r else "-" for r in pair)])
    if pair[0] and pair[1]:
        line += f"; {pair[1]['median_ms'] / pair[0]['median_ms']:.2f}x"
    console.print(line + "".join(f"\n  {r['form']} {r['layout']}: {r['error']}" for r in records if "error" in r))


def run(
    kind: str, cases: dict[str, tuple], prepare: Callable[..., tuple[dict, Iterable[Form]]], timer: Timer,
    args: argparse.Namespace, ceilings: dict,
) -> int:  # fmt: skip
    """Measures all cases (title: arguments of `prepare`, which returns a case's record and its forms)."""
    with Results(args.output, kind, machine(args.device), ceilings) as results:
        for title, arguments in cases.items():
            if time.monotonic() > args.end:
                console.print(f"{title}: no time left")
                results.complete = False
                continue
            torch.compiler.reset()
            torch.manual_seed(0)
            case, every = prepare(*arguments)
            forms = (form for form in every if form.name in (args.forms or [form.name]))
            if args.launch:
                for form in forms:
                    configure(**form.settings)
                    form.run()
                continue
            report(title, measure(forms, timer, args, ceilings, case, results), results, args.forms)
    return results.exit_code()
