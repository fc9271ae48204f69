"""The Swin transformer, on timm's modules and under timm's parameter names; its patches are those of the last stage."""

from __future__ import annotations

import torch
from timm.models import swin_transformer as timm_swin
from torch import Tensor, nn

from ..records import Tokens

ARCHITECTURES = {
    "swin_tiny": {"stem_width": 96, "depth": 6},
    "swin_small": {"stem_width": 96, "depth": 18},
    "swin_base": {"stem_width": 128, "depth": 18},
}
STAGES = 4


class SwinTransformer(nn.Module):
    """Four stages, each of half the resolution and twice the width of the one before. It has no class token.

    Its patches are the raw residual stream of the last stage: the summary head brings the final norm. Images need not
    have the size it is built for: a grid that windows do not divide is padded, as timm and the released Swin do it.

    stem_width: of the first stage; depth: blocks of the third stage, the others have two; head_width: of every
        attention head; window: patches along a side of a window.
    patch_size: of the last stage, 8 times the pixels that the first stage joins to a patch.
    """

    offers = frozenset({"masks"})
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
        self.shrinks = 2 ** (STAGES - 1)  # from the first stage's grid to the last's, per side
        if patch_size % self.shrinks:
            raise ValueError(
                f"SwinTransformer: patch_size must be a multiple of {self.shrinks}, got {patch_size}; "
                "32 is that of the published models (4 pixels in the first stage)."
            )
        if stem_width % head_width:
            raise ValueError(
                f"SwinTransformer: head_width must divide stem_width, got {head_width} and {stem_width}; change one."
            )
        self.patch_size, self.width = patch_size, stem_width * self.shrinks
        self.heads = self.width // head_width
        self.grid(image_size, image_size)
        parts = timm_swin.SwinTransformer(
            img_size=image_size,
            patch_size=patch_size // self.shrinks,
            num_classes=0,
            embed_dim=stem_width,
            depths=(2, 2, depth, 2),
            num_heads=tuple(stem_width // head_width * 2**stage for stage in range(STAGES)),
            window_size=window,
            strict_img_size=False,
            drop_path_rate=drop_path,
        )
        self.patch_embed, self.layers = parts.patch_embed, parts.layers
        self.mask_token = nn.Parameter(torch.zeros(1, stem_width))

    @property
    def blocks(self) -> list[nn.Module]:
        """Those of all stages."""
        return [block for stage in self.layers for block in stage.blocks]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the last stage for an image of this many pixels."""
        if height % self.patch_size or width % self.patch_size or min(height, width) < self.patch_size:
            raise ValueError(
                f"SwinTransformer: height and width must be multiples of {self.patch_size}, the last stage's patches, "
                f"got {height}x{width}; resize or crop the images."
            )
        return height // self.patch_size, width // self.patch_size

    def forward(self, pixels: Tensor, mask: Tensor | None = None, layers: tuple[int, ...] = ()) -> Tokens:
        """pixels [M, 3, H, W] to tokens. A masked patch ([M, N] bool) hides all of its 8 x 8 first patches."""
        if layers:
            raise ValueError(
                f"SwinTransformer: blocks of earlier stages have grids of their own, got layers={layers}; "
                "take the last stage's patches."
            )
        grid = self.grid(*pixels.shape[-2:])
        x = self.patch_embed(pixels)  # [M, 8 rows, 8 columns, stem_width]
        if mask is not None:
            hidden = self._enlarged(mask, x.shape[0], grid)
            x = torch.where(hidden, self.mask_token.to(x.dtype), x)
        return Tokens(None, self.layers(x).flatten(1, 2), grid)

    def _enlarged(self, mask: Tensor, images: int, grid: tuple[int, int]) -> Tensor:
        """[M, 8 rows, 8 columns, 1] the mask on the first stage's grid."""
        if mask.shape != (images, grid[0] * grid[1]) or mask.dtype != torch.bool:
            raise ValueError(
                f"SwinTransformer: mask must be bool of shape {(images, grid[0] * grid[1])} (images, patches), "
                f"got {mask.dtype} of shape {tuple(mask.shape)}; flatten its grid row by row."
            )
        sides = mask.unflatten(1, grid).repeat_interleave(self.shrinks, 1).repeat_interleave(self.shrinks, 2)
        return sides.unsqueeze(-1)
