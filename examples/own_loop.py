"""Pretrains a timm backbone with DINO and SelfPatch in a plain PyTorch loop, without the trainer: half a minute on a CPU.

    python examples/own_loop.py [--output FOLDER]

docs/own_loop.md explains each part.
"""

import argparse
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

import patchlight
from patchlight.data.policy import dino_policy
from patchlight.data.procedural import ProceduralSource
from patchlight.engine.schedules import cosine
from patchlight.objectives import DinoOptions, SelfPatchOptions

EPOCHS, BATCH = 5, 32
VIT = {"img_size": 48, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3, "dynamic_img_size": True}
VIT |= {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}


class Images(Dataset):
    """Any dataset whose items are images, or tuples that begin with one; here generated ones."""

    def __init__(self) -> None:
        self.source = ProceduralSource(count=256, size=64)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int):
        return self.source.read(index), self.source.labels[index]


def main(output: Path) -> None:
    torch.manual_seed(0)
    crops = dino_policy(local_count=2, global_size=48, local_size=32, global_scale=(0.6, 1.0), local_scale=(0.3, 0.6))
    loader = DataLoader(Images(), BATCH, shuffle=True, drop_last=True, collate_fn=patchlight.MultiCrop(crops))
    head = {"prototypes": 256, "hidden": 256, "bottleneck": 64, "hidden_norm": "batch", "target": "sinkhorn"}
    pretraining = patchlight.Pretraining(
        timm.create_model("vit_tiny_patch16_224", **VIT, drop_path_rate=0.1),
        [DinoOptions(**head), SelfPatchOptions(**head)],
        crops,
        steps=EPOCHS * len(loader),
        steps_per_epoch=len(loader),
        summary="class_attention",
        weights={"selfpatch/patch": 0.1},
    )
    optimizer = torch.optim.AdamW(pretraining.student.parameters(), lr=1e-3, weight_decay=0.04)
    for _ in range(EPOCHS):
        total = 0.0
        for views in loader:
            clock = pretraining.clock
            loss, terms = pretraining(views)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(pretraining.student.parameters(), 3.0)
            optimizer.step()
            optimizer.zero_grad()
            pretraining.after_step(momentum=cosine(clock.step, clock.total, 0.98, 1.0))
            total += terms["loss"].item()
        print(f"step {pretraining.clock.step}: loss {total / len(loader):.3f}, {terms['dino/cls']:.3f} for the images")

    output.mkdir(parents=True, exist_ok=True)
    path = output / "teacher.safetensors"
    save_file(pretraining.teacher.backbone.model.state_dict(), path)
    timm.create_model("vit_tiny_patch16_224", **VIT, checkpoint_path=str(path))
    print(f"The teacher, which timm has just loaded: {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/own_loop"))
    main(parser.parse_args().output)
