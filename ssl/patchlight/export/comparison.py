"""Whether a file computes what PyTorch computes: as far as rounding explains, which PyTorch's own error in fp32 shows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from ..checks import check, check_number
from ..data.procedural import ProceduralSource
from ..report.console import table_of_names
from . import TOLERANCE
from .traced import OUTPUTS, Teacher

BATCHES = (1, 3)  # neither is the example's that the trace saw
SMALLEST_SIDE = 16  # of a drawn image
Outputs = Sequence[Tensor]


@dataclass(frozen=True)
class Difference:
    """How far an output of a file is from PyTorch's, for one batch."""

    images: str
    output: str
    absolute: float  # the largest, against PyTorch in fp32
    relative: float  # the same, as a share of the largest value
    error: float  # the largest against PyTorch in fp64, as a share of the largest value
    rounding: float  # that of PyTorch in fp32


def check_tolerance(tolerance: float) -> None:
    check_number("--tolerance", tolerance, "(0, inf)", f"{TOLERANCE:g} is the default")


def check_outputs(
    teacher: Teacher, compute: Callable[[Tensor], Outputs], tolerance: float, outputs: Sequence[str] = OUTPUTS
) -> None:
    """Prints the largest differences of what `compute` returns from the teacher's outputs of these names, in this order.

    Raises if one is larger than `tolerance` times the largest error that PyTorch's own rounding makes in that output.
    """
    found = list(differences(teacher, compute, outputs))
    allowed = {name: tolerance * _rounding(found, name) for name in outputs}
    rows = [(d.images, d.output, f"{d.absolute:.1e}", f"{d.relative:.1e}") for d in found]
    columns = ("images", "output", "largest difference", "share of the largest value")
    Console().print(table_of_names("Against PyTorch in fp32", columns, rows))
    for name in outputs:
        own, there = (max(getattr(d, of) for d in found if d.output == name) for of in ("rounding", "error"))
        print(
            f"{name}: error {there:.1e} against fp64; PyTorch's own in fp32 is {own:.1e}, allowed is {allowed[name]:.1e}"
        )
    worst = max(found, key=lambda d: d.error / allowed[d.output])
    most = f"an error of at most {allowed[worst.output]:.1e} of the largest value"
    rule = f"What was written must compute {worst.output} with {most}"
    remedy = f"that is {tolerance:g} times the error of PyTorch's own rounding; --tolerance allows more"
    check(worst.error <= allowed[worst.output], rule, f"{worst.error:.1e} for {worst.images}", remedy)


def _rounding(found: Sequence[Difference], output: str) -> float:
    return max([torch.finfo(torch.float32).eps, *(d.rounding for d in found if d.output == output)])


@torch.no_grad()
def differences(teacher: Teacher, compute: Callable[[Tensor], Outputs], outputs: Sequence[str]) -> Iterator[Difference]:
    """For random and for drawn images, at both batch sizes. What is not finite counts as infinitely far away."""
    exact = copy.deepcopy(teacher.features).double()
    for images, pixels in inputs(teacher):
        ours, truth = (
            dict(zip(OUTPUTS, m(x), strict=True)) for m, x in ((teacher.features, pixels), (exact, pixels.double()))
        )
        for name, there in zip(outputs, compute(pixels), strict=True):
            here, true = ours[name].double(), truth[name]
            got = there.double()
            rule, shape = "What was written must return outputs of the same shape", f"{tuple(got.shape)} for {name}"
            check(got.shape == here.shape, rule, shape, f"it is {tuple(here.shape)} in PyTorch")
            largest = float(true.abs().max())
            absolute, error, own = (_largest(a - b) for a, b in ((got, here), (got, true), (here, true)))
            yield Difference(images, name, absolute, absolute / largest, error / largest, own / largest)


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max()) if difference.isfinite().all() else torch.inf


def inputs(teacher: Teacher) -> Iterator[tuple[str, Tensor]]:
    """Names and normalized pixels of batches, always the same."""
    size, random = teacher.size, torch.Generator().manual_seed(0)
    drawn = torch.from_numpy(ProceduralSource(max(BATCHES), max(size, SMALLEST_SIDE)).images).permute(0, 3, 1, 2)
    normalized = teacher.encoder.normalize(drawn[..., :size, :size])
    for count in BATCHES:
        word = "image" if count == 1 else "images"
        yield f"{count} random {word}", torch.randn(count, 3, size, size, generator=random)
        yield f"{count} drawn {word}", normalized[:count].contiguous()
