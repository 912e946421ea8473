"""Build backend: scikit-build-core, asking for torch only if there is none. What cannot be compiled here is left out of
the installation, and the output says so: the CUDA kernels, or all kernels."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403

sys.path.insert(0, os.path.dirname(__file__))
from find_torch import OLDEST, find_torch

Settings = dict[str, Any] | None
WITH_CUDA = "cmake.define.ALEXNET_CUDA_WITH_CUDA"


def _has_compiler() -> bool:
    names = (os.environ.get("CXX", "").split() or [""])[0], "c++", "g++", "clang++"
    return any(shutil.which(name) for name in names if name)


def _settings(settings: Settings) -> Settings:
    """Pure Python if there is no compiler: the plain-torch versions of the ops serve, and say so when imported."""
    if _has_compiler():
        return settings
    print("alexnet_cuda: no C++ compiler (CXX, c++, g++, clang++): installing without kernels", file=sys.stderr)
    return {**(settings or {}), "wheel.cmake": "false"}


def _requires(requires: list[str]) -> list[str]:
    return [*requires, f"torch>={OLDEST[0]}.{OLDEST[1]}"] if _has_compiler() and not find_torch() else requires


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return _requires(_build.get_requires_for_build_wheel(_settings(config_settings)))


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return _requires(_build.get_requires_for_build_editable(_settings(config_settings)))


def prepare_metadata_for_build_wheel(directory: str, config_settings: Settings = None) -> str:
    return _build.prepare_metadata_for_build_wheel(directory, _settings(config_settings))


def prepare_metadata_for_build_editable(directory: str, config_settings: Settings = None) -> str:
    return _build.prepare_metadata_for_build_editable(directory, _settings(config_settings))


def build_wheel(directory: str, config_settings: Settings = None, metadata: str | None = None) -> str:
    """With the CUDA kernels; if they do not compile, with the CPU kernels; if those do not either, in pure Python.

    An old or broken toolkit thus never stops an installation, unless CUDA was asked for (ALEXNET_CUDA_WITH_CUDA=ON)."""
    settings = _settings(config_settings) or {}
    if settings.get("wheel.cmake") == "false" or settings.get(WITH_CUDA) == "ON":
        return _build.build_wheel(directory, settings, metadata)
    for without, change in (("CUDA kernels", {WITH_CUDA: "OFF"}), ("kernels", {"wheel.cmake": "false"})):
        try:
            return _build.build_wheel(directory, settings, metadata)
        except SystemExit:  # its way to say that CMake or a compiler failed
            print(f"alexnet_cuda: the build failed (see above): installing without {without}", file=sys.stderr)
            settings = {**settings, **change}
    return _build.build_wheel(directory, settings, metadata)


def build_editable(directory: str, config_settings: Settings = None, metadata: str | None = None) -> str:
    return _build.build_editable(directory, _settings(config_settings), metadata)
