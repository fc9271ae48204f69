"""Video object segmentation of a folder in DAVIS layout, from the first frame's mask and patch features alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...checks import check, check_number, check_numbers
from ..encoder import Encoder, autocast
from ..progress import progress
from ..ranks import Ranks
from .folder import DavisFolder, VideoSequence, save_labels
from .previews import draw_sheet, save_preview
from .propagation import PropagationProtocol, propagate, to_label_map
from .resizing import first_labels, frame_size, resize_frame, resize_labels
from .scores import SequenceScores, score_sequence, summarize


@dataclass(frozen=True)
class DavisProtocol:
    """DINO's protocol, which SelfPatch and PQCL follow."""

    propagation: PropagationProtocol = field(default_factory=PropagationProtocol)
    """How labels are passed from frame to frame."""
    short_side: int = 480
    """The shorter side of a frame; the longer one becomes the multiple of 64 below."""
    std: tuple[float, float, float] | None = (0.228, 0.224, 0.225)
    """The colors' spread in the released code (its 0.228 for red is a mistake that all published numbers share); None: the
    checkpoint's own. The mean is the checkpoint's own."""
    layer: int = -1
    """The block whose patches are compared, after the final norm; of Swin and ResNet only the last."""
    stage: int | None = None
    """Instead, of a backbone with stages (Swin, ResNet): the stage, 1 to 4, whose map is compared; None: the last one, after
    its norm. Earlier maps are finer. The papers do not state which one their rows of ResNet-50 took."""

    def __post_init__(self) -> None:
        check_numbers(self, short_side="[16, inf)", layer="(-inf, inf)", stage="[1, 4]")
        for number, std in enumerate(self.std or ()):
            check_number(f"DavisProtocol.std[{number}]", std, "(0, inf)", "None is the checkpoint's own")


@dataclass(frozen=True)
class DavisResult:
    """Scores of the sequences, and the sequences without scores."""

    scores: dict[str, SequenceScores]
    unscored: tuple[str, ...]  # sequences with a first mask only: segmented, not scored
    failed: dict[str, str]  # sequences and why

    def metrics(self) -> dict[str, float]:
        return summarize(self.scores) if self.scores else {}

    def per_object(self) -> dict[str, dict[str, float]]:
        """Mean, recall and decay of J and F of each object."""
        return {
            f"{name}_{number}": {f"{m}_{k}": v for m, s in zip("JF", pair, strict=True) for k, v in vars(s).items()}
            for name, scores in self.scores.items()
            for number, pair in enumerate(scores.statistics(), 1)
        }


def evaluate_davis(
    encoder: Encoder,
    folder: DavisFolder,
    protocol: DavisProtocol,
    ranks: Ranks,
    out: Path,
    precision: str = "fp32",
    previews: int = 4,
) -> DavisResult:
    """Segments and scores every sequence. A sequence that fails is named, and the others are still done.

    Writes into `out`: masks/<sequence>/<frame>.png, and for the first sequences an animated preview and a sheet.
    """
    _check_backbone(encoder, protocol)
    scores: dict[str, SequenceScores] = {}
    unscored: list[str] = []
    failed: dict[str, str] = {}
    mine = [folder.names[i] for i in ranks.share(len(folder.names))]
    for name in progress(mine, "sequences", ranks):
        try:
            sequence = folder.open(name)
            rows, columns = sequence.first_mask().shape
            truth = sequence.truth((rows, columns))
            labels = segment_video(encoder, sequence, protocol, ranks.device, precision)
            save_labels(labels, sequence, out / "masks" / name)
            if folder.names.index(name) < previews:
                save_preview(sequence.frames, labels, out / f"{name}.webp")
                draw_sheet(sequence.frames, labels, truth).save(out / f"{name}.png")
            if truth is None:
                unscored.append(name)
            else:
                scores[name] = score_sequence(truth, labels)
        except (ValueError, OSError) as error:
            failed[name] = str(error)
    parts = ranks.gather((scores, unscored, failed))
    return DavisResult(
        {n: s for part in parts for n, s in part[0].items()},
        tuple(n for part in parts for n in part[1]),
        {n: e for part in parts for n, e in part[2].items()},
    )


def _layers(protocol: DavisProtocol) -> tuple[int, ...]:
    """The blocks that are asked for; the last one's patches come anyway."""
    return () if protocol.layer == -1 else (protocol.layer,)


def _check_backbone(encoder: Encoder, protocol: DavisProtocol) -> None:
    """A ValueError for features that the backbone does not have."""
    if protocol.stage is None:
        encoder.check_layers(_layers(protocol))
        return
    stages = 0 if encoder.backbone.returns_blocks else len(encoder.map_levels)
    rule, got = (
        "DavisProtocol.stage needs a backbone with stages, as Swin and ResNet have",
        f"{stages} in {encoder.name}",
    )
    check(stages >= protocol.stage, rule, got, "leave it out, or choose a block by layer")


@torch.no_grad()
def segment_video(
    encoder: Encoder, sequence: VideoSequence, protocol: DavisProtocol, device: torch.device, precision: str = "fp32"
) -> np.ndarray:
    """Label maps [T, H, W] of all frames at their own size; the first one is the given mask."""
    given = sequence.first_mask()
    height, width = given.shape
    mean, std = encoder.input_format.mean, protocol.std or encoder.input_format.std
    layers = _layers(protocol)
    stage = None if protocol.stage is None else protocol.stage - 1
    stride = encoder.patch_size if stage is None else encoder.map_levels[stage].stride

    def features_of(pixels: Tensor) -> Tensor:
        """[rows, columns, D] of a frame [3, H, W]."""
        if stage is not None:
            return encoder.maps(pixels[None])[stage][0].permute(1, 2, 0)
        encoded = encoder(pixels[None], layers)
        patches = encoded.levels[0].patches if layers else encoded.patches
        return patches[0].unflatten(0, encoded.grid)

    def patch_features() -> Iterator[Tensor]:
        """Of each frame, [rows, columns, D]."""
        for image in sequence.images((height, width)):
            pixels = resize_frame(image, protocol.short_side, encoder.patch_size, mean, std).to(device)
            with autocast(device, precision):
                features = features_of(pixels)
            yield features.float()

    size = frame_size(height, width, protocol.short_side, encoder.patch_size)
    first = first_labels(given, size[0] // stride, size[1] // stride).to(device)
    maps = [given]
    for soft in propagate(patch_features(), first, protocol.propagation):
        maps.append(resize_labels(to_label_map(soft, stride).cpu().numpy(), (height, width)))
    return np.stack(maps)
