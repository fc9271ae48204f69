"""One HTML page with pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

CAPTIONS = {
    "class attention": "The image, the mean attention of its class token, each place in the color of the head with the"
    " highest attention there, then each head alone.",
    "query attention": "The image with its query patches, then for each of them the patches that it attends to most in the"
    " last block (mean over heads).",
    "similarity": "The image with its query patches, then the cosine of each query with every patch.",
    "principal components": "The three main directions of all patches of these images, as red, green and blue.",
    "relations": "Two views (mirroring undone) with their common part framed; the relations of the patch in its middle to"
    " the common part in each view; and the mean absolute difference of all relations at each place.",
}
_STYLE = (
    ":root{color-scheme:light dark}body{max-width:1120px;margin:0 auto;padding:36px 24px;font:15px/1.5 system-ui,"
    "sans-serif}h1{font-size:26px;letter-spacing:-.02em}h2{margin:36px 0 2px;font-size:18px}p{margin:0 0 12px;"
    "opacity:.7}img{max-width:100%;border-radius:6px}"
)


def write_page(folder: Path, title: str, sections: Sequence[tuple[str, str, Path]], notes: Sequence[str] = ()) -> Path:
    """A page of notes, then of sections: a heading, a caption, and a PNG file, which becomes part of the page."""
    body = "".join(f"<p>Note: {escape(note)}.</p>" for note in notes) + "".join(
        f"<section><h2>{escape(heading)}</h2><p>{escape(caption)}</p>"
        f'<img alt="{escape(heading, quote=True)}" src="data:image/png;base64,'
        f'{base64.b64encode(png.read_bytes()).decode("ascii")}"></section>'
        for heading, caption, png in sections
    )
    path = folder / "index.html"
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )
    return path
