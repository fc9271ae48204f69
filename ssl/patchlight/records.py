"""The frozen records that modules pass to each other, with the shape of every tensor.

Letters: V crops of one size, B images on this rank, S pixels, N patches, D width, R rows, K prototypes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.export import register_dataclass


@dataclass(frozen=True, slots=True)
class Crops:
    """V crops of one size of B images."""

    pixels: Tensor  # [V, B, 3, S, S] normalized
    box: Tensor  # [V, B, 4] x, y, w, h in source pixels, fp32
    flip: Tensor  # [V, B] bool, whether the crop was mirrored left to right

    def tensors(self) -> list[Tensor]:
        return [self.pixels, self.box, self.flip]


@dataclass(frozen=True, slots=True)
class Views:
    """A batch: all crops of B images."""

    global_crops: Crops
    local_crops: Crops | None
    query_crops: Crops | None
    ids: Tensor  # [B] int64, the samples' numbers in the source

    def tensors(self) -> list[Tensor]:
        """All tensors, always in the same order."""
        crops = [c for c in (self.global_crops, self.local_crops, self.query_crops) if c is not None]
        return [tensor for c in crops for tensor in c.tensors()] + [self.ids]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Views:
        """The same batch on a device."""
        return self.with_tensors(tensor.to(device, non_blocking=non_blocking) for tensor in self.tensors())

    def pin_memory(self) -> Views:
        """The same batch in pinned memory; a DataLoader with pin_memory=True calls it."""
        return self.with_tensors(tensor.pin_memory() for tensor in self.tensors())

    def with_tensors(self, tensors: Iterable[Tensor]) -> Views:
        """The same crops with other tensors, in the order of `tensors`."""
        rest = iter(tensors)
        crops = [
            None if c is None else Crops(next(rest), next(rest), next(rest))
            for c in (self.global_crops, self.local_crops, self.query_crops)
        ]
        assert crops[0] is not None
        return Views(crops[0], crops[1], crops[2], next(rest))


@dataclass(frozen=True, slots=True)
class QueryContent:
    """What the student sees of the query crops, the same beside every global crop. Q: the patches of an image's L crops."""

    pixels: Tensor  # [B, L, 3, S, S] normalized
    mask: Tensor  # [B, Q] bool; True: a mask token as everywhere else, False: the patch itself


@dataclass(frozen=True, slots=True)
class Queries:
    """Positions whose content the student predicts: each is a token, a mask token without content, in every block."""

    positions: (
        Tensor  # [V, B, Q, 2] x, y in patches of the global crop, any real numbers; a backbone gets [V * B, Q, 2]
    )
    # Queries attend to the raw tokens and the queries ("all"), or to the raw tokens only ("raw"); raw tokens to raw tokens. Or
    # all attend to all ("joint"), so that queries change what raw tokens are.
    keys: str = "all"
    crop: int | None = None  # the number of queries of a crop: if set, queries attend only to queries of their own crop
    content: QueryContent | None = None  # where some positions are given with their pixels


@dataclass(frozen=True, slots=True)
class Cues:
    """What the student's backbone gets together with the global crops."""

    mask: Tensor | None = None  # [V, B, N] bool; True patches are replaced by the mask token
    queries: Queries | None = None


@dataclass(frozen=True, slots=True)
class NeighborRule:
    """How the teacher aggregates each patch's positive neighbors (SelfPatch, Eqs. 3-5)."""

    radius: int | None = 1  # 1: 3x3 window, 2: 5x5, None: all patches
    k: int = 4  # neighbors selected by cosine similarity
    border: str = "wrap"  # "wrap" as released (torus), "clip" as in the paper's figure
    pool: str = "class_attention"  # or "mean" (ablation)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a branch must compute besides the features of the global crops."""

    local_crops: bool = True  # features of the local crops, if there are any
    query_crops: bool = False
    neighbors: NeighborRule | None = None  # aggregate each patch's neighbors
    residual: bool = False  # the patches before the final norm


