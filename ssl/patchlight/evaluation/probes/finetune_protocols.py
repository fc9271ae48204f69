"""How networks are fine-tuned: SERE's setting on ImageNet, with all labels or few, and iBOT's on other data sets.

SERE states epochs, batches and rates on ImageNet in Section 4.2 and leaves the rest to a supplement, which is not part of
the paper. The README of its release names the code that was used: that of MAE on ImageNet and that of iBOT elsewhere. So
what the paper does not state is taken from there, as the text of each field says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...checks import check, check_numbers, check_positive


@dataclass(frozen=True)
class FinetuneProtocol:
    """Fine-tuning on ImageNet (SERE, 4.2), also of a ViT-B: the rate per image and the decay are MAE's for ViT-B."""

    epochs: int = 100
    """Passes over the training images."""
    batch: int = 512
    """Images per step over all ranks."""
    rate: float = 1e-3
    """Learning rate of the head for a batch of this size; it is not scaled."""
    min_rate: float = 1e-6
    """The rate at the end of its cosine."""
    warmup_epochs: int = 5
    """Epochs over which the rate rises."""
    layer_decay: float = 0.65
    """Each block's rate is this share of that of the one above it."""
    weight_decay: float = 0.05
    """Of AdamW; vectors, biases and tokens have none. MAE's and iBOT's."""
    drop_path: float = 0.1
    """The last block's rate of dropping a residual branch. MAE's and iBOT's."""
    randaugment: str = "rand-m9-mstd0.5-inc1"
    """timm's name of the augmentation; empty: crops and flips only. MAE's and iBOT's."""
    erase: float = 0.25
    """Share of images with a random box erased. MAE's and iBOT's."""
    mixup: float = 0.8
    """Strength of mixing images; 0 turns it off. MAE's and iBOT's."""
    cutmix: float = 1.0
    """Strength of pasting boxes; 0 turns it off. MAE's and iBOT's."""
    smoothing: float = 0.1
    """Of labels. MAE's and iBOT's."""
    repeats: int = 1
    """Times that an image is in a batch, changed anew; an epoch then has only this share of the images. iBOT's is 3."""
    clip: float = 0.0
    """Largest norm over all gradients; 0: none."""
    size: int | None = None
    """Side of the images; None: the size that the position table was made for."""
    seed: int = 0
    """Of order, augmentation and the head's start."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in ("epochs", "batch", "rate", "layer_decay"):
            check_positive(f"{name}.{field}", getattr(self, field), "the published value is the default")
        check_numbers(self, repeats="[1, inf)")
        check(
            0 <= self.warmup_epochs <= self.epochs,
            f"{name}.warmup_epochs must lie in [0, epochs]",
            f"{self.warmup_epochs} of {self.epochs}",
            "change one of them",
        )


@dataclass(frozen=True)
class SemiProtocol(FinetuneProtocol):
    """Few labels of ImageNet (SERE, 4.2, which follows iBOT): 1000 epochs, batches of 1024, 1e-5. The rest is iBOT's."""

    epochs: int = 1000
    """Passes over the labeled images."""
    batch: int = 1024
    """Images per step over all ranks."""
    rate: float = 1e-5
    """Learning rate; it is not scaled."""
    min_rate: float = 1e-5
    """The rate at the end of its cosine: iBOT's, so that the rate stays the same after the warm-up."""
    layer_decay: float = 1.0
    """All blocks have the same rate."""
    repeats: int = 3
    """Times that an image is in a batch, changed anew; an epoch then has only this share of the images."""


# iBOT's for ViT-S on other data sets: the rate of its command for 512 images, times the 768 of a step (8 ranks of 96).
TRANSFER = FinetuneProtocol(epochs=1000, batch=768, rate=7.5e-6 * 768 / 512, min_rate=1e-5, layer_decay=1.0, repeats=3)
_OF_LAYOUT = {
    "cifar10": TRANSFER,
    "cifar100": TRANSFER,
    "flowers102": TRANSFER,
    "cars": replace(TRANSFER, rate=7.5e-5 * 768 / 512),
    "inat2019": replace(TRANSFER, epochs=360, rate=2.5e-5 * 768 / 512, erase=0.1),
}


def published_finetune(layout: str) -> FinetuneProtocol:
    """The protocol of the data set of a layout; any folder has that of ImageNet."""
    return _OF_LAYOUT.get(layout, FinetuneProtocol())
