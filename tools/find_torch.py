"""Finds the torch to compile against without importing it.

Looked at in this order: the TORCH_DIR environment variable; this interpreter's import path; the environment that pip
installs into (build isolation hides it from sys.path, but sysconfig still names it); the active virtual or conda
environment and those whose programs are on PATH, for build frontends that isolate in an environment of their own.
Prints "<include directory>;<library directory>;<version>".
"""

from __future__ import annotations

import importlib.util
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

OLDEST = (2, 11)


def candidates() -> Iterator[Path]:
    if os.environ.get("TORCH_DIR"):
        yield Path(os.environ["TORCH_DIR"])
        return
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        yield Path(spec.origin).parent
    sites = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    sites += [*site.getsitepackages(), site.getusersitepackages()]
    python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    roots = [os.environ.get("VIRTUAL_ENV", ""), os.environ.get("CONDA_PREFIX", "")]
    roots += [os.path.dirname(folder) for folder in os.get_exec_path()]  # uv hides the variable, not the PATH
    sites += [os.path.join(root, "lib", python, "site-packages") for root in roots if root]
    yield from (Path(directory) / "torch" for directory in dict.fromkeys(sites))


def find_torch() -> tuple[Path, Path, str] | None:
    for root in candidates():
        version_file = root / "version.py"
        if version_file.is_file() and (root / "include/torch/csrc/stable/library.h").is_file():
            match = re.search(r"__version__ = ['\"]([^'\"]+)", version_file.read_text())
            if match and tuple(map(int, match[1].split(".")[:2])) >= OLDEST:
                return root / "include", root / "lib", match[1]
    return None


if __name__ == "__main__":
    found = find_torch()
    if found is None:
        sys.exit(f"no torch >= {OLDEST[0]}.{OLDEST[1]} found: install torch, or set TORCH_DIR to its folder")
    print(*found, sep=";")
