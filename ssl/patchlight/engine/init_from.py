"""Starts a student from published weights, and lists which tensors were loaded, reshaped, missing and unused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from ..backbones.fitting import fit_weight, shape_text
from ..backbones.published import MAY_LEAVE_OUT, MAY_START_ANEW, read_published
from ..checks import check
from ..report.console import table_of_names
from .branches import Student

NOT_WANTED = ("heads.", "predictors.")  # every objective has its own


@dataclass(frozen=True, slots=True)
class Taken:
    """Which tensors of the file and of the student were used, and which were not."""

    file: Path
    layout: str
    loaded: list[str]
    reshaped: list[str]  # with both shapes
    missing: list[str]  # of backbone and summary; they keep their initial values
    unused: list[str]  # of the file

    def table(self) -> Table:
        """A row per kind, with the first names."""
        rows = []
        for kind in ("loaded", "reshaped", "missing", "unused"):
            names = getattr(self, kind)
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            rows.append((kind, len(names), ", ".join(names[:8]) + more))
        return table_of_names(f"{self.file.name}: layout of {self.layout}", ("", "tensors", "such as"), rows)


@torch.no_grad()
def init_from(student: Student, path: Path) -> Taken:
    """Copies backbone and summary from a published file; position tables are resampled to fit.

    The student then computes what the file's network does, or an error names the tensors that only one of them has.
    """
    published = read_published(path)
    wanted = {name: tensor for name, tensor in student.state_dict().items() if not name.startswith(NOT_WANTED)}
    fitted: dict[str, Tensor] = {}
    loaded: list[str] = []
    reshaped: list[str] = []
    left: list[str] = []
    for name, tensor in published.weights.items():
        target = _target(name, wanted)
        if target is None:
            left.append(name)
            continue
        fitted[target] = own = fit_weight(student.backbone, target, tensor, wanted[target].shape, path)
        same = tensor.shape == own.shape
        (loaded if same else reshaped).append(target if same else f"{target} {shape_text(tensor)} to {shape_text(own)}")
    missing = [name for name in wanted if name not in fitted]
    rule, got = (
        "A file must hold weights of this model",
        f"none of its {len(wanted)} tensors in {path} ({published.layout})",
    )
    remedy = "choose the Model.arch that it was made with"
    check(bool(fitted), rule, f"{got}, which has {sorted(published.weights)[:3]}", remedy)
    _check_complete(left, missing, f"{path} ({published.layout})")
    for name, own in fitted.items():
        wanted[name].copy_(own)
    return Taken(path, published.layout, loaded, reshaped, missing, left + published.beside)


def _check_complete(left: list[str], missing: list[str], file: str) -> None:
    """A ValueError where the model would compute another function than the file's network."""
    foreign = [name for name in left if name != MAY_LEAVE_OUT]
    new = [name for name in missing if not MAY_START_ANEW.fullmatch(name)]
    parts = [f"{len(foreign)} of the file that it has no place for, such as {foreign[0]}"] if foreign else []
    parts += [f"{len(new)} of its own that the file lacks, such as {new[0]}"] if new else []
    remedy = "choose the Model.arch and Model.sizes that it was made with"
    if new == ["backbone.cls_token"]:
        remedy = 'set Model.summary to "mean" or "class_attention", which need no class token'
    rule = "The model must have all tensors of the file's network and no others"
    check(not parts, rule, f"{' and '.join(parts)}, in {file}", remedy)


def _target(name: str, wanted: dict[str, Tensor]) -> str | None:
    """The student's name of a published tensor. A final norm is loaded into the module that applies it."""
    rest = name.removeprefix("summary.")
    candidates = [name if name.startswith("summary.") else f"backbone.{name}"]
    if rest.startswith("norm."):
        candidates += [f"backbone.{rest}", f"summary.{rest}"]
    return next((candidate for candidate in candidates if candidate in wanted), None)
