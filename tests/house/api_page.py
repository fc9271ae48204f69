"""Writes docs/api.md from the docstrings: `python tests/house/api_page.py > docs/api.md`."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields

import patchlight
import patchlight_kernels
from patchlight.evaluation.encoder import Encoder
from patchlight.objectives import OBJECTIVES, register
from patchlight.recipes import RECIPES
from patchlight.usage import texts_of
from patchlight.values import shown

HEAD = """# The API

Written from the docstrings by `python tests/house/api_page.py > docs/api.md`; a test compares both. What is below `patchlight` is
imported when it is first used: `import patchlight` alone takes no time. Modules that are not named here may change at any time.

```python
from dataclasses import replace

import patchlight
from patchlight.recipes.papers import selfpatch_vits16_in1k

run = selfpatch_vits16_in1k()
patchlight.train(replace(run, data=replace(run.data, path="my/images")))
encoder = patchlight.load_teacher(run.output.folder)
```
"""


def first_line(thing) -> str:
    """The first paragraph of a docstring on one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def function(name: str, value) -> str:
    signature = str(inspect.signature(value)).replace("'", "")  # around types
    return f"### `{name}{signature}`\n\n{inspect.getdoc(value)}\n"


def record(kind: type) -> str:
    """A dataclass: its fields, their defaults and what is said about them."""
    lines = [f"### `patchlight.{kind.__name__}`", "", first_line(kind), ""]
    lines += ["| field | type | default | |", "| --- | --- | --- | --- |"]
    for field in fields(kind):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        simple = isinstance(default, str | int | float | bool | None | dict) or field.name == "betas"
        text = f"`{shown(default)}`" if simple and default not in ("", {}) else ""
        lines.append(f"| `{field.name}` | `{cell(str(field.type))}` | {text} | {cell(texts_of(kind)[field.name])} |")
    return "\n".join([*lines, ""])


def table(head: str, things: dict) -> str:
    rows = [f"| `{name}` | {cell(first_line(thing))} |" for name, thing in things.items()]
    return "\n".join([f"| {head} | |", "| --- | --- |", *rows, ""])


def page() -> str:
    """The whole page."""
    ops = {name: getattr(patchlight_kernels, name) for name in patchlight_kernels.__all__}
    run = patchlight.Run
    parts = [HEAD, "## Training\n", function("patchlight.train", patchlight.train)]
    parts += [record(kind) for kind in (run, *(type(part) for part in vars(run()).values()))]
    parts += [f"### `patchlight.Run.{name}`\n\n{first_line(getattr(run, name))}\n" for name in ("to_dict", "from_dict")]
    parts += [
        "## Recipes\n",
        "`patchlight.recipes.RECIPES` has these functions by name; each returns a `Run`.\n",
        table("recipe", RECIPES),
    ]
    parts += [
        "## Objectives\n",
        "The options of the methods, for `Objectives.options`.\n",
        table("`patchlight.objectives`", OBJECTIVES),
    ]
    parts += [function("patchlight.objectives.register", register)]
    parts += ["## Trained models\n", function("patchlight.load_teacher", patchlight.load_teacher)]
    parts += [function(f"Encoder.{name}", getattr(Encoder, name)) for name in ("normalize", "forward")]
    parts += ["## Operations\n", "`patchlight_kernels` can be used alone; it imports torch.\n"]
    parts += [table("`patchlight_kernels`", {name: op for name, op in ops.items() if callable(op)})]
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
