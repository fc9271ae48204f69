"""Writes docs/tables.md from the papers' tables and the recipes: `python tests/house/tables_page.py > docs/tables.md`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

from patchlight.evaluation.paper_numbers import PAPERS, Measure, Network, PaperTable, Row, all_tables
from patchlight.recipes import RECIPES

HEAD = """# The papers' tables and the recipes

Every row of every table and figure of SelfPatch, PASS, PQCL and SERE, with what makes it. Written by
`python tests/house/tables_page.py > docs/tables.md` from the files that every evaluation prints its published numbers from
(`ssl/patchlight/evaluation/papers`) and from the recipes; a test compares them, others give every command to its parser.

**Nobody has trained a full recipe with this library yet.** The numbers below are the papers' own, in percent. What is reproduced
so far are single steps of the released code ([how](../README.md#how-it-is-tested-without-a-gpu)).

    patchlight tables list SERE                   # a line per table
    patchlight tables show SERE 5                 # every command of its rows, ready to be typed
    patchlight tables run "SERE 5"                # tries them: the same networks and settings, a step each on drawn images
    make tables                                   # tries all; hours on a CPU

The last column of a table has the words after `patchlight train`, to which `--data.path` and `--output.folder` are added; the
text of [each recipe](#by-recipe) says for how many processes it is. RUN is that folder, words in capital letters are folders of
yours. Where a paper took weights of others, RUN is their file, which `--checkpoint` takes if it is of a
[known kind](evaluation.md); the nearest recipe, if there is one, is named too. A number in brackets is the section of the paper
that describes the table.
"""

GAPS = {
    "SelfPatch Figure 2; PASS Figures 2 and 3; PQCL Figures 1 and 2; SERE Figures 1 to 3": "drawings of the method, which no "
    "command makes; [ours](methods/index.md) are drawn by `docs/pictures/draw.py`",
    "PQCL Figures 3 to 5, SERE Figure 6": "curves and bars: the texts print two numbers of them, and of Figure 5's mask ratios "
    "0.25 and 1 alone",
    "PQCL Table 4, area 0.40": "the copy of the paper that was read has no top-1",
    "ImageNet-S, test set": "its labels are secret: the command writes predictions, the benchmark's server has the number",
    "MAE and BEiT in SERE's Table 6 and Figure 4": "no recipe; MAE's ViT-B is timm's `vit_base_patch16_224.mae`, its ViT-S was "
    "not published by its authors, BEiT's file is of a network that is not ours",
    "linear probe on ImageNet of SelfPatch": "its numbers are in a supplement",
}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def origin(row: Row) -> str:
    """Where a row's network comes from."""
    network: Network = row.network
    train = f"`{row.train}`"
    if network.published:
        return f"published{f'; nearest: {train}' if row.train else ''}"
    return train if row.train else f"`--checkpoint {network.checkpoint}`"


def commands(measure: Measure) -> list[str]:
    """The lines that measure a network, of which each but the first may take what the one before has saved."""
    checkpoint, found = "RUN", []
    for step in measure.evaluate:
        found.append(f"patchlight evaluate {step} --checkpoint {checkpoint}")
        if "--save" in step.split():
            checkpoint = step.split()[step.split().index("--save") + 1]
    return found


def value_text(value: float | None) -> str:
    return "" if value is None else str(value)


def section(of: PaperTable) -> str:
    """A table with the commands that make it."""
    where = f" ({of.section})" if of.section else ""
    names = [name for measure in of.measures for name in measure.names]
    lines = dict.fromkeys(line for measure in of.measures for line in commands(measure))
    rows = [
        [
            row.network.method,
            row.network.backbone,
            str(row.network.epochs or "not stated") if row.network.train or row.network.published else "",
            *row.columns,
            *map(value_text, row.values or [None] * len(names)),
            origin(row),
        ]
        for row in of.rows
    ]
    head = ["method", "backbone", "epochs", *of.columns, *names, "network"]
    code = "\n".join(f"    {line}" for line in lines)
    return f"### {of.title}{where}\n\n{of.about[0].upper()}{of.about[1:]}.\n\n{code}\n\n{table(head, rows)}"


def text_of(recipe) -> str:
    """The docstring of a recipe as one line."""
    return " ".join((inspect.getdoc(recipe) or "").split()).replace("|", "\\|")


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for paper in PAPERS.values():
        parts.append(f"## {paper if paper != 'released' else 'Released READMEs'}\n")
        parts += [section(of) for of in all_tables() if of.paper == paper]
    parts.append("## What has no number or no command\n")
    parts.append(table(["in the papers", "why"], (list(row) for row in GAPS.items())))
    parts.append("## By recipe\n\nWhat each recipe says of itself, with the tables and ablations that it is for.\n")
    parts.append(
        table(["recipe", "what"], ([f"`{name}`", text_of(recipe)] for name, recipe in RECIPES.items())).rstrip("\n")
    )
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")
