"""Writes docs/api.md from the docstrings: `python tests/house/api_page.py > docs/api.md`."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields

import patchlight
import patchlight_kernels
from patchlight.data.policy import dino_policy, ibot_policy, pqcl_policy, selfpatch_policy
from patchlight.engine.optim import has_decay, prototype_names
from patchlight.engine.schedules import cosine, rates_at
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


# What of the trainer a loop of one's own may import.
LOOP_PARTS = [("data.policy", policy) for policy in (dino_policy, selfpatch_policy, ibot_policy, pqcl_policy)]
LOOP_PARTS += [("engine.schedules", cosine), ("engine.schedules", rates_at), ("engine.optim", has_decay)]
LOOP_PARTS += [("engine.optim", prototype_names)]


def first_line(thing) -> str:
    """The first paragraph of a docstring on one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def signature(value) -> str:
    return str(inspect.signature(value)).replace("'", "")  # around types


def function(name: str, value) -> str:
    return f"### `{name}{signature(value)}`\n\n{inspect.getdoc(value)}\n"


def class_(name: str, kind: type, *methods: str) -> str:
    """A class: what it is, how it is made, and its methods."""
    parts = [f"### `{name}`", inspect.getdoc(kind), f"`{kind.__name__}{signature(kind)}`"]
    parts += [inspect.getdoc(kind.__init__)] if kind.__init__.__doc__ and "__init__" in vars(kind) else []
    parts += [function(f"{kind.__name__}.{method}", getattr(kind, method)).strip() for method in methods]
    return "\n\n".join([*parts, ""])


def record(kind: type, place: str = "patchlight") -> str:
    """A dataclass: its fields, their defaults and what is said about them."""
    lines = [f"### `{place}.{kind.__name__}`", "", first_line(kind), ""]
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
        "The options of the methods, for `Objectives.options` and for `Pretraining`.\n",
        *(record(kind, "patchlight.objectives") for kind in OBJECTIVES.values()),
    ]
    parts += [function("patchlight.objectives.register", register)]
    parts += ["## A training loop of one's own\n", "[own_loop.md](own_loop.md) explains it.\n"]
    parts += [class_("patchlight.Pretraining", patchlight.Pretraining, "forward", "after_step", "skip_step")]
    parts += [function(f"patchlight.{name}", getattr(patchlight, name)) for name in ("build_backbone", "wrap_backbone")]
    parts += [class_("patchlight.MultiCrop", patchlight.MultiCrop)]
    parts += [function(f"patchlight.{place}.{f.__name__}", f) for place, f in LOOP_PARTS]
    parts += ["## Trained models\n", function("patchlight.load_teacher", patchlight.load_teacher)]
    parts += [function(f"Encoder.{name}", getattr(Encoder, name)) for name in ("normalize", "forward")]
    parts += ["## Operations\n", "`patchlight_kernels` can be used alone; it imports torch.\n"]
    parts += [table("`patchlight_kernels`", {name: op for name, op in ops.items() if callable(op)})]
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
