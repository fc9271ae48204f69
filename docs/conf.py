"""How Sphinx builds the documentation site: `make docs`, or `sphinx-build -W --keep-going -n -b html docs build/docs`.

Every page is Markdown that is also read on GitHub. What GitHub does by itself, `extensions` does for the site: pages from other
folders and links to files (`repository`), tables of contents (`contents`), equations (`mathml`) and diagrams (`mermaid`).
Nothing is fetched from a network, neither by the build nor by a page.
"""

import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS / "extensions"))

project = "patchlight"
version = release = re.search(
    r'^__version__ = "(.+)"', (DOCS.parent / "kernels/patchlight_kernels/__init__.py").read_text(), re.MULTILINE
)[1]
author = "the patchlight authors"
copyright = "the patchlight authors, Apache-2.0"

extensions = ["myst_parser", "sphinx_copybutton", "repository", "contents", "mathml", "mermaid"]
exclude_patterns = ["extensions", "pictures", "static"]

# Markdown
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # as on GitHub
myst_fence_as_directive = ["math", "mermaid"]
myst_dmath_double_inline = True
highlight_language = "none"  # of blocks that name no language

# Pages from outside of docs, by their address on the site
repository_url = "https://github.com/patchlight/patchlight"
repository_pages = {
    "readme": "README.md",
    "contributing": "CONTRIBUTING.md",
    "changes": "CHANGELOG.md",
    "examples": "examples/README.md",
    "results": "bench/results/README.md",
    "gaps": "bench/results/gaps.md",
    **{
        f"ops/{path.parent.name}": str(path.relative_to(DOCS.parent))
        for path in (DOCS.parent / "kernels/patchlight_kernels/ops").glob("*/README.md")
    },
}

# HTML
html_theme = "furo"
html_title = f"patchlight {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_use_index = False
html_show_sphinx = False
html_theme_options = {
    "source_repository": repository_url,
    "source_branch": "main",
    "source_directory": "docs",
    "top_of_page_buttons": ["edit"],
    "footer_icons": [],
}
pygments_style = "tango"
pygments_dark_style = "github-dark"
