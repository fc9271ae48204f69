"""docs/faq.md, troubleshooting.md and tables.md agree with the code that they speak of."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from house import tables_page
from parity import ROOT

from patchlight.evaluation.paper_numbers import all_tables
from patchlight.recipes import RECIPES
from patchlight.usage import settings_of

TROUBLES = (ROOT / "docs/troubleshooting.md").read_text()
QUESTIONS = (ROOT / "docs/faq.md").read_text()
GUIDES = {name: (ROOT / f"docs/{name}.md").read_text() for name in ("faq", "troubleshooting", "tutorial", "evaluation")}
TITLES = re.findall(r"^### (.+)$", TROUBLES, re.MULTILINE)
FOREIGN = ("PyTorch", "Triton", "NCCL", "SLURM", "system")


def text_of(node: ast.AST) -> str:
    """A string with a mark for each inserted value; parts that are joined by + or by lines are one string."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "\0"
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return "\0"


@cache
def messages() -> str:
    """All strings of the sources, one per line."""
    files = [ROOT / "setup.py", *(ROOT / "ssl").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text())))
    strings = (text_of(node).replace("\n", " ") for node in nodes if isinstance(node, ast.expr))
    return "\n".join(text for text in strings if text.strip("\0"))


def is_in_sources(words: str) -> bool:
    pattern = ".*".join(re.escape(part.strip()) for part in words.split("…"))
    return re.search(pattern, messages()) is not None


def test_titles_are_messages_of_the_sources_or_marked_as_others():
    assert len(TITLES) > 80
    for title in TITLES:
        words = re.findall(r"`([^`]+)`", title)
        mark = re.search(r"\((\w+)\)$", title)
        assert words, f"{title}: a message stands between backticks"
        if mark:
            assert mark[1] in FOREIGN, title
        else:
            assert all(is_in_sources(text) for text in words), f"{title} is in no source"
            assert max(len(part.strip()) for part in words[0].split("…")) > 7, f"{title} says too little to be found"


@pytest.mark.parametrize("words", ["A run is a dream", "One run at a time … may sleep in"])
def test_a_message_that_nobody_prints_is_found(words):
    assert not is_in_sources(words)


def test_every_diagnosis_has_its_entry():
    source = ast.parse((ROOT / "ssl/patchlight/engine/sentinels.py").read_text())
    calls = (node for node in ast.walk(source) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
    names = {text_of(call.args[0]) for call in calls if call.func.id == "Diagnosis"}
    assert len(names) >= 8
    assert {f"`{name}`" for name in names} <= set(TITLES)


def test_messages_within_the_texts_are_those_of_the_sources_too():
    """Cells of the doctor's table, and messages that a text compares with its title."""
    quoted = re.findall(r"`([^`\n]+)`", TROUBLES)
    sentences = [text for text in quoted if len(text.split()) > 3 and not re.search(r"^\W|--|=|/|[A-Z]{3}|_|#", text)]
    assert len(sentences) > 60
    foreign = {w for title in TITLES if re.search(r"\(\w+\)$", title) for w in re.findall(r"`([^`]+)`", title)}
    missing = [text for text in sentences if text not in foreign and not is_in_sources(text)]
    assert not missing


def test_pytorchs_own_errors_exist():
    from importlib import import_module

    for name in re.findall(r"`(torch\.[\w.]+)`", " ".join(TITLES)):
        module, _, error = name.rpartition(".")
        assert issubclass(getattr(import_module(module), error), Exception)


def test_the_questions_name_tests_and_files_that_exist():
    named = dict.fromkeys(re.findall(r"`(test_\w+)`", QUESTIONS))
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 20
    assert not [name for name in named if f"def {name}(" not in tests]
    files = re.findall(r"`((?:tests|ssl|docs|bench)/[\w./-]+)`", "".join(GUIDES.values()))
    assert len(files) > 30
    assert not [name for name in files if not (ROOT / name).exists()]


def test_a_test_that_a_question_names_stands_in_its_file():
    for names, path in re.findall(
        r"((?:`test_\w+`(?:,| and| and the next ones)?\s+)+)in\s+`(tests/[\w/]+\.py)`", QUESTIONS
    ):
        text = (ROOT / path).read_text()
        for name in re.findall(r"test_\w+", names):
            assert f"def {name}(" in text, f"{name} is not in {path}"


def flags_of_runs() -> set[str]:
    runs = [recipe() for recipe in RECIPES.values()]
    return {setting.flag for run in runs for setting in settings_of(type(run), run)}


def test_flags_in_the_guides_exist():
    known = flags_of_runs()
    for name, page in GUIDES.items():
        named = set(re.findall(r"--(?:model|objectives|data|optim|schedule|parallel|output)\.[\w./-]*\w", page))
        unknown = {flag for flag in named if flag not in known and not flag.startswith("--objectives.")}
        assert not unknown, f"{name}: {sorted(unknown)}"


def slug(title: str) -> str:
    """The anchor that GitHub gives a title."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower().strip()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@pytest.mark.parametrize("name", [*GUIDES, "tables"])
def test_links_to_a_title_have_one(name):
    page = (ROOT / f"docs/{name}.md").read_text()
    for link in re.findall(r"\]\(([^)\s:]*#[^)\s]+)\)", page):
        path, _, anchor = link.partition("#")
        target = (ROOT / "docs" / path).read_text() if path else page
        assert anchor in {slug(title) for title in re.findall(r"^#+ (.+)$", target, re.MULTILINE)}, link


def test_titles_have_anchors_of_their_own():
    for name, page in GUIDES.items():
        anchors = [slug(title) for title in re.findall(r"^#+ (.+)$", page, re.MULTILINE)]
        assert len(anchors) == len(set(anchors)), name


def test_the_page_of_the_tables_agrees_with_the_code():
    written = Path(ROOT / "docs/tables.md").read_text()
    assert written == tables_page.page(), "run python tests/house/tables_page.py > docs/tables.md"


def test_the_page_of_the_tables_has_every_row_and_recipe():
    by_table, by_recipe = tables_page.page().split("## By recipe")
    assert len(re.findall(r"^\| .+ \|$", by_table, re.MULTILINE)) == sum(
        2 + len(table.rows) for table in all_tables()
    ) + 2 + len(tables_page.GAPS)
    assert all(f"| `{name}` |" in by_recipe for name in RECIPES)
