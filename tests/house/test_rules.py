"""The rules of the house as assertions: who imports whom, names, complete op folders."""

from __future__ import annotations

import ast
import re

import pytest
from parity import ROOT

from patchlight_kernels import registry

SOURCES = sorted(path for top in ("kernels", "ssl", "bench") for path in (ROOT / top).rglob("*.py"))
BANNED_FILES = {"utils", "util", "helpers", "helper", "misc", "common"}
# Each part of patchlight and what it may import from its own package; siblings do not meet, but for objectives -> heads.
MAY_IMPORT = {
    "records": set(),
    "backbones": {"records"},
    "heads": {"records"},
    "data": {"records"},
    "objectives": {"records", "heads", "data.masking"},
    "evaluation": {"records", "backbones", "heads", "data"},
    "run": {"records", "backbones", "heads", "objectives", "data"},
    "engine": {"records", "backbones", "heads", "objectives", "data", "run", "evaluation"},
    "recipes": {"records", "backbones", "heads", "objectives", "data", "run", "engine"},
}


def imports(path) -> set[str]:
    """Absolute names of the modules a file imports."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[1:])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def test_the_source_roots_are_not_packages():
    for top in ("ssl", "kernels"):
        assert not (ROOT / top / "__init__.py").exists(), f"{top}/__init__.py would shadow another package"
    assert not [p for p in (ROOT / "tests").rglob("*") if p.is_dir() and p.name in ("ssl", "kernels")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_names_are_nouns(path):
    assert path.stem not in BANNED_FILES, "a file is named after its noun"


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if "bench" not in p.parts], ids=lambda path: str(path.relative_to(ROOT))
)
def test_imports_point_downward(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    for name in imports(path):
        assert name.split(".")[0] not in ("bench", "tests"), f"{name}: nothing imports bench or tests"
        if parts[0] == "kernels":
            assert name.split(".")[0] != "patchlight", "patchlight_kernels knows nothing of patchlight"
            continue
        assert not re.match(r"patchlight_kernels\.(ops|extension|hardware)", name), f"{name}: use the public names"
        own = (
            parts[2] if len(parts) > 2 and parts[-1] != "__main__" else ""
        )  # a command line stands on top of everything
        target = name.split(".")[1:] if name.startswith("patchlight.") else []
        if not target or own not in MAY_IMPORT or target[0] == own:
            continue
        allowed = MAY_IMPORT[own] | {a.split(".")[0] for a in MAY_IMPORT[own] if ".".join(target).startswith(a)}
        assert target[0] in allowed, f"{own} may not import {name}"


@pytest.mark.parametrize("name", registry.names())
def test_an_op_is_complete(name):
    folder = ROOT / "kernels/patchlight_kernels/ops" / name
    for file in ("README.md", "reference.py", "triton_kernels.py", "op.py", "spec.py"):
        assert (folder / file).exists(), f"{name} lacks {file}"
    for file in (f"{name}_cpu.cpp", f"{name}_cuda.cu"):
        assert (ROOT / "csrc" / name / file).exists(), f"{name} lacks csrc/{name}/{file}"
    assert re.search(rf'm\.def\(\s*"{name}_fwd\(', (ROOT / "csrc/library.cpp").read_text())
    spec = registry.spec(name)
    assert [impl.name for impl in spec.op.impls][-1] == "reference"
    assert {impl.name for impl in spec.op.impls} == {"cuda", "triton", "cpp", "reference"}
    assert spec.public.__doc__
    assert spec.public.__name__ == name


def test_every_folder_of_csrc_is_an_op():
    assert {p.name for p in (ROOT / "csrc").iterdir() if p.is_dir()} == set(registry.names())


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").rglob("*.*")), ids=lambda path: path.name)
def test_sources_keep_to_the_stable_abi_and_the_launcher(path):
    text = path.read_text()
    assert not re.search(r"#include <(ATen|c10|torch/extension|torch/library)", text), "LibTorch's stable ABI only"
    if path.suffix == ".cu":
        assert "<<<" not in text, "kernels start through launch(), so that they also run on CPU threads"
        assert not re.search(r"\b__shared__\b|\basm\b", text), "shared memory and PTX live in device.h and mma.h"


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.name == "triton_kernels.py"], ids=lambda path: path.parent.name
)
def test_triton_kernels_avoid_what_breaks(path):
    text = path.read_text()
    for banned in ("make_block_ptr", "tl.sort", "libdevice", "atomic_"):
        assert banned not in text, f"{banned} is not portable, not deterministic, or not testable here"
