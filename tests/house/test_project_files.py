"""Workflow, templates, hooks, links and the table of supported versions agree with the files that they name."""

from __future__ import annotations

import re
import tomllib

import pytest
import yaml
from parity import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE, SETUP, SUPPORT = ((ROOT / name).read_text() for name in ("Makefile", "setup.py", "docs/support.md"))
VERBS = set(re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)[1].split())
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
FORMS = sorted(path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
FOLDERS = ("bench", "docs", "examples", "kernels", "ssl", "tests", "csrc")
PAGES = sorted(
    path
    for path in [
        *ROOT.glob("*.md"),
        *(ROOT / ".github").rglob("*.*"),
        *(p for f in FOLDERS for p in (ROOT / f).rglob("*.md")),
    ]
    if path.suffix in (".md", ".yml")
)
name_of = lambda path: str(path.relative_to(ROOT))


def jobs_of_the_workflow() -> list[dict]:
    return [row for job in WORKFLOW["jobs"].values() for row in job["strategy"]["matrix"]["include"]]


def test_the_workflow_runs_verbs_of_the_makefile():
    commands = [step["run"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "run" in step]
    assert "make ${{ matrix.verb }}" in commands
    verbs = [row["verb"] for row in jobs_of_the_workflow()]
    assert {verb.split()[0] for verb in verbs} <= VERBS
    assert {"lint", "test", "demo", "test-matrix MATRIX=oldest"} <= set(verbs)


def test_the_workflow_pins_the_major_version_of_every_action():
    used = [step["uses"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "uses" in step]
    assert used
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", action) for action in used), used


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_is_complete(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"]
    assert form["description"]
    fields = [part["id"] for part in form["body"]]
    assert len(fields) == len(set(fields))
    for part in form["body"]:
        assert part["type"] in ("textarea", "input", "dropdown", "checkboxes")
        assert part["attributes"]["label"]
        assert part["type"] != "dropdown" or all(isinstance(option, str) for option in part["attributes"]["options"])
    needs_the_machine = path.stem != "feature"
    assert needs_the_machine == ("python -m patchlight_kernels doctor" in path.read_text())


def test_the_hooks_run_the_tools_of_make_lint():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local", "nothing is downloaded"
    recipe = re.search(r"^lint:.*\n((?:\t.+\n)+)", MAKEFILE, re.MULTILINE)[1]
    tools = re.findall(r"\$\(PY\) -m (ruff \w+|mypy)", recipe)
    assert tools == ["ruff check", "ruff format", "mypy"]
    assert tools == [
        re.match(r"\.venv/bin/python -m (ruff \w+|mypy)", hook["entry"])[1] for hook in repository["hooks"]
    ]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_file_that_a_page_names_exists(path):
    """Links relative to the page; in the project's own pages also `folder/file` from the root, but for placeholders."""
    text = path.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:|#|mailto:", link):
            assert (path.parent / link.partition("#")[0]).exists(), f"{name_of(path)} links to {link}"
    if path.parent == ROOT or ".github" in path.parts:
        for named in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", text):
            assert (ROOT / named).exists(), f"{name_of(path)} names {named}"


def test_python_versions_are_the_same_everywhere():
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    versions = [f"3.{minor}" for minor in range(int(low), int(high))]
    assert f"(3, {low}) <= sys.version_info[:2] <= (3, {int(high) - 1})" in MAKEFILE
    assert sorted({row["python"] for row in jobs_of_the_workflow() if row["verb"] == "test"}) == versions
    assert f"| Python | {versions[0]} | {', '.join(versions)} |" in SUPPORT
    assert f"Python is supported up to {versions[-1]}" in SUPPORT
    assert f"Python {versions[0]} to {versions[-1]}" in (ROOT / "README.md").read_text()


def test_the_least_versions_of_packages_are_the_same_everywhere():
    texts = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["train"]
    needed = dict(re.match(r"([\w-]+)>=([\d.]+)", text).groups() for text in texts)
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|", SUPPORT, re.MULTILINE)
    assert {name: least for name, least in rows if name != "Python"} == needed
    major, minor = (int(part) for part in needed["torch"].split("."))
    assert f"TORCH_TARGET_VERSION=0x{major:02x}{minor:02x}" in SETUP
    for name, least in re.findall(r'"([a-z]+)>=([\d.]+)"', MAKEFILE):
        assert needed.get(name, least) == least, f"the Makefile installs {name}>={least}"


def test_gpu_architectures_are_the_same_everywhere():
    architectures = re.findall(r"\d+", re.search(r"^WANTED_ARCHS = \((.+)\)$", SETUP, re.MULTILINE)[1])
    assert f"| GPU | {', '.join(f'sm_{number}' for number in architectures)} |" in SUPPORT
