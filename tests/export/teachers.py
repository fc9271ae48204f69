"""Runs of every family of backbones, with weights that make all parts of them count."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from engine.tiny_run import DINO, MOCO, SELFPATCH, tiny_run, tiny_trainer

from patchlight.data.policy import dino_policy

VIT = {"sizes": {"width": 48, "depth": 2, "heads": 3}}
TWO_VIEWS = {"crops": dino_policy(0, 64)}
RUNS = {
    "class token": {"model": VIT},
    "class attention": {"model": {**VIT, "summary": "class_attention"}, "options": (DINO, SELFPATCH)},
    "mean": {"model": {**VIT, "summary": "mean"}},
    "swin": {
        "model": {
            "arch": "swin_tiny",
            "sizes": {"stem_width": 32, "depth": 2, "window": 4},
            "image_size": 64,
            "patch_size": 32,
            "summary": "mean",
        },
        "data": TWO_VIEWS,
    },
    "resnet": {
        "model": {
            "arch": "resnet18",
            "sizes": {"stem_width": 16},
            "image_size": 64,
            "patch_size": 32,
            "summary": "mean",
        },
        "data": TWO_VIEWS,
        "options": (MOCO,),
    },
    "moco v3": {
        "model": {
            "sizes": {"width": 48, "depth": 2, "heads": 12},
            "positions": "sincos_rows_first",
            "start": "moco_v3",
        },
        "data": {"crops": dino_policy(0, 16)},
        "options": (MOCO,),
    },
}


def saved_run(folder: Path, kind: str = "class token", steps: int = 0, **parts) -> Path:
    """The folder of a run of this kind with a checkpoint."""
    run = tiny_run(folder, **{**RUNS[kind], **parts})
    trainer = tiny_trainer(run)
    randomize(trainer.teacher)
    for _ in range(steps):
        trainer.step()
    trainer.save()
    (folder / "run.json").write_text(json.dumps(run.to_dict()))
    return folder


@torch.no_grad()
def randomize(module: torch.nn.Module) -> None:
    """Weights and statistics as a training leaves them: none is 0 or 1."""
    for name, parameter in module.named_parameters():
        parameter.add_(torch.randn_like(parameter) * (0.02 if parameter.ndim > 1 else 0.1))
        assert parameter.isfinite().all(), name
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(torch.rand_like(buffer) * 0.3)
