"""A teacher as a program of torch.export, whose numbers were confirmed after it was loaded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..checks import check
from .comparison import check_outputs, check_tolerance
from .files import check_file, file_size, named_if_whole
from .traced import Teacher, foreign_ops, open_teacher, trace

ABOUT = "patchlight.json"  # in the file, beside the program


def export_torch(checkpoint: str, file: Path, size: int | None, tolerance: float, heads: int | None) -> None:
    check_file(file, ".pt2")
    check_tolerance(tolerance)
    teacher = open_teacher(checkpoint, size, heads)
    with named_if_whole(file) as unchecked:
        write_program(teacher, unchecked)
        check_outputs(teacher, run_of(unchecked), tolerance)
    print(f"file: {file} ({file_size(file)})")


def write_program(teacher: Teacher, file: Path) -> None:
    """Writes the file, unchecked."""
    program = trace(teacher)
    foreign = ", ".join(foreign_ops(program))
    check(not foreign, "The program must need torch alone", f"the operations {foreign}", "export another network")
    torch.export.save(program, file, extra_files={ABOUT: json.dumps(teacher.about, indent=1)})


def run_of(file: Path) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """What PyTorch computes with a file."""
    return torch.export.load(file).module()
