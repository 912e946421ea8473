"""Writes docs/benchmarks.md, the table in README.md and the pictures in docs/ from benchmarks/results/*.json.

--from ARCHIVE first puts the results of a GPU check (benchmarks/gpu_check.py) there. --check only compares: exit code 1
if one of them differs from the results.
"""

import argparse
import json
import sys
import tarfile
from collections.abc import Callable
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- measured: from benchmarks/results by benchmarks/tables.py -->\n", "<!-- /measured -->"
KINDS = {"cpu": "CPU", "cuda": "CUDA"}
BENCHMARKS = {"ops": "operators", "model": "whole networks", "kernelbench": "KernelBench"}
FAMILIES = {  # first words of a form's name: its column
    "ours deterministic": "ours, deterministic", "ours without wgmma": "ours, without wgmma",
    "ours with epilogues": "ours, with epilogues", "ours": "ours", "eager autocast": "eager autocast", "eager": "eager",
    "space-to-depth": "eager", "compile": "torch.compile", "onnxruntime": "ONNX Runtime",
    "openvino bfloat16": "OpenVINO bfloat16", "openvino": "OpenVINO",
    "keras": "Keras",
}  # fmt: skip
CAPTIONS = "Speed-up over the fastest alternative", "The same under the roofline"
OTHERS = {name for form, name in FAMILIES.items() if not form.startswith("ours")}


def family(record: dict) -> str:
    """The column of a form: the best of its settings stands there."""
    return next(name for form, name in FAMILIES.items() if record["form"].startswith(form))


def cases(result: dict) -> list[list[dict]]:
    """The records of each case, in the file's order; those that failed are left out."""
    key = itemgetter("case", "shape", "pass", "dtype", "batch")
    return [timed for _, g in groupby(result["records"], key) if (timed := [r for r in g if "median_ms" in r])]


def fastest(records: list[dict], *families: str) -> dict | None:
    return min((r for r in records if family(r) in families), key=itemgetter("median_ms"), default=None)


def columns(result: dict) -> list[tuple[str, str | None]]:
    """(family, layout) of every column of times; other runtimes have one column whatever the layout."""
    order = ["ours", *FAMILIES.values()]
    names = {(f, r["layout"] if f.startswith(("ours", "eager")) else None)
             for rs in cases(result) for r in rs for f in [family(r)]}  # fmt: skip
    return sorted(names, key=lambda c: (order.index(c[0]), c[1] or ""))


def ratio(records: list[dict], *others: str) -> float | None:
    """How many times as long as ours the best of these families takes; none named: of all."""
    ours = fastest(records, "ours")
    other = fastest(records, *(others or OTHERS))
    return other["median_ms"] / ours["median_ms"] if ours and other else None


def milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def size(r: dict) -> str:
    return f"{r['batch']}x{'x'.join(map(str, r['shape']))} {r['dtype']}"


def table(result: dict) -> list[str]:
    heads = columns(result)
    names = [f"{f}, {layout}" if layout else f for f, layout in heads]
    header = ["what", "input", "pass", *names, "eager / ours", "speed-up", "share", "saved, ours / eager",
              "peak, ours / eager"]  # fmt: skip
    counted = any("kernels" in r for r in result["records"])
    header += ["kernels, ours / eager"] * counted
    lines = ["| " + " | ".join(header) + " |", "|---|---|---|" + "---:|" * (len(header) - 3)]
    for records in cases(result):
        r = records[0]
        cells = [r["case"], size(r), r["pass"]]
        for f, layout in heads:
            found = fastest([r for r in records if layout in (None, r["layout"])], f)
            cells.append(milliseconds(found["median_ms"]) if found else "-")
        ours, eager = ([r for r in records if family(r) == name == r["form"].split()[0]] for name in ("ours", "eager"))
        fast = fastest(records, "ours")
        share = max(fast.get("copy_share", 0), fast.get("gemm_share", 0)) if fast else 0
        cells += [f"**{times:.3g}**" if times else "-" for times in (ratio(records, "eager"), ratio(records))]
        cells.append(f"{share:.0%}" if share else "-")
        cells += [" / ".join(least(rs, key, 2**20) for rs in (ours, eager)) for key in ("saved_bytes", "peak_bytes")]
        cells += [" / ".join(least(rs, "kernels") for rs in (ours, eager))] * counted
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def least(records: list[dict], key: str, unit: int = 1) -> str:
    values = [r[key] for r in records if key in r]
    return f"{min(values) / unit:.3g}" if values else "-"


