"""Runs of our own: a demo and a debug run that need nothing, a run for little data, a run for large batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..data.policy import Photometric, dino_policy
from ..objectives.dino import DinoOptions
from ..objectives.selfpatch import SelfPatchOptions
from ..run import Data, Model, Objectives, Optim, Output, Parallel, Run, Schedule
from .papers import LAMBDA, YOUR_IMAGES, selfpatch_vits16_in1k


def demo() -> Run:
    """DINO + SelfPatch on procedural images: two to three minutes on two CPU cores, no data, no download.

    Mild augmentation, Sinkhorn targets, BatchNorm in the heads and a high rate, because a few hundred steps must
    have a visible effect. Not a recipe for photos.
    """
    mild = Photometric(brightness=0.2, contrast=0.2, saturation=0.2, blur=0.1)
    crops = dino_policy(2, 48, 32, (0.6, 1.0), (0.3, 0.6))
    crops = replace(
        crops,
        global_crops=tuple(replace(spec, photometric=mild) for spec in crops.global_crops),
        local_crops=tuple(replace(spec, photometric=mild) for spec in crops.local_crops),
    )
    head: dict[str, Any] = {
        "prototypes": 256,
        "hidden": 512,
        "bottleneck": 64,
        "hidden_norm": "batch",
        "target": "sinkhorn",
    }
    return Run(
        model=Model(
            "vit_tiny",
            patch_size=8,
            image_size=48,
            drop_path=0.0,
            summary="class_attention",
            sizes={"width": 96, "depth": 3, "heads": 3},
        ),
        objectives=Objectives((DinoOptions(**head), SelfPatchOptions(**head)), weights=LAMBDA),
        data=Data(loader="procedural", crops=crops, batch_per_rank=64, workers=0, procedural_images=2048),
        optim=Optim(
            base_lr=8e-3, warmup_epochs=1, weight_decay_end=0.1, teacher_momentum=0.98, freeze_prototypes_epochs=0
        ),
        schedule=Schedule(epochs=8),
        parallel=Parallel(precision="fp32"),
        output=Output(folder="runs/demo", log_every=16, save_every=256, evaluate_every=64),
    )


def debug() -> Run:
    """Twenty steps of a very small DINO + SelfPatch on procedural images, to check that everything works."""
    run = demo()
    return replace(
        run,
        model=replace(run.model, sizes={"width": 32, "depth": 2, "heads": 2}),
        data=replace(run.data, batch_per_rank=4, procedural_images=80),
        schedule=Schedule(epochs=1),
        output=Output(folder="runs/debug", log_every=5, save_every=10),
    )


def small_data() -> Run:
    """One GPU and a folder of images (ten thousand to a few hundred thousand): ViT-Ti/16, 256 images per step.

    Four accumulated batches of 64, a shorter head (4096 prototypes; 65536 are too many for little data), a lower teacher
    momentum for shorter runs, DINO + SelfPatch. Not from a paper, and not yet measured on a real data set.
    """
    dino = DinoOptions(prototypes=4096, center_over="all", teacher_temperature=0.06, warmup_epochs=30)
    return Run(
        model=Model(arch="vit_tiny", summary="class_attention"),
        objectives=Objectives((dino, SelfPatchOptions(prototypes=2048)), weights=LAMBDA),
        data=Data(path=YOUR_IMAGES, crops=dino_policy(6), batch_per_rank=64),
        optim=Optim(min_lr=1e-5, teacher_momentum=0.992),
        schedule=Schedule(epochs=200),
        parallel=Parallel(accumulate=4),
    )


def selfpatch_vits16_large_batch() -> Run:
    """DINO + SelfPatch, ViT-S/16, ImageNet-1k, 4096 images per step: 32 processes x 128.

    Large batches are known to need a longer warm-up (20 epochs), a smaller second beta (0.95), one global gradient norm
    of 1, and a teacher that changes per image as fast as at 1024 images per step
    (0.996^4 = 0.984). Not from a paper, and not yet measured.
    """
    run = selfpatch_vits16_in1k()
    optim = Optim(
        min_lr=1e-5, warmup_epochs=20, betas=(0.9, 0.95), clip=1.0, clip_mode="global", teacher_momentum=0.984
    )
    return replace(run, optim=optim, output=Output(save_every=300, save_async=True))
