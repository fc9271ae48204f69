"""The documentation site builds without a warning; links, anchors, equations and diagrams are right; no network is needed."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from parity import ROOT

DOCS = ROOT / "docs"
GITHUB = "https://github.com/patchlight/patchlight/"
LOADED = {
    "script": "src",
    "img": "src",
    "source": "src",
    "iframe": "src",
    "link": "href",
}  # what a browser fetches by itself
LISTED = [*DOCS.rglob("*.md"), *(ROOT / "kernels/patchlight_kernels/ops").glob("*/README.md")]
LISTED += [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
LISTED += [ROOT / "examples/README.md"]
LISTED += [ROOT / "bench/results" / name for name in ("README.md", "gaps.md")]


class Page(HTMLParser):
    """What a page links to, what it loads, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.text = path.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.anchors.add(given.get("id") or "")
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if given.get(LOADED.get(tag, "")):
            self.loads.append(given[LOADED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; every warning is an error."""
    pytest.importorskip("sphinx", reason='the site needs pip install ".[docs]"')
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "-b", "html", str(DOCS), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return out


def extension(name: str):
    """A module of docs/extensions, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / "extensions" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def address(path: Path) -> str:
    """Where the site has a page that is read from this file."""
    names = {"README.md": "readme", "CHANGELOG.md": "changes", "CONTRIBUTING.md": "contributing"}
    if path.is_relative_to(DOCS):
        return f"{path.relative_to(DOCS).with_suffix('')}.html"
    if path.parent == ROOT:
        return f"{names[path.name]}.html"
    if path.parent == ROOT / "examples":
        return "examples.html"
    if path.parent == ROOT / "bench/results":
        return "results.html" if path.stem == "README" else f"{path.stem}.html"
    return f"ops/{path.parent.name}.html"


def targets(page: Path, links: list[str]) -> Iterator[tuple[str, Path, str]]:
    """The links within the site: as written, the file, the anchor."""
    for link in links:
        parts = urlsplit(link)
        if not parts.scheme and not parts.netloc:
            yield link, (page.parent / unquote(parts.path)).resolve() if parts.path else page, unquote(parts.fragment)


def test_the_site_is_whole(site):
    """One test, as each worker that ran a part of it would build the site again."""
    pages = {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}
    assert len(pages) > len(LISTED) > 30
    check_links(pages)
    check_links_to_files(pages)
    check_reachable(site, pages)
    check_network(site, pages)
    check_search(site)
    check_equations_and_diagrams(site, pages)


def check_links(pages: dict[Path, Page]) -> None:
    """Every link within the site leads to a file, and to an anchor that is there."""
    for path, page in pages.items():
        for link, target, anchor in targets(path, page.links):
            assert target.is_file(), f"{path.name} links to {link}"
            if anchor and target in pages:
                assert anchor in pages[target].anchors, f"{path.name} links to {link}, an anchor that is not there"


def check_links_to_files(pages: dict[Path, Page]) -> None:
    """Links to the repository name a file or folder that is there, an edit link the page's own file."""
    seen = set()
    for path, page in pages.items():
        for link in page.links:
            if found := re.match(rf"{GITHUB}(blob|tree|edit)/main/([^#]+)", link):
                seen.add(found[1])
                target = ROOT / unquote(found[2])
                assert target.is_dir() if found[1] == "tree" else target.is_file(), f"{path.name} links to {link}"
                if found[1] == "edit":
                    assert path.as_posix().endswith(address(target)), f"{path.name} is edited as {found[2]}"
    assert seen >= {"blob", "edit"}


def check_reachable(site: Path, pages: dict[Path, Page]) -> None:
    """Every Markdown file of docs, and the pages from outside, can be reached from the first page."""
    reached, waiting = set(), [(site / "index.html").resolve()]
    while waiting:
        path = waiting.pop()
        if path in reached or path not in pages:
            continue
        reached.add(path)
        waiting += [target for _, target, _ in targets(path, pages[path].links)]
    missing = [path for path in LISTED if (site / address(path)).resolve() not in reached]
    assert not missing, f"no link leads to {missing}"


def check_network(site: Path, pages: dict[Path, Page]) -> None:
    """Scripts, styles, fonts and pictures are files of the site."""
    for path, page in pages.items():
        outside = [source for source in page.loads if re.match(r"(https?:)?//", source)]
        assert not outside, f"{path.name} loads {outside}"
        for source, target, _ in targets(path, page.loads):
            assert target.is_file(), f"{path.name} loads {source}"
    for path in (site / "_static").rglob("*.css"):
        outside = re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//\S+", path.read_text())
        assert not outside, f"{path.name} loads {outside}"


def check_search(site: Path) -> None:
    """Words of pages from docs and from outside are found where they are."""
    index = json.loads((site / "searchindex.js").read_text().removeprefix("Search.setIndex(").rstrip().rstrip(")"))
    for word, page in (
        ("sinkhorn", "methods/dino"),
        ("torchrun", "training"),
        ("changelog", "changes"),
        ("hsv", "ops/photometric"),
    ):
        numbers = index["terms"][word]
        names = [index["docnames"][number] for number in (numbers if isinstance(numbers, list) else [numbers])]
        assert page in names, f"{word} is found in {names}"


def check_equations_and_diagrams(site: Path, pages: dict[Path, Page]) -> None:
    """Equations are MathML without unknown commands; each Mermaid block is a drawing."""
    equations = sum(len(re.findall(r"^```math$", path.read_text(), re.MULTILINE)) for path in LISTED)
    assert equations > 20
    assert (
        sum(
            page.text.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">')
            for page in pages.values()
        )
        == equations
    )
    for path, page in pages.items():
        unknown = re.findall(r"<m[ion]>\\\w+", page.text)
        assert not unknown, f"{path.name} has {unknown}"
    for path in LISTED:
        if diagrams := path.read_text().count("```mermaid"):
            assert pages[(site / address(path)).resolve()].text.count('<svg class="diagram"') == diagrams


@pytest.mark.parametrize("direction", ["TB", "BT", "LR", "RL"])
def test_a_diagram_has_all_boxes_and_edges(direction):
    text = f'flowchart {direction}\n  a["first<br/>line"] --> b\n  a -->|why| c(third & last)\n  b --> c\n'
    picture = extension("mermaid").draw(text)
    assert re.findall(r"<text x[^>]*>([^<]+)", picture) == ["first", "line", "b", "third &amp; last"]
    assert picture.count('<path class="edge"') == 3
    assert ">why</text>" in picture
    middles = [[float(v) for v in m] for m in re.findall(r'<rect x="(\S+)" y="(\S+)"', picture)]
    first, _, last = middles
    axis = 0 if direction in ("LR", "RL") else 1
    assert (first[axis] < last[axis]) == (direction in ("TB", "LR"))


def test_boxes_of_a_diagram_do_not_overlap():
    text = re.search(r"```mermaid\n(.+?)```", (DOCS / "architecture.md").read_text(), re.DOTALL)[1]
    numbers = re.findall(r'<rect x="(\S+)" y="(\S+)" width="(\S+)" height="(\S+)"', extension("mermaid").draw(text))
    boxes = [tuple(map(float, box)) for box in numbers]
    assert len(boxes) > 10
    for i, (x, y, w, h) in enumerate(boxes):
        for X, Y, W, H in boxes[:i]:
            assert x + w < X or x > X + W or y + h < Y or y > Y + H


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("graph TD\n a --> b", "must begin with flowchart"),
        ("flowchart TB\n a --- b", "must be a node or an edge, got 'a --- b'"),
        ("flowchart TB\n a --> b\n b --> a", "must have no cycle"),
    ],
)
def test_a_diagram_that_cannot_be_drawn_says_why(text, message):
    with pytest.raises(ValueError, match=message):
        extension("mermaid").draw(text)


def test_equations_are_written_as_github_reads_them():
    """Blocks are fenced, as Markdown would take backslashes off between dollars; inline ones have no such escapes."""
    for path in LISTED:
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
        text = re.sub(r"`[^`\n]*`", "", text)
        assert "$$" not in text, path
        escaped = [formula for formula in re.findall(r"\$([^$\n]+)\$", text) if re.search(r"\\[^A-Za-z]", formula)]
        assert not escaped, f"{path.name} has {escaped}"
