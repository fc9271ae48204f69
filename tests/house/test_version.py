"""The version is written once, in patchlight_kernels/__init__.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib

from parity import ROOT

import patchlight
import patchlight_kernels

VERSION = patchlight_kernels.__version__


def python(*arguments: str, **environment: str) -> str:
    """What Python prints, in a process of its own."""
    command, environment = [sys.executable, *arguments], {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


def test_both_packages_have_one_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
    assert patchlight.__version__ == VERSION


def test_a_checkout_that_is_not_installed_has_a_version(tmp_path):
    """Found on PYTHONPATH, in a folder that no package metadata describes."""
    for top in ("kernels", "ssl"):
        (tmp_path / top).symlink_to(ROOT / top)
    code = (
        "import patchlight, sys; assert 'torch' not in sys.modules, 'patchlight alone imports fast'\n"
        "import patchlight_kernels\n"
        "print(patchlight.__file__, patchlight.__version__, patchlight_kernels.__version__)"
    )
    printed = python("-c", code, PYTHONPATH=f"{tmp_path / 'kernels'}:{tmp_path / 'ssl'}").split()
    assert printed == [str(tmp_path / "ssl/patchlight/__init__.py"), VERSION, VERSION]


def test_what_is_installed_has_the_same_version():
    """setuptools reads it from the source, which it does not import."""
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]
    assert python("setup.py", "--version").split()[-1] == VERSION


def test_the_files_for_readers_name_the_same_version():
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == VERSION
    assert re.search(r"^## \[(\d.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == VERSION


def test_the_doctor_prints_the_version():
    lines = python("-m", "patchlight_kernels", "doctor").splitlines()
    assert any(re.match(rf"\W+patchlight\W+{re.escape(VERSION)}\b", line) for line in lines)
