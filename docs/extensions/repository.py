"""The repository around docs: Markdown of other folders as pages, links to files as links to GitHub, the edit link of a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.project import Project
from sphinx.transforms import SphinxTransform

ROOT = Path(__file__).parents[2]


class RepositoryProject(Project):
    """A project with further pages from outside of its folder. Links are relative to the file that a page is read from."""

    further: dict[str, Path]  # by the page's name, absolute

    def discover(self, *patterns: Any) -> set[str]:
        super().discover(*patterns)
        for name, path in self.further.items():
            self.docnames.add(name)
            self._docname_to_path[name] = Path(
                *[".."] * len(self.srcdir.relative_to(ROOT).parts), path.relative_to(ROOT)
            )
        return self.docnames

    def path2doc(self, filename: Any) -> str | None:
        path = (self.srcdir / filename).resolve()
        for name, further in self.further.items():
            if further == path:
                return name
        return super().path2doc(path) if path.is_relative_to(self.srcdir) else None


def add_pages(app: Sphinx) -> None:
    project = RepositoryProject(app.srcdir, app.config.source_suffix)
    project.further = {name: ROOT / path for name, path in app.config.repository_pages.items()}
    app.project = app.env.project = project


class LinkToFiles(SphinxTransform):
    """A link to a file or folder that is no page leads to GitHub. MyST would offer a file to download, and miss a folder."""

    default_priority = 5

    def apply(self, **kwargs: Any) -> None:
        found = [*self.document.findall(addnodes.download_reference), *self.document.findall(addnodes.pending_xref)]
        for node in found:
            path = Path(self.env.relfn2path(node["reftarget"], self.env.docname)[1])
            is_file = isinstance(node, addnodes.download_reference)
            if is_file or (node.get("refdomain") is None and path.is_dir()):
                url = f"{self.config.repository_url}/{'blob' if is_file else 'tree'}/main/{path.relative_to(ROOT)}"
                node.replace_self(nodes.reference("", "", *node.children[0].children, refuri=url))


def set_edit_link(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    if doctree is not None:
        path = Path(app.env.doc2path(page)).resolve().relative_to(ROOT)
        context["theme_source_edit_link"] = f"{app.config.repository_url}/edit/main/{path}"


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_config_value("repository_url", "", "env")
    app.add_config_value("repository_pages", {}, "env")
    app.add_transform(LinkToFiles)
    app.connect("builder-inited", add_pages)
    app.connect("html-page-context", set_edit_link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
