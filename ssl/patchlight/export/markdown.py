"""Text as Markdown shows it: names that come from files are escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any


def escaped(value: Any) -> str:
    """A text on one line, as it is: nothing in it is taken for markup."""
    text = re.sub(r"([\\`*\[\]<>|~$&])", r"\\\1", " ".join(str(value).split()))
    return re.sub(r"\b_+|_+\b", lambda line: line[0].replace("_", r"\_"), text)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: str, language: str = "") -> str:
    """A block of code; the fence is longer than any in the text."""
    longest = max([2, *(len(ticks) for ticks in re.findall(r"`{3,}", text))])
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def word(name: str) -> str:
    """A name as a tag: small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def quoted(text: str) -> str:
    """A string of Python."""
    return json.dumps(text, ensure_ascii=False)
