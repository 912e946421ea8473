"""report.html: one self-contained page with everything that is known of a run."""

import dataclasses
import io
import math
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure
from scipy.stats import binomtest

from ..data import ImageSet
from ..recipe import Recipe
from ..words import MISSING, percent
from .charts import INK


def template(name: str) -> jinja2.Template:
    """A template of this folder."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("alexnet_cuda.reports", ""), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(percent=percent, number=number)
    return environment.get_template(name)


def html(
    recipe: Recipe, images: ImageSet, m: dict, history: list[dict[str, str]], per_class: list[dict], **parts: Any
) -> str:
    """The page. m: the contents of metrics.json. history: the rows of metrics.csv. per_class: `tables.per_class`.
    parts: other variables of the template: charts (results of `svg` by name), cards, the most frequent mistakes."""
    counts, defaults = images.counts(), Recipe()
    values = [(field.name, getattr(recipe, field.name)) for field in dataclasses.fields(recipe)]
    return template("report.html.jinja").render(
        parts,
        recipe=recipe,
        images=images,
        m=m,
        per_class=per_class,
        title=title(recipe),
        figures=key_figures(m),
        epochs=_epochs(history),
        counts=list(zip(images.classes, *counts.values(), strict=True)),
        weakest=sorted((row for row in per_class if math.isfinite(row["f1"])), key=lambda row: row["f1"])[:10],
        totals=[sum(values) for values in counts.values()],
        values=[(name, str(v), v != getattr(defaults, name)) for name, v in values],
    )


def title(recipe: Recipe) -> str:
    """The network and the data of a run; of photographs in a folder, the folder's name."""
    own = recipe.data == "folder" and recipe.data_path
    return f"{recipe.variant} on {Path(str(own)).name if own else recipe.name}"


def key_figures(m: dict) -> list[tuple[str, str, str]]:
    """Name, value and explanation of the most important metrics in metrics.json."""
    n = m["images"]["test"]
    share = m["test/accuracy"]
    memory = f", peak memory: {m['peak_memory_mib'] / 1024:.1f} GiB" if m.get("peak_memory_mib") else ""
    rows = []
    if math.isfinite(share):
        low, high = binomtest(round(share * n), n).proportion_ci(method="wilson")
        interval = f"95 % interval {100 * low:.1f} to {percent(high, 1)}"
        rows.append(("test accuracy", percent(share), f"of {n:,} images; {interval}"))
    for key, name, form, note in (
        ("test/top5", "top-5 accuracy", percent, "true class among the five most probable"),
        ("test/loss", "loss", number, "cross-entropy on the test images"),
        ("test/f1", "macro F1", percent, "mean over the classes"),
        ("test/calibration_error", "calibration error", percent, "how far confidence is from accuracy"),
        ("parameters", "parameters", number, m.get("variant", "")),
        ("seconds", "training time", duration, f"epochs: {m.get('epochs')}, steps: {m.get('steps', 0):,}{memory}"),
    ):
        if key in m:
            rows.append((name, form(m[key]), note))
    return rows


def svg(figure: Figure) -> Markup:
    """A figure to embed in the page: without title and background, with the text colour of the page for INK and the
    texts of `charts.tip`."""
    title = figure.get_suptitle()
    figure.suptitle("")
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Type", "Format"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    figure.suptitle(title)
    text = buffer.getvalue()
    text = re.sub(r'<g id="tip:([^"]*)">', r"<g><title>\1</title>", text[text.index("<svg") :])
    return Markup(text.replace(INK, "currentColor"))


def number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if math.isfinite(value) else MISSING


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.1f} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _epochs(history: list[dict[str, str]]) -> list[dict[str, float]]:
    """The metrics of each epoch, merged from several rows of metrics.csv."""
    epochs: dict[int, dict[str, float]] = {}
    for row in history:
        for key, value in row.items():
            if value and key not in ("epoch", "step", "train/step_loss") and not key.startswith("lr"):
                epochs.setdefault(int(row["epoch"]), {})[key] = float(value)
    return [{"epoch": number + 1, **values} for number, values in sorted(epochs.items())]
