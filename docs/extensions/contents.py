"""Tables of contents from lists of links: what GitHub shows as a list is what the site's sidebar has, in the same order.

In a page that lists others, every list item that begins with a link to a page is an entry, under the heading before it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

LISTING = ("index", "methods/index", "ops")
ENTRY = re.compile(r"^\* \[([^\]]+)\]\(([^)#:]+\.md)\)")


def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """Puts a hidden toctree behind each section's list."""
    if page not in LISTING:
        return
    sections: list[dict[str, Any]] = [{"caption": "", "entries": []}]
    for line in source[0].splitlines():
        if line.startswith("## "):
            sections.append({"caption": line[3:], "entries": []})
        if entry := ENTRY.match(line):
            path = Path(app.env.relfn2path(entry[2], page)[1])
            sections[-1]["entries"].append(f"{entry[1]} </{app.env.path2doc(path)}>")
    for section in sections:
        if section["entries"]:
            caption = [f":caption: {section['caption']}"] if section["caption"] else []
            source[0] += "\n".join(["\n\n```{toctree}", ":hidden:", *caption, "", *section["entries"], "```\n"])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", add_contents)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
