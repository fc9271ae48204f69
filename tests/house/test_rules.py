"""The rules of the house as assertions: who imports whom, names, complete op folders."""

from __future__ import annotations

import ast
import re

import pytest
from parity import ROOT

from patchlight_kernels import registry

SOURCES = sorted(path for top in ("kernels", "ssl", "bench") for path in (ROOT / top).rglob("*.py"))
BANNED_FILES = {"utils", "util", "helpers", "helper", "misc", "common"}
GROUND = {"records", "checks", "threads", "durable", "process", "values", "usage", "compiled", "file_functions"}
# Each part of patchlight and what it may import from its own package; siblings do not meet, but for objectives -> heads.
MAY_IMPORT = {
    "records": set(),
    "checks": set(),
    "threads": set(),
    "durable": set(),
    "process": {"checks"},
    "values": {"checks"},
    "usage": {"checks", "values"},
    "compiled": set(),
    "file_functions": {"checks"},
    "report": GROUND,
    "checkpoint": GROUND,
    "backbones": GROUND,
    "heads": GROUND,
    "data": GROUND,
    "objectives": GROUND | {"heads", "data.masking"},
    "evaluation": GROUND | {"report", "checkpoint", "backbones", "heads", "data"},
    "export": GROUND | {"report", "checkpoint", "backbones", "heads", "data", "evaluation"},
    "tables": GROUND | {"report", "evaluation"},
    "run": GROUND | {"objectives", "data"},
    "needs": GROUND | {"backbones", "objectives", "data"},
    "cost": GROUND | {"backbones", "run"},
    "engine": GROUND
    | {"report", "checkpoint", "backbones", "heads", "objectives", "data", "run", "needs", "cost", "evaluation"},
    "pretraining": GROUND | {"backbones", "objectives", "data", "run", "needs", "engine"},
    "recipes": GROUND | {"backbones", "objectives", "data", "run", "cost", "engine", "report"},
}


def imports(path) -> list[tuple[str, str]]:
    """What a file imports: the module's absolute name, and the name that it takes from there, or none."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[1:])
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(module, alias.name) for alias in node.names]
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
    for module, taken in imports(path):
        name = f"{module}.{taken}".rstrip(".")
        assert name.split(".")[0] not in ("bench", "tests"), f"{name}: nothing imports bench or tests"
        if parts[0] == "kernels":
            assert name.split(".")[0] != "patchlight", "patchlight_kernels knows nothing of patchlight"
            continue
        assert not re.match(r"patchlight_kernels\.(ops|extension|hardware)", name), f"{name}: use the public names"
        own = parts[2] if len(parts) > 2 else ""
        target = name.split(".")[1:] if name.startswith("patchlight.") else []
        if not target or own not in MAY_IMPORT or target[0] == own:
            continue
        allowed = MAY_IMPORT[own] | {a.split(".")[0] for a in MAY_IMPORT[own] if ".".join(target).startswith(a)}
        assert target[0] in allowed, f"{own} may not import {name}"


def modules_of(top: str) -> dict[str, set[str]]:
    """What each module of a package imports from its own package, by names; a package stands for its __init__ file."""
    files = {}
    for path in sorted((ROOT / top).rglob("*.py")):
        parts = path.relative_to(ROOT / top).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    arrows = {}
    for name, path in files.items():
        others = {f"{module}.{taken}" if f"{module}.{taken}" in files else module for module, taken in imports(path)}
        arrows[name] = {other for other in others if other in files and other != name}
    return arrows


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Some names that lead back to the first of them; empty if there are none."""
    done: set[str] = set()

    def follow(path: list[str]) -> list[str]:
        for name in sorted(arrows.get(path[-1], ())):
            if name in path:
                return [*path[path.index(name) :], name]
            if name not in done and (found := follow([*path, name])):
                return found
        done.add(path[-1])
        return []

    return next((found for name in sorted(arrows) if name not in done and (found := follow([name]))), [])


@pytest.mark.parametrize("top", ["ssl", "kernels", "bench"])
def test_no_file_imports_itself_by_way_of_others(top):
    """Imports inside functions and for type checkers count."""
    assert not circle(modules_of(top))


def test_no_folder_imports_itself_by_way_of_others():
    arrows: dict[str, set[str]] = {}
    for name, others in modules_of("ssl").items():
        if "." in name:
            room = name.split(".")[1]
            arrows.setdefault(room, set()).update({other.split(".")[1] for other in others if "." in other} - {room})
    assert not circle(arrows)


def reachable(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """Everything that a name leads to, by way of others too."""
    found = {name: set(others) for name, others in arrows.items()}
    for _ in found:
        for name, others in found.items():
            found[name] = others.union(*(found.get(other, set()) for other in others))
    return found


def test_the_diagram_of_the_architecture_is_that_of_the_rules():
    text = (ROOT / "docs/architecture.md").read_text()
    diagram: dict[str, set[str]] = {}
    for start, end in re.findall(r"^    (\w+) --> (\w+)$", text, re.MULTILINE):
        diagram.setdefault(start, set()).update(GROUND if end == "ground" else {end})
    rules = {name: {other.split(".")[0] for other in others} for name, others in MAY_IMPORT.items() if others}
    assert reachable(diagram) == reachable(rules)
    assert diagram.keys() - GROUND == {name for name in MAY_IMPORT if name not in GROUND}


def test_the_page_of_the_architecture_names_what_exists():
    for name in re.findall(r"`((?:ssl|kernels|csrc|tests)/[\w/.]+)`", (ROOT / "docs/architecture.md").read_text()):
        assert (ROOT / name).exists(), name


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}})


@pytest.mark.parametrize("path", sorted((ROOT / "ssl").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_and_classes_are_short(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= (200 if isinstance(node, ast.ClassDef) else 60), f"{node.name}: {lines} lines"


def test_the_engine_is_short():
    assert sum(len(path.read_text().splitlines()) for path in (ROOT / "ssl/patchlight/engine").glob("*.py")) < 3000


@pytest.mark.parametrize("path", sorted((ROOT / "ssl/patchlight/objectives").glob("*.py")), ids=lambda path: path.name)
def test_objectives_keep_nothing_between_calls(path):
    """What a step leaves behind is in buffers, which are changed in place: no method but __init__ sets an attribute."""
    for function in ast.walk(ast.parse(path.read_text())):
        if not isinstance(function, ast.FunctionDef) or function.name == "__init__":
            continue
        for node in ast.walk(function):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                own = isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
                assert not own or isinstance(node, ast.AugAssign), f"{function.name} sets {ast.unparse(target)}"


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
    assert {impl.name for impl in spec.op.impls} - {"torch"} == {"cuda", "triton", "cpp", "reference"}
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
