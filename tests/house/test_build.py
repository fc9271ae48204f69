"""The build: one library for every torch, harmless to load, and an install that works without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

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


def test_a_failed_build_says_so_and_leaves_nothing_stale(tmp_path):
    """A compiler that fails: exit 0, one clear sentence, no half-built library."""
    broken = tmp_path / "broken-g++"
    broken.write_text("#!/bin/sh\necho 'broken compiler' >&2\nexit 1\n")
    broken.chmod(0o755)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("csrc", "kernels", "ssl"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={**os.environ, "CXX": str(broken), "PATCHLIGHT_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "the C++ library could not be built (reason above). patchlight works without it" in result.stderr
    assert not list((tmp_path / "kernels").rglob("*.so"))
