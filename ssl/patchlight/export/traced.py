"""What is exported: pixels of one size to a summary and patches. It is traced once, and holds no op of this library."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from patchlight_kernels import __version__

from ..backbones.vit import VisionTransformer
from ..checks import check, check_number, sentence
from ..evaluation.checkpoints import facts_of, first_line, open_checkpoint
from ..evaluation.encoder import Encoder
from .papers import methods_of

INPUT, OUTPUTS = "pixels", ("summary", "patches")


class Features(nn.Module):
    """An encoder for images of one size, with tensors alone as its output."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [M, 3, S, S] to summary [M, D] and patches [M, N, D]."""
        encoded = self.encoder(pixels)
        return encoded.summary, encoded.patches


@dataclass(frozen=True)
class Teacher:
    """A checkpoint that was opened for an export."""

    features: Features
    size: int  # side of its images in pixels
    about: dict[str, str]  # what the file says of itself, by name

    @property
    def encoder(self) -> Encoder:
        return self.features.encoder


def open_teacher(checkpoint: str, size: int | None, heads: int | None) -> Teacher:
    """Opens a checkpoint for images of this size; None: of the size that its input format has."""
    for name, number in (("--size", size), ("--heads", heads)):
        if number is not None:
            check_number(name, number, "[1, inf)", "leave it out for the checkpoint's own", whole=True)
    encoder = open_checkpoint(checkpoint, heads)
    size, patch = size or encoder.input_format.image_size, encoder.patch_size
    rule = f"--size must be a multiple of the patch size {patch}"
    check(size % patch == 0, rule, size, f"the nearest is {max(1, round(size / patch)) * patch}")
    backbone = encoder.backbone
    if isinstance(backbone, VisionTransformer):
        _fix_positions(backbone, size)
    return Teacher(Features(encoder).eval().requires_grad_(False), size, _about(checkpoint, encoder, size))


@torch.no_grad()
def _fix_positions(vit: VisionTransformer, size: int) -> None:
    """Replaces the position table by that of images of this size, so that no file resizes it again for each batch."""
    grid = vit.grid(size, size)
    table = vit.positions(grid)
    del vit.pos_embed  # a parameter, or a buffer
    vit.register_buffer("pos_embed", table)
    vit.table_grid = grid


def _about(checkpoint: str, encoder: Encoder, size: int) -> dict[str, str]:
    """Name and text of everything that a user of the file must know."""
    facts, shape = facts_of(checkpoint), encoder.input_format
    about = {
        "input": f"{INPUT} [M, 3, {size}, {size}]: RGB in 0..1, minus mean, divided by std",
        "outputs": "summary [M, D]: a vector per image; patches [M, N, D]: a vector per patch, row by row",
        "image_size": str(size),
        "patch_size": str(encoder.patch_size),
        "width": str(encoder.width),
        "mean": json.dumps(shape.mean),
        "std": json.dumps(shape.std),
        "summary": str(getattr(encoder.summary, "kind", "unknown")),
        "patchlight": __version__,
    }
    if facts and (methods := methods_of(facts["run"])):
        about["method"] = " + ".join(methods)
    if facts and "clock" in facts:
        about["step"] = str(facts["clock"]["step"])
    return about


def trace(teacher: Teacher) -> ExportedProgram:
    """The network as a graph of PyTorch's own operations, for batches of any number."""
    example = torch.zeros(2, 3, teacher.size, teacher.size)
    try:
        with torch.no_grad():
            program = torch.export.export(
                teacher.features, (example,), dynamic_shapes={INPUT: {0: Dim("batch")}}, strict=False
            )
    except Exception as error:  # PyTorch's own, and those of a backbone of another library
        rule = "The network must be a graph that does not depend on its input"
        raise ValueError(
            sentence(rule, f"{first_line(error)} for {teacher.encoder.name}", "export another one")
        ) from error
    _forget_places(program)
    return program


def _forget_places(program: ExportedProgram) -> None:
    """Removes where in which file on this machine each operation was called."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
            node.meta.pop("source_fn_stack", None)


def foreign_ops(program: ExportedProgram) -> list[str]:
    """Operations that only a library beside PyTorch has: a file with such cannot be loaded without it."""
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return sorted(
        name for name in names if not name.startswith(("aten.", "<built-in function", "<function sym_", "prims."))
    )
