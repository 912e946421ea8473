"""The documentation is of today: its Python runs, its tables are of the code, its links lead somewhere."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OUTSIDE = ("README.md", ".github/CONTRIBUTING.md", "benchmarks/README.md")
PAGES = [*(ROOT / name for name in OUTSIDE), *sorted(DOCS.rglob("*.md"))]
RUN = ("index", "start", "explained", "variants", "kernels_explained", "faq", "own_network")
WRITTEN = [DOCS / f"{name}.md" for name in RUN]
FOREIGN = {name for name in ("timm", "transformers") if importlib.util.find_spec(name) is None}  # not requirements
LINK = re.compile(r"\[([^\]\n]*)\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)")
spec = importlib.util.spec_from_file_location("docs_tables", DOCS / "tables.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_python_of_a_page_runs(page):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    assert blocks
    for block in blocks:
        if any(f"import {name}" in block or f"from {name}" in block for name in FOREIGN):
            continue
        exec(compile(block, str(page), "exec"), {})


def test_tables_are_of_the_code():
    assert tables.main(["--check"]) == 0, "run python docs/tables.py"


def anchors(text):
    """Of the headings, as GitHub and MkDocs make them."""
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\s-]", "", title).strip().lower().replace(" ", "-") for title in titles}


def mistakes(page, text):
    for name, target, anchor in LINK.findall(text):
        path = (page.parent / target).resolve() if target else page
        path = path / "README.md" if anchor and path.is_dir() else path
        if not path.exists():
            yield f"{target} does not exist"
        elif anchor and anchor not in anchors(path.read_text("utf-8")):
            yield f"{target} has no heading #{anchor}"
        elif path.suffix in (".py", ".h", ".cu", ".cpp"):
            word = re.fullmatch(r"`(\w+)`", name)
            if word and not re.search(rf"\b{word[1]}\b", path.read_text("utf-8")):
                yield f"{target} has no {word[1]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page):
    assert not list(mistakes(page, page.read_text("utf-8")))


def test_wrong_links_are_found():
    text = "[a](none.md) [b](variants.md#none) [`no_such_name`](../alexnet_cuda/model.py) [c](variants.md) [d](#none)"
    assert len(list(mistakes(DOCS / "index.md", text))) == 4