@dataclass(frozen=True, slots=True)
class Tokens:
    """The output of a backbone for M images."""

    cls: Tensor | None  # [M, D] class token after the final norm; None when the backbone has no class token
    patches: Tensor  # [M, N, D] after the final norm, or the raw residual stream when the backbone has no class token
    grid: tuple[int, int]  # rows, columns; rows * columns = N
    layers: tuple[Tensor, ...] = ()  # [M, N (+1), D] each, the requested intermediate layers
    queries: Tensor | None = None  # [M, Q, D] as the patches, when there were queries
    residual: Tensor | None = None  # [M, N, D] patches before the final norm, when wanted


register_dataclass(Tokens)  # so that FSDP2 finds the tensors in a module's output


@dataclass(frozen=True, slots=True)
class Features:
    """The output of one branch for crops of one size."""

    summary: Tensor  # [V, B, D] one vector per image
    patches: Tensor  # [V, B, N, D] normalized patch features
    grid: tuple[int, int]
    neighbors: Tensor | None = None  # [V, B, N, D] each patch's aggregated neighbors, when an objective needs them
    layers: tuple[Tensor, ...] = ()  # [V, B, N (+1), D] each
    queries: Tensor | None = None  # [V, B, Q, D] normalized, when an objective's cue has some
    residual: Tensor | None = None  # [V, B, N, D] patches before the final norm, when an objective needs them


@dataclass(frozen=True, slots=True)
class Side:
    """What an objective gets from one branch: its features, and the objective's own modules there."""

    global_crops: Features
    local_crops: Features | None = None
    query_crops: Features | None = None
    head: nn.Module | None = None  # the objective's head in this branch
    predictor: nn.Module | None = None  # the objective's predictor, student only

    def crop_sizes(self) -> list[Features]:
        """The features that exist, global crops first."""
        return [f for f in (self.global_crops, self.local_crops) if f is not None]


@dataclass(frozen=True, slots=True)
class SoftTarget:
    """A teacher's distribution over prototypes, kept without its logits: softmax((z W^T + bias) / temperature)."""

    z: Tensor  # [T, R, D] l2-normalized bottleneck rows of T teacher views
    prototypes: Tensor  # [K, D] the teacher's effective prototypes
    temperature: float | Tensor
    bias: Tensor | None = None  # [K] in logit units: minus the center, or the Sinkhorn potential


@dataclass(frozen=True, slots=True)
class Clock:
    """How far the run is; nothing else counts steps. Checkpoints save it between two steps."""

    step: int  # optimizer steps done
    total: int  # optimizer steps of the whole run
    images_seen: int  # over all ranks
    steps_per_epoch: int
    first_image: int = 0  # running number of this rank's first image in the current batch, counted over the whole run

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {name: getattr(self, name) for name in ("step", "total", "images_seen", "steps_per_epoch")}

    def at_batch(self, number: int, rank: int, world: int, images: int) -> Clock:
        """The clock for batch `number` of the step, which has `images` images per rank."""
        return replace(self, first_image=self.images_seen + (number * world + rank) * images)

    def next(self, images: int) -> Clock:
        """The clock of the next step, after a step of `images` images."""
        return replace(self, step=self.step + 1, images_seen=self.images_seen + images)


@dataclass(frozen=True, slots=True)
class Now:
    """The numbers that differ from those of the step before. A step reads them on its device, and nothing else changes in it."""

    values: Mapping[str, Tensor]  # by name, each [] fp64: rates of the engine, and what Objective.schedule gives
    first_image: Tensor  # [] int64, Clock.first_image
    clock: Clock  # on the host, for what is drawn there; a step that reads it cannot be one CUDA graph

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]


def now_at(clock: Clock, numbers: Mapping[str, float], device: torch.device | str = "cpu") -> Now:
    """The numbers of a step for a training loop of one's own: `now_at(clock, objective.schedule(clock), device)`."""
    values = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in numbers.items()}
    return Now(values, torch.tensor(clock.first_image, device=device), clock)
