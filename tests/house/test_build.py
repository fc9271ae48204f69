"""The build: one library for every torch, harmless to load, and an install that works without it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from parity import ROOT

from patchlight_kernels import extension

HAS_COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_the_cpu_library_is_built_where_a_compiler_is():
    if not HAS_COMPILER:
        pytest.skip("no C++ compiler")
    assert extension.missing("cpp") is None


def test_import_ssl_is_pythons_own():
    result = python("import ssl, patchlight, patchlight_kernels; print(ssl.SSLContext.__module__, ssl.__file__)")
    assert result.returncode == 0, result.stderr
    assert "lib/python" in result.stdout
    assert str(ROOT / "ssl") not in result.stdout


def test_loading_the_library_keeps_denormals():
    """Linked with fast-math, a library would flush denormals to zero for the whole process."""
    result = python(
        "import torch, patchlight_kernels as pk\n"
        "pk.neighbor_topk(torch.randn(1, 9, 4), (3, 3), 2)\n"
        "import numpy as np\n"
        "assert torch.tensor([1e-40]).mul(1.0).item() != 0 and np.float32(1e-40) * np.float32(1) != 0"
    )
    assert result.returncode == 0, result.stderr


def test_without_libraries_everything_still_runs(tmp_path):
    result = python(
        "import pathlib, patchlight_kernels.extension as e\n"
        f"e.FOLDER = pathlib.Path({str(tmp_path)!r})\n"
        "import torch, patchlight_kernels as pk\n"
        "x = torch.randn(1, 9, 4)\n"
        "print(pk.explain('neighbor_topk', x, (3, 3), 2)); print(pk.neighbor_topk(x, (3, 3), 2).shape)",
        TRITON_INTERPRET="0",
    )
    assert result.returncode == 0, result.stderr
    assert "reference runs" in result.stdout
    assert "is not built; build it with `make build`" in result.stdout
    assert result.stderr.count("operations on the CPU run in PyTorch, slower: libpatchlight_cpu.so is not built") == 1


@pytest.mark.parametrize("absent", ["triton", "nvidia.dali", "timm", "torchvision", "matplotlib"])
def test_imports_without(absent):
    """Optional packages, a compiler and a GPU may all be missing at import."""
    code = (
        f"import sys; sys.modules[{absent!r}] = None\n"
        "import torch, patchlight, patchlight_kernels as pk\n"
        "print(pk.neighbor_topk(torch.randn(1, 9, 4), (3, 3), 2).shape)"
    )
    result = python(code, TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("words", [["train", "debug"], ["evaluate", "knn"]], ids=" ".join)
def test_a_command_names_the_extra_that_it_lacks(words):
    code = f"import sys; sys.modules['timm'] = None; from patchlight.command import main; main({words!r})"
    result = python(code)
    assert result.returncode == 2
    told = "The package timm must be installed, got a Python without it; install it, or all that training needs with pip install"
    assert f"{told} 'patchlight[train]'." in result.stderr
    assert "Traceback" not in result.stderr


def copy_sources(folder: Path) -> None:
    """Copies what a build reads, with its times, without what is built already."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder / name)
    for name in ("csrc", "kernels", "ssl"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"), dirs_exist_ok=True
        )


def test_an_install_has_every_file(tmp_path):
    """Those of folders without an __init__.py too, and those that are not Python."""
    copy_sources(tmp_path)
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "installed"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    files = lambda top: {p.relative_to(top) for p in top.rglob("*") if p.suffix in (".py", ".md", ".typed", ".csv")}
    assert files(tmp_path / "installed") == files(tmp_path / "ssl") | files(tmp_path / "kernels")


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_other_systems_are_refused(system):
    result = python(f"import runpy, sys; sys.platform = {system!r}; runpy.run_path('setup.py')")
    assert result.returncode == 1
    assert result.stderr.startswith(f"patchlight: needs Linux, got {system}; on Windows use WSL 2")


def test_the_page_about_installing_has_every_option_and_names_extras_that_exist():
    page, setup = (ROOT / "docs/install.md").read_text(), (ROOT / "setup.py").read_text()
    options = set(re.findall(r'environ\.get\("(\w+)"', setup))
    assert options == set(re.findall(r"^\| `(\w+)=", page, re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"(?:\.|patchlight|\*\.whl\)?)\[([\w,]+)\]", page + (ROOT / "README.md").read_text())
    assert len(named) >= 4
    assert {extra for text in named for extra in text.split(",")} <= extras.keys()


def program(folder: Path, name: str, *lines: str) -> Path:
    """Writes a shell program of that name."""
    path = folder / name
    path.write_text("\n".join(["#!/bin/sh", *lines]))
    path.chmod(0o755)
    return path


def build_with_a_broken_compiler(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Builds a copy of the sources."""
    broken = program(folder, "broken-g++", "echo 'broken compiler' >&2", "exit 1")
    copy_sources(folder)
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, "CXX": str(broken), **environment},
        capture_output=True,
        text=True,
    )


def test_a_failed_build_says_so_and_leaves_nothing_stale(tmp_path):
    """A compiler that fails: exit 0, a sentence that says so, no partial library."""
    result = build_with_a_broken_compiler(tmp_path, PATCHLIGHT_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert "the C++ library could not be built (reason above). patchlight works without it" in result.stderr
    assert not list((tmp_path / "kernels").rglob("*.so"))


def without_a_gpu(folder: Path) -> str:
    """A search path with an nvidia-smi that finds no GPU."""
    program(folder, "nvidia-smi", "exit 9")
    return f"{folder}:{os.environ['PATH']}"


def test_without_a_gpu_no_cuda_library_is_built_and_an_old_one_is_deleted(tmp_path):
    old = tmp_path / "kernels/patchlight_kernels/lib/libpatchlight_cuda.so"
    old.parent.mkdir(parents=True)
    old.touch()
    os.utime(old, (0, 0))
    nvcc = program(tmp_path, "nvcc", "exit 1")
    environment = {
        "NVCC": str(nvcc),
        "PATH": without_a_gpu(tmp_path),
        "PATCHLIGHT_CUDA": "",
        "PATCHLIGHT_CUDA_ARCHS": "",
    }
    result = build_with_a_broken_compiler(tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    assert "no CUDA library: no GPU found that it could be built for (PATCHLIGHT_CUDA_ARCHS=all" in result.stdout
    assert "libpatchlight_cuda.so was older than its sources and is deleted" in result.stdout
    assert not old.exists()


@pytest.mark.parametrize(
    ("gpus", "archs"), [("9.0\n8.0\n9.0", ["80", "90a"]), ("10.0\n12.0", ["100", "120"]), ("7.5", []), ("", [])]
)
def test_the_cuda_library_is_for_the_gpus_of_this_machine(tmp_path, gpus, archs):
    """From 8.0 on: older ones have no tensor cores for bfloat16."""
    program(tmp_path, "nvidia-smi", f"printf '{gpus}\n'")
    code = "import runpy, sys; sys.argv = ['setup.py', '--version']; print(runpy.run_path('setup.py')['gpu_archs']())"
    result = python(code, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert result.stdout.splitlines()[-1] == str(archs), result.stdout + result.stderr