def section(name: str, result: dict) -> list[str]:
    m, ceilings = result["machine"], result["ceilings"]
    products = ", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in ceilings["gemm"].items())
    kernels = f"{m['threads']} threads, {m['cpu_kernels']}" if m["kind"] == "cpu" else f"CUDA {m['cuda']}"
    facts = f"{m['device']} ({kernels}), torch {m['torch']}, commit {m['commit']}, {m['date'][:10]}"
    copy = round(ceilings["copy"] / 1e9, 1)
    return [
        f"**{KINDS[m['kind']]}, {BENCHMARKS[result['kind']]}**: {facts}; copy {copy:g} GB/s, matrix product {products}"
        + ("." if result["complete"] else "; this run was stopped before its end."),
        "",
        *table(result),
        "",
        *(line for text, path in zip(CAPTIONS, pictures(name, result)) for line in (f"![{text}]({path.name})", "")),
    ]


def measured(results: dict[str, dict]) -> str:
    """The generated part of docs/benchmarks.md."""
    lines = [line for name, result in results.items() for line in section(name, result)]
    for kind, title in KINDS.items():
        if not any(r["machine"]["kind"] == kind for r in results.values()):
            lines += [f"**{title}**: not measured yet; no figure here is an estimate.", ""]
    return "\n".join(lines)


def summary(results: dict[str, dict]) -> str:
    """The generated part of README.md: whole networks, our best form against the best other one."""
    lines = ["| network | images | device | pass | this package | best other | ratio |",
             "|---|---:|---|---|---:|---|---:|"]  # fmt: skip
    for result in results.values():
        device = result["machine"]["device"]
        for records in cases(result) if result["kind"] == "model" else ():
            r, ours, other = records[0], fastest(records, "ours"), fastest(records, *OTHERS)
            if ours and other:
                times = milliseconds(ours["median_ms"]), milliseconds(other["median_ms"])
                lines.append(f"| `{r['case']}`, {r['dtype']} | {r['batch']} | {device} | {r['pass']} | {times[0]} ms "
                             f"| {family(other)}, {times[1]} ms | **{ratio(records):.2f}** |")  # fmt: skip
    return "\n".join([*lines, ""])


