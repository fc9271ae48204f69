"""The Swin transformer, on timm's modules and under timm's parameter names; its patches are those of the last stage."""

from __future__ import annotations

import torch
from timm.models import swin_transformer as timm_swin
from torch import Tensor, nn

from ..checks import check, sentence
from ..records import Tokens
from .interface import MAP_BLOCKS, Backbone, MapLevel
from .patches import PatchEmbed

ARCHITECTURES = {
    "swin_tiny": {"stem_width": 96, "depth": 6},
    "swin_small": {"stem_width": 96, "depth": 18},
    "swin_base": {"stem_width": 128, "depth": 18},
}
STAGES = 4


class SwinTransformer(Backbone):
    """Four stages, each with half the resolution and twice the width of the stage before. It has no class token.

    Its patches are the raw residual stream of the last stage: the summary head has the final norm. Images of other sizes
    than image_size work too: a grid that windows do not divide is padded, as in timm and the released Swin.

    stem_width: of the first stage; depth: blocks of the third stage, the others have two; head_width: of every
        attention head; window: patches along a side of a window.
    patch_size: of the last stage, 8 times that of the first stage.
    """

    capabilities = frozenset({"masks"})
    has_class_token = False
    norm_eps = 1e-5

    def __init__(
        self,
        stem_width: int,
        depth: int,
        head_width: int = 32,
        window: int = 7,
        patch_size: int = 32,
        image_size: int = 224,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.reduction = 2 ** (STAGES - 1)  # from the first stage's grid to the last's, per side
        check(
            patch_size % self.reduction == 0,
            f"SwinTransformer: patch_size must be a multiple of {self.reduction}",
            patch_size,
            "32 is that of the published models (4 pixels in the first stage)",
        )
        check(
            stem_width % head_width == 0,
            "SwinTransformer: head_width must divide stem_width",
            f"{head_width} and {stem_width}",
            "change one of them",
        )
        self.patch_size, self.width = patch_size, stem_width * self.reduction
        self.heads = self.width // head_width
        self.grid(image_size, image_size)
        parts = timm_swin.SwinTransformer(
            img_size=image_size,
            patch_size=patch_size // self.reduction,
            num_classes=0,
            embed_dim=stem_width,
            depths=(2, 2, depth, 2),
            num_heads=tuple(stem_width // head_width * 2**stage for stage in range(STAGES)),
            window_size=window,
            strict_img_size=False,
            drop_path_rate=drop_path,
            embed_layer=PatchEmbed,
        )
        self.patch_embed, self.layers = parts.patch_embed, parts.layers
        self.stem_width = stem_width
        self.blocks = [b for b in parts.layers.modules() if isinstance(b, timm_swin.SwinTransformerBlock)]
        self.mask_token = nn.Parameter(torch.zeros(1, stem_width))

    def forward(self, pixels: Tensor, mask: Tensor | None = None, layers: tuple[int, ...] = ()) -> Tokens:
        """pixels [M, 3, H, W] to tokens. A masked patch ([M, N] bool) hides all of its 8 x 8 patches of the first stage."""
        if layers:
            rule = "SwinTransformer: blocks of earlier stages have grids of their own"
            raise ValueError(sentence(rule, f"layers={layers}", "take the last stage's patches"))
        grid = self.grid(*pixels.shape[-2:])
        x = self.patch_embed(pixels)  # [M, 8 rows, 8 columns, stem_width]
        if mask is not None:
            self.check_mask(mask, len(x), grid[0] * grid[1])
            x = torch.where(self._on_first_grid(mask, grid), self.mask_token.to(x.dtype), x)
        return Tokens(None, self.layers(x).flatten(1, 2), grid)

    @property
    def map_levels(self) -> tuple[MapLevel, ...]:
        first = self.patch_size // self.reduction
        return tuple(MapLevel(self.stem_width * 2**stage, first * 2**stage, norm=True) for stage in range(STAGES))

    def maps(self, pixels: Tensor, blocks: tuple[int, ...] = MAP_BLOCKS) -> tuple[Tensor, ...]:
        """The residual stream after each stage."""
        self.grid(*pixels.shape[-2:])
        x, kept = self.patch_embed(pixels), []
        for stage in self.layers:
            x = stage(x)
            kept.append(x.permute(0, 3, 1, 2))
        return tuple(kept)

    def _on_first_grid(self, mask: Tensor, grid: tuple[int, int]) -> Tensor:
        """[M, 8 rows, 8 columns, 1] the mask on the first stage's grid."""
        sides = mask.unflatten(1, grid).repeat_interleave(self.reduction, 1).repeat_interleave(self.reduction, 2)
        return sides.unsqueeze(-1)
