"""The plain vision transformer, on timm's modules and under timm's parameter names."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from ..records import Tokens

ARCHITECTURES = {
    "vit_tiny": {"width": 192, "depth": 12, "heads": 3},
    "vit_small": {"width": 384, "depth": 12, "heads": 6},
    "vit_base": {"width": 768, "depth": 12, "heads": 12},
    "vit_large": {"width": 1024, "depth": 24, "heads": 16},
}
POSITION_RESIZES = ("released", "size")


class VisionTransformer(nn.Module):
    """A pre-norm ViT for any image size, as DINO and iBOT (class_token=True) or SelfPatch (False) train it.

    class_token: True has a class token, N+1 position rows and the final norm inside; False has N position rows, no
        final norm, and its patches are the raw residual stream (the summary head brings token and norm).
    drop_path: the last block's rate of dropping a residual branch per sample; the first block's is 0. Student only.
    position_resize: how the position table meets another grid, bicubic either way. "released" samples with scale
        (target + 0.1) / table per axis, as the code of DINO, iBOT and SelfPatch does; "size" with exactly
        target / table, as the papers' plain "bicubic". The default is "released": every local crop goes through
        it, and published weights have learned with it.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        patch_size: int = 16,
        image_size: int = 224,
        mlp_ratio: float = 4.0,
        class_token: bool = True,
        drop_path: float = 0.0,
        position_resize: str = "released",
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"VisionTransformer: heads must divide width, got {heads} and {width}; change one of them."
            )
        if not 0 <= drop_path < 1:
            raise ValueError(
                f"VisionTransformer: drop_path must lie in [0, 1), got {drop_path}; 0.1 is the usual rate."
            )
        if position_resize not in POSITION_RESIZES:
            raise ValueError(
                f"VisionTransformer: position_resize must be one of {POSITION_RESIZES}, got {position_resize!r}."
            )
        self.width, self.heads, self.patch_size = width, heads, patch_size
        self.has_class_token, self.position_resize = class_token, position_resize
        self.table_grid = self.grid(image_size, image_size)
        parts = timm_vit.VisionTransformer(
            img_size=image_size,
            patch_size=patch_size,
            num_classes=0,
            global_pool="token" if class_token else "",
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=mlp_ratio,
            class_token=class_token,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            embed_layer=partial(PatchEmbed, strict_img_size=False),
            weight_init="skip",
        )
        self.patch_embed = parts.patch_embed
        self.cls_token = parts.cls_token  # [1, 1, D] or None
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.pos_embed = parts.pos_embed  # [1, N (+1), D]
        self.blocks = nn.ModuleList(parts.blocks)
        self.norm = parts.norm if class_token else nn.Identity()
        for number, block in enumerate(self.blocks):
            rate = drop_path * number / max(depth - 1, 1)
            if rate > 0:
                block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """The released start: truncated normal 0.02, biases 0; the patch convolution keeps the library's default."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.zeros_(self.mask_token)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of this many pixels."""
        if height % self.patch_size or width % self.patch_size or min(height, width) < self.patch_size:
            raise ValueError(
                f"VisionTransformer: height and width must be multiples of the patch size {self.patch_size}, "
                f"got {height}x{width}; resize or crop the images."
            )
        return height // self.patch_size, width // self.patch_size

    def forward(
        self, pixels: Tensor, mask: Tensor | None = None, layers: tuple[int, ...] = (), residual: bool = False
    ) -> Tokens:
        """pixels [M, 3, H, W] to tokens; masked patches ([M, N] bool) are replaced by the mask token.

        layers asks for the tokens after these blocks (0-based, negative from the end), through the final norm if there
        is one. residual asks for the patches before that norm.
        """
        grid = self.grid(*pixels.shape[-2:])
        wanted = [self._block_number(layer) for layer in layers]
        x = self.embed(pixels, mask)
        kept = {}
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in wanted:
                kept[number] = x
        intermediate = tuple(self.norm(kept[number]) for number in wanted)
        if not self.has_class_token:
            return Tokens(None, x, grid, intermediate, x if residual else None)
        cls, patches = x.split((1, x.shape[1] - 1), dim=1)
        # Normalised apart, so that neither is a view: the patches are contiguous, and FSDP2 may hook both.
        before = patches if residual else None
        return Tokens(self.norm(cls.squeeze(1)), self.norm(patches), grid, intermediate, before)

    def embed(self, pixels: Tensor, mask: Tensor | None = None) -> Tensor:
        """The residual stream before the first block, [M, N (+1), D]."""
        grid = self.grid(*pixels.shape[-2:])
        x = self.patch_embed(pixels)
        if mask is not None:
            if mask.shape != x.shape[:2] or mask.dtype != torch.bool:
                raise ValueError(
                    f"VisionTransformer: mask must be bool of shape {tuple(x.shape[:2])} (images, patches), "
                    f"got {mask.dtype} of shape {tuple(mask.shape)}; flatten its grid row by row."
                )
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        positions = self.positions(grid)
        if not self.has_class_token:
            # The convolution left the channels outermost: without a copy every norm below would make one.
            return (x + positions).contiguous()
        cls = (self.cls_token + positions[:, :1]).expand(len(x), -1, -1)
        x = x + positions[:, 1:]
        return torch.cat([cls.to(x.dtype), x], dim=1)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table for a grid, [1, N (+1), D]: itself where it fits, else resized; the class row stays."""
        if grid == self.table_grid:
            return self.pos_embed
        classes, table = self.pos_embed.tensor_split([1 if self.has_class_token else 0], dim=1)
        resized = resize_table(table, self.table_grid, grid, self.position_resize)
        return torch.cat([classes, resized], dim=1)

    @torch.no_grad()
    def attention_map(self, pixels: Tensor, layer: int = -1) -> Tensor:
        """The attention probabilities of one block, [M, heads, N (+1), N (+1)]. For looking, not for training."""
        number = self._block_number(layer)
        x = self.embed(pixels)
        for block in self.blocks[:number]:
            x = block(x)
        block = self.blocks[number]
        qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
        return (q @ k.transpose(-2, -1) * block.attn.scale).softmax(dim=-1)

    def _block_number(self, layer: int) -> int:
        depth = len(self.blocks)
        if not -depth <= layer < depth:
            raise ValueError(
                f"VisionTransformer: layers must lie in [{-depth}, {depth}), got {layer}; there are {depth} blocks."
            )
        return layer % depth


class DropPath(nn.Module):
    """Stochastic depth: in training drops the whole branch of a sample with this rate and scales up the rest."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        uniform = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device)
        return drop_path(x, uniform, self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


def drop_path(x: Tensor, uniform: Tensor, rate: float) -> Tensor:
    """Keeps the samples whose uniform draw reaches the rate, scaled by 1 / (1 - rate); zeroes the others."""
    keep = 1 - rate
    return x * ((uniform + keep).floor() / keep).to(x.dtype)


def resize_table(table: Tensor, source: tuple[int, int], target: tuple[int, int], resize: str) -> Tensor:
    """A table [1, rows * columns, D] of one grid, resampled bicubically for another; see `VisionTransformer`."""
    exact = table.to(torch.promote_types(table.dtype, torch.float32))
    image = exact.unflatten(1, source).permute(0, 3, 1, 2)
    if resize == "released":
        scale = tuple((wanted + 0.1) / there for wanted, there in zip(target, source, strict=True))
        image = F.interpolate(image, scale_factor=scale, mode="bicubic")
    else:
        image = F.interpolate(image, size=target, mode="bicubic")
    return image.flatten(2).transpose(1, 2).to(table.dtype)