def operations(r: dict) -> int:
    """Arithmetic operations of a case. Convolution: its products and sums; LRN: 9 per element, its gradient 19; ReLU: 1
    and 1; pooling: 8 comparisons per output, its gradient 1 addition."""
    channels, height, width = r["shape"]
    if r["case"].startswith("conv2d"):
        channels, height, width = 96, (height - 11) // 4 + 1, (width - 11) // 4 + 1
    elements = r["batch"] * channels * height * width
    pooled = r["batch"] * channels * ((height - 3) // 2 + 1) * ((width - 3) // 2 + 1)
    training = r["pass"] == "training"
    each = (9 + 19 * training) * ("lrn" in r["case"] or "norm" in r["case"]) + (1 + training) * ("relu" in r["case"])
    return r["flops"] + elements * each + pooled * (8 + training) * ("pool" in r["case"])


def points(result: dict) -> list[tuple[dict, dict, dict]]:
    """(a record of the case, ours, best other) of each operator with the largest batch."""
    known = [records for records in cases(result) if records[0].get("bytes") and result["kind"] == "ops"]
    largest = max((records[0]["batch"] for records in known), default=0)
    pairs = [(rs[0], fastest(rs, "ours"), fastest(rs, *OTHERS)) for rs in known]
    return [(r, ours, other) for r, ours, other in pairs if ours and other and r["batch"] == largest]


def draw_roofline(result: dict) -> Figure:
    """Operations a second over operations a byte, below the measured rates; a panel for each dtype."""
    every = points(result)
    dtypes = list(dict.fromkeys(r["dtype"] for r, _, _ in every))
    figure = Figure(figsize=(9, 0.8 + 4.6 * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), squeeze=False)[:, 0]
    colours = {operator: f"C{i}" for i, operator in enumerate(dict.fromkeys(r["case"] for r, _, _ in every))}
    for axes, dtype in zip(panels, dtypes):
        shown = [point for point in every if point[0]["dtype"] == dtype]
        intensities = [operations(r) / r["bytes"] for r, _, _ in shown]
        copy, gemm = result["ceilings"]["copy"], result["ceilings"]["gemm"][dtype]
        left, right = min(intensities) / 2, 4 * max(*intensities, gemm / copy)
        axes.plot([left, gemm / copy, right], [copy * left, gemm, gemm], color="black", lw=1.2)
        label = f"torch's matrix product, {dtype}: {gemm / 1e12:.3g} TFLOP/s"
        axes.annotate(label, (gemm / copy, gemm), (-4, 4), textcoords="offset points", ha="right")
        middle = (left * gemm / copy) ** 0.5
        label = f"torch's copy: {round(copy / 1e9, 1):g} GB/s"
        axes.annotate(label, (middle, copy * middle), (-8, 4), textcoords="offset points", ha="right")
        for x, (r, ours, other) in zip(intensities, shown):
            heights = [x * r["bytes"] / (1e-3 * record["median_ms"]) for record in (other, ours)]
            marker = "o" if r["pass"] == "inference" else "s"
            style = {"color": colours[r["case"]], "marker": marker, "markersize": 9 if r["shape"][0] <= 96 else 6}
            axes.plot([x, x], heights, color=style["color"], linewidth=0.8)
            axes.plot(x, heights[0], **style, markerfacecolor="white")
            axes.plot(x, heights[1], **style)
        axes.set(xscale="log", yscale="log", xlabel="operations per byte that has to be moved",
                 ylabel="operations per second",
                 title=f"{result['machine']['device']}, {dtype}, batch {shown[0][0]['batch']}")  # fmt: skip
        axes.grid(color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        key = [axes.plot([], [], "o", color=colour, label=c)[0] for c, colour in colours.items()]
        for kind, marker in (("inference", "o"), ("training", "s")):
            key.append(axes.plot([], [], marker, color="0.4", label=f"ours, {kind}")[0])
            key.append(axes.plot([], [], marker, color="0.4", markerfacecolor="white", label=f"best other, {kind}")[0])
        axes.legend(handles=key, fontsize="small", loc="lower right")
    return figure


def draw(result: dict) -> Figure:
    """A dot for each speed-up, on a line from 1: equal times."""
    rows = [(records[0], times) for records in cases(result) if (times := ratio(records))]
    figure = Figure(figsize=(9, 1.3 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, (r, times) in enumerate(rows):
        colour = "tab:blue" if r["pass"] == "inference" else "tab:orange"
        axes.plot([1, times], [y, y], color=colour, linewidth=2.5, alpha=0.5)
        axes.plot(times, y, "o", color=colour)
        axes.annotate(f"{times:.2f}x", (times, y), (7 if times >= 1 else -7, 0), textcoords="offset points",
                      ha="left" if times >= 1 else "right", va="center", fontsize="small")  # fmt: skip
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="speed-up over the fastest alternative (1x: as fast)")
    axes.set_yticks(range(len(rows)), [f"{r['case']} {size(r)}, {r['pass']}" for r, _ in rows])
    low, high = min(1, *(times for _, times in rows)), max(1, *(times for _, times in rows))
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low / 2 <= t <= high * 2]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    axes.set(xlim=(low / 1.6, high * 1.6), ylim=(-0.6, len(rows) - 0.4))
    axes.grid(axis="x", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"This package against the fastest alternative, {result['machine']['device']}", fontsize="medium")
    return figure


def pictures(name: str, result: dict) -> dict[Path, Callable[[dict], Figure]]:
    """The files that show a result, and what draws them."""
    drawn = {"measured": draw} | ({"roofline": draw_roofline} if points(result) else {})
    return {Path("docs") / f"{kind}-{name}.svg": function for kind, function in drawn.items()}


def filled(path: Path, text: str) -> str:
    """The file's text with `text` between its two markers."""
    before = path.read_text()
    if BEGIN not in before or END not in before:
        sys.exit(f"tables: {path} lacks the lines {BEGIN.strip()} and {END}")
    head, rest = before.split(BEGIN, 1)
    return head + BEGIN + text + END + rest.split(END, 1)[1]


def take(archive: Path, results: Path) -> None:
    """The result files in an archive; of a benchmark that was cut off, what it had measured."""
    import common  # which imports torch

    with tarfile.open(archive) as tar:
        for member in tar:
            path = results / member.name.removesuffix(".part")
            if path.suffix == ".json" and path.name.startswith(tuple(f"{kind}-" for kind in KINDS)):
                path.parent.mkdir(parents=True, exist_ok=True)
                (results / member.name).write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
                if path.name not in member.name.split("/"):
                    common.finish(path, complete=False)


def main(arguments: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--check", action="store_true", help="change nothing")
    flags.add_argument("--from", type=Path, dest="archive", metavar="ARCHIVE", help="results.tar.gz of a GPU check")
    flags.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    flags.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs/")
    args = flags.parse_args(arguments)
    if args.archive:
        take(args.archive, args.results)
    results = {path.stem: json.loads(path.read_text()) for path in sorted(args.results.glob("*.json"))}
    order = lambda r: (list(KINDS).index(r["machine"]["kind"]), list(BENCHMARKS).index(r["kind"]))
    results = dict(sorted(results.items(), key=lambda item: (*order(item[1]), item[0])))
    texts = {args.root / "README.md": summary(results), args.root / "docs" / "benchmarks.md": measured(results)}
    wanted = {path: filled(path, text) for path, text in texts.items()}
    if args.check:
        stale = [path for path, text in wanted.items() if path.read_text() != text]
        drawn = (args.root / path for name, result in results.items() for path in pictures(name, result))
        stale += [path for path in drawn if not path.exists()]
        if stale:
            print(f"tables: {', '.join(map(str, stale))}: not what the results say; run benchmarks/tables.py")
        return int(bool(stale))
    for path, text in wanted.items():
        path.write_text(text)
    for name, result in results.items():
        for path, function in pictures(name, result).items():
            with matplotlib.rc_context({"svg.hashsalt": name}):
                function(result).savefig(args.root / path, metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
