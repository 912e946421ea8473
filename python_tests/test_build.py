"""The build itself: what is left out where it does not compile, and which CUDA architectures are compiled."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITH_CUDA, PYTHON_ONLY = "cmake.define.ALEXNET_CUDA_WITH_CUDA", "wheel.cmake"


@pytest.fixture
def backend(monkeypatch):
    pytest.importorskip("scikit_build_core")
    monkeypatch.syspath_prepend(ROOT / "tools")
    yield importlib.import_module("backend")
    for name in ("backend", "find_torch"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("failures", "settings", "built"),
    [
        (0, {}, {}),
        (1, {}, {WITH_CUDA: "OFF"}),
        (2, {"x": "y"}, {"x": "y", WITH_CUDA: "OFF", PYTHON_ONLY: "false"}),
        (1, {WITH_CUDA: "ON"}, None),
        (3, {}, None),
    ],
)
def test_what_does_not_compile_is_left_out(failures, settings, built, backend, monkeypatch, capsys):
    tried = []

    def build_wheel(directory, settings, metadata):
        tried.append(settings)
        if len(tried) <= failures:
            raise SystemExit(1)
        return "a.whl"

    monkeypatch.setattr(backend._build, "build_wheel", build_wheel)
    monkeypatch.setattr(backend, "_has_compiler", lambda: True)
    if built is None:
        with pytest.raises(SystemExit):
            backend.build_wheel("dist", settings)
    else:
        assert backend.build_wheel("dist", settings) == "a.whl"
        assert tried[-1] == built
    assert capsys.readouterr().err.count("the build failed") == min(failures, 0 if WITH_CUDA in settings else 2)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
@pytest.mark.parametrize(
    ("gpus", "variables", "architectures"),
    [
        (["9.0"], {}, "90a-real"),
        (["8.6", "8.6", "12.0"], {}, "86-real;120-real"),
        (["8.6", "13.0"], {}, "80-virtual"),  # unknown to this nvcc
        (["7.5"], {}, "80-virtual"),
        ([], {}, "80-virtual"),
        (None, {}, "80-virtual"),
        (["9.0"], {"TORCH_CUDA_ARCH_LIST": "8.0 9.0a+PTX"}, "80-real;90a"),
        (["9.0"], {"TORCH_CUDA_ARCH_LIST": ""}, "90a-real"),
        (["9.0"], {"TORCH_CUDA_ARCH_LIST": "7.5,8.0; 12.0"}, "80-real;120-real"),
        (["9.0"], {"TORCH_CUDA_ARCH_LIST": "Turing 7.0+PTX All"}, "90a-real"),
        (["9.0"], {"TORCH_CUDA_ARCH_LIST": "Ampere;hopper Blackwell"}, "80-real;86;90;100-real;120"),
        (["9.0"], {"CUDAARCHS": "80-real;86", "TORCH_CUDA_ARCH_LIST": "9.0a"}, "80-real;86"),
    ],
)
def test_architectures(gpus, variables, architectures, tmp_path):
    """`gpus`: what nvidia-smi lists; None: it fails."""
    write_program(tmp_path / "nvcc", "echo sm_75 sm_80 sm_86 sm_90 sm_100 sm_120")
    write_program(tmp_path / "nvidia-smi", "exit 9" if gpus is None else "\n".join(f"echo {gpu}" for gpu in gpus))
    script = tmp_path / "script.cmake"
    script.write_text(
        f"set(CMAKE_CUDA_COMPILER {tmp_path}/nvcc)\ninclude({ROOT}/tools/cuda_architectures.cmake)\n"
        'message("[${CMAKE_CUDA_ARCHITECTURES}]")\n'
    )
    command = [shutil.which("cmake"), "-P", script]
    run = subprocess.run(command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"} | variables, capture_output=True, text=True)
    assert f"[{architectures}]" in run.stderr, run.stderr


VERSION = "[ $1 = --version ] && exec echo Cuda compilation tools, release {0}, V{0}.88\n"


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
@pytest.mark.parametrize(
    ("nvcc", "found", "reason"),
    [
        (VERSION.format("13.0") + "exit 0", "13.0.88", ""),
        (VERSION.format("99.1") + "exit 0", "99.1.88", ""),
        ("exit 1", "", "nvcc --version shows no version of CUDA"),
        ("kill -SEGV $$", "", "nvcc --version shows no version of CUDA"),
        ("echo another compiler, Version 3", "", "nvcc --version shows no version of CUDA"),
        (VERSION.format("11.8"), "", "nvcc is CUDA 11.8.88, older than 12.0"),
        (VERSION.format("12.4") + "echo unsupported GNU version; echo more; exit 1", "",
         "nvcc, CUDA 12.4.88, does not compile (unsupported GNU version)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("variable", ["PATH", "CUDACXX", "CUDA_HOME"])
def test_an_nvcc_that_does_not_work_has_a_reason(nvcc, found, reason, variable, tmp_path):
    (tmp_path / "bin").mkdir()
    write_program(tmp_path / "bin" / "nvcc", nvcc)
    value = {"PATH": f"{tmp_path}/bin:/bin", "CUDACXX": f"{tmp_path}/bin/nvcc -g", "CUDA_HOME": str(tmp_path)}[variable]
    script = tmp_path / "script.cmake"
    script.write_text(f'include({ROOT}/tools/find_nvcc.cmake)\nmessage("[${{BUILD_CUDA_VERSION}}] ${{NO_CUDA}}")\n')
    command = [shutil.which("cmake"), "-P", script]
    run = subprocess.run(command, env={"PATH": "/bin", variable: value}, capture_output=True, text=True, cwd=tmp_path)
    message = run.stderr.strip().replace(f"{tmp_path}/bin/", "")
    assert message == f"[{found}] {reason}".strip()


@pytest.mark.parametrize(
    ("version", "found"), [(None, False), ("2.10.1+cpu", False), ("2.11.0", True), ("3.0.0a0+git1", True)]
)
def test_a_torch_that_is_absent_or_too_old_is_not_compiled_against(version, found, tmp_path):
    """The folder of torch that TORCH_DIR names; without headers of the stable ABI it is as good as absent."""
    if version:
        header = tmp_path / "include" / "torch" / "csrc" / "stable" / "library.h"
        header.parent.mkdir(parents=True)
        header.write_text("")
        (tmp_path / "version.py").write_text(f"__version__ = '{version}'\n")
    command = [sys.executable, ROOT / "tools" / "find_torch.py"]
    run = subprocess.run(command, env={"TORCH_DIR": str(tmp_path)}, capture_output=True, text=True)
    if found:
        assert run.stdout == f"{tmp_path}/include;{tmp_path}/lib;{version}\n"
    else:
        assert (run.returncode, run.stderr.count("\n")) == (1, 1)
        assert "no torch >= 2.11 found: install torch, or set TORCH_DIR" in run.stderr


def test_the_torch_of_an_active_environment_is_found_where_uv_hides_it(backend, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/home/me/.venv/bin")
    monkeypatch.delenv("TORCH_DIR", raising=False)
    python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    found = list(importlib.import_module("find_torch").candidates())
    assert Path(f"/home/me/.venv/lib/{python}/site-packages/torch") in found


def write_program(path, body):
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
