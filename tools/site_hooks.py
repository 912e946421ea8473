"""What mkdocs.yml adds: the page on contributing, from outside docs/, and links that work on GitHub and on the site.

A link to a file outside docs/ becomes one to the repository, at the line that defines the name in the link's text; a
link to a run folder becomes one to its report. A figure links to itself, where it is larger. A page of a notebook
begins with links to the notebook.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
CONTRIBUTING = ROOT / ".github" / "CONTRIBUTING.md"
GITHUB, COLAB = "https://github.com/", "https://colab.research.google.com/github/"
FIGURE = re.compile(r"^!\[[^\]]*\]\(([^)\s]+)\)$", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[([^\]\n]*)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "contributing.md", abs_src_path=str(CONTRIBUTING)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = Path(page.file.abs_src_path or "").resolve()
    here = DOCS / Path(page.file.src_uri).parent

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], (source.parent / match[2]).resolve(), match[3] or ""
        if not target.exists():
            return match[0]  # MkDocs then says so
        if target.is_dir() and (target / "report.html").exists():
            target /= "report.html"
        if target.is_dir() and (target / "README.md").exists() and target.is_relative_to(DOCS):
            target /= "README.md"
        shown = DOCS / "contributing.md" if target == CONTRIBUTING else target
        inside = shown.is_relative_to(DOCS) and shown.suffix != ".py" and not shown.is_dir()
        if inside:
            return f"[{text}]({os.path.relpath(shown, here)}{anchor})"
        if not config.repo_url:
            return text
        kind = "tree" if target.is_dir() else "blob"
        return f"[{text}]({config.repo_url}/{kind}/HEAD/{target.relative_to(ROOT)}{anchor or line(text, target)})"

    text = LINK.sub(link, markdown)
    notebook = source.with_suffix(".ipynb")
    if notebook.exists():
        links = [f"[Download this notebook]({notebook.name})"]
        if (config.repo_url or "").startswith(GITHUB):
            place = f"{config.repo_url.removeprefix(GITHUB).strip('/')}/blob/HEAD/{notebook.relative_to(ROOT)}"
            links.insert(0, f"[Open this notebook on Colab]({COLAB}{place})")
        title, _, rest = text.partition("\n")
        text = f"{title}\n\n{' · '.join(links)}\n{rest}"
    return FIGURE.sub(r"[\g<0>](\1)", text)


def line(text: str, file: Path) -> str:
    """#L and the first line that defines the name in backquotes, or has it; "" where there is none."""
    name = re.fullmatch(r"`([\w.]+)\W*`", text)
    if not name or file.is_dir():
        return ""
    word = re.escape(name[1].split(".")[-1])
    lines = file.read_text("utf-8").splitlines()
    for pattern in (rf"(def|class|struct|void|template.*)\s+{word}\b", rf"\b{word}\b"):
        for number, content in enumerate(lines, 1):
            if re.search(pattern, content):
                return f"#L{number}"
    return ""
