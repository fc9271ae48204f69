"""The plain vision transformer, on timm's modules and under timm's parameter names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from patchlight_kernels import query_attention

from ..checks import check, check_choice, sentence
from ..records import Queries, Tokens
from .interface import MAP_BLOCKS, Backbone, MapLevel, as_map, map_blocks
from .patches import PatchEmbed
from .positions import EMBEDDINGS, grid_positions, resize_table

ARCHITECTURES = {
    "vit_tiny": {"width": 192, "depth": 12, "heads": 3},
    "vit_small": {"width": 384, "depth": 12, "heads": 6},
    "vit_base": {"width": 768, "depth": 12, "heads": 12},
    "vit_large": {"width": 1024, "depth": 24, "heads": 16},
}
POSITIONS = ("learned", *EMBEDDINGS)
POSITION_RESIZES = ("released", "size")
STARTS = ("dino", "moco_v3")
NORM_EPS = 1e-6


class VisionTransformer(Backbone):
    """A pre-norm ViT for any image size, as in DINO and iBOT (class_token=True) or SelfPatch (False).

    class_token: True has a class token, N+1 position rows and the final norm inside; False has N position rows, no
        final norm, and its patches are the raw residual stream (token and norm are in the summary head).
    drop_path: the last block's rate of dropping a residual branch per sample; the first block's is 0. Student only.
    position_resize: how the position table is resized to another grid, bicubic either way. "released" samples with scale
        (target + 0.1) / table per axis, as the code of DINO, iBOT and SelfPatch does; "size" with exactly
        target / table, as the papers' plain "bicubic". The default is "released": every local crop uses it, and
        published weights were trained with it.
    positions: "learned", or a fixed table: "sincos" with x in the first half of the channels, as in MAE and PQCL's code,
        "sincos_rows_first" with y there, as in MoCo v3, or "sincos_printed", Eq. (4) of the PQCL paper literally. The
        class token's row is zero then. Queries (PQCL) lie between and beside the patches, so they need a fixed table.
    start: how weights are initialized: "dino", truncated normal, or "moco_v3", uniform by fan-in and fan-out, where
        queries, keys and values count as three matrices.
    qkv_bias: of queries, keys and values; every published ViT of these methods has them.
    """

    capabilities = frozenset({"class_token", "masks", "queries"})
    norm_eps = NORM_EPS
    takes_sizes = returns_blocks = True
    blocks: nn.ModuleList
    residual_16bit = False  # under autocast the tokens between blocks have its format, which saves memory traffic
    cls_token: nn.Parameter | None  # [1, 1, D]
    pos_embed: Tensor  # [1, N (+1), D], a parameter if learned, else a buffer

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
        positions: str = "learned",
        start: str = "dino",
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        check(
            width % heads == 0,
            "VisionTransformer: heads must divide width",
            f"{heads} and {width}",
            "change one of them",
        )
        check(0 <= drop_path < 1, "VisionTransformer: drop_path must lie in [0, 1)", drop_path, "0.1 is the usual rate")
        check_choice("VisionTransformer: position_resize", position_resize, POSITION_RESIZES)
        check_choice("VisionTransformer: positions", positions, POSITIONS)
        check_choice("VisionTransformer: start", start, STARTS)
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
            qkv_bias=qkv_bias,
            class_token=class_token,
            norm_layer=partial(nn.LayerNorm, eps=NORM_EPS),
            embed_layer=partial(PatchEmbed, strict_img_size=False),
            block_fn=Block,
            weight_init="skip",
        )
        self.patch_embed = parts.patch_embed
        self.cls_token = parts.cls_token
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.pos_embed = parts.get_parameter("pos_embed")
        self.embed_positions = EMBEDDINGS.get(positions)  # None where they are learned
        self.blocks = nn.ModuleList(parts.blocks)
        self.norm = parts.norm if class_token else nn.Identity()
        _set_drop_path(self.blocks, drop_path)
        _initialize(self, start)

    def forward(
        self,
        pixels: Tensor,
        mask: Tensor | None = None,
        layers: tuple[int, ...] = (),
        queries: Queries | None = None,
        residual: bool = False,
    ) -> Tokens:
        """pixels [M, 3, H, W] to tokens; masked patches ([M, N] bool) are replaced by the mask token.

        layers: also return the tokens after these blocks (0-based, negative from the end), with the final norm if there
        is one. queries: tokens at positions [M, Q, 2], which attend to the tokens; no token attends to them, unless their keys
        are "joint". residual: also return the patches before the final norm.
        """
        grid = self.grid(*pixels.shape[-2:])
        wanted = [self._block_number(layer) for layer in layers]
        x = self.embed(pixels, mask)
        exact, raw = x.dtype, x.shape[1]
        x = self._as_stream(x)
        query_arguments: tuple = ()
        if queries is not None:
            x = torch.cat([x, self.embed_queries(queries).to(x.dtype)], dim=1)
            query_arguments = () if queries.keys == "joint" else (raw, queries.keys, queries.crop)  # joint: as patches
        kept = {}
        for number, block in enumerate(self.blocks):
            x = block(x, *query_arguments)
            if number in wanted:
                kept[number] = x[:, :raw].to(exact)
        x = x.to(exact)
        intermediate = tuple(self.norm(kept[number]) for number in wanted)
        predictions = None
        if queries is not None:
            x, predictions = x[:, :raw], self.norm(x[:, raw:])
        return self._tokens(x, grid, residual, intermediate, predictions)

    def forward_sizes(self, crops: Sequence[tuple[Tensor, Tensor | None]], residual: bool = False) -> list[Tokens]:
        """`forward` of several (pixels, mask), each of another size: all rows go through a layer together.

        Only attention, its projection and dropped paths take each size by itself. So there are fewer and larger kernels, and
        each weight has one gradient.
        """
        embedded = [self.embed(*crop) for crop in crops]
        sizes = tuple((len(x), x.shape[1]) for x in embedded)
        x = self._as_stream(torch.cat([x.flatten(0, 1) for x in embedded]))
        for block in self.blocks:
            x = block(x, None, "all", None, sizes)
        parts = split_sizes(x.to(embedded[0].dtype), sizes)
        grids = [self.grid(*pixels.shape[-2:]) for pixels, _ in crops]
        return [self._tokens(part, grid, residual) for part, grid in zip(parts, grids, strict=True)]

    @property
    def map_levels(self) -> tuple[MapLevel, ...]:
        return (MapLevel(self.width, self.patch_size),) * len(MAP_BLOCKS)

    def maps(self, pixels: Tensor, blocks: tuple[int, ...] = MAP_BLOCKS) -> tuple[Tensor, ...]:
        """The patches after some blocks, without the final norm, all on one grid."""
        grid = self.grid(*pixels.shape[-2:])
        x, kept = self.embed(pixels), []
        for block in self.blocks:
            x = block(x)
            kept.append(x[:, int(self.has_class_token) :])
        return tuple(as_map(kept[number], grid) for number in map_blocks(len(kept), blocks))

    def _as_stream(self, x: Tensor) -> Tensor:
        """x in the format that tokens have between blocks."""
        if self.residual_16bit and torch.is_autocast_enabled(x.device.type):
            return x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def _tokens(
        self,
        x: Tensor,
        grid: tuple[int, int],
        residual: bool,
        intermediate: tuple[Tensor, ...] = (),
        predictions: Tensor | None = None,
    ) -> Tokens:
        """The output for the raw tokens after the last block."""
        if not self.has_class_token:
            return Tokens(None, x, grid, intermediate, predictions, x if residual else None)
        cls, patches = x.split((1, x.shape[1] - 1), dim=1)
        # Each has a norm call of its own, so that neither is a view: the patches are contiguous, and FSDP2 may hook both.
        before_norm = patches if residual else None
        return Tokens(self.norm(cls.squeeze(1)), self.norm(patches), grid, intermediate, predictions, before_norm)

    def embed(self, pixels: Tensor, mask: Tensor | None = None) -> Tensor:
        """The residual stream before the first block, [M, N (+1), D]."""
        grid = self.grid(*pixels.shape[-2:])
        x = self.patch_embed(pixels)
        if mask is not None:
            self.check_mask(mask, *x.shape[:2])
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        positions = self.positions(grid)
        if self.cls_token is None:
            return x + positions
        cls = (self.cls_token + positions[:, :1]).expand(x.shape[0], -1, -1)  # len(x) would be a constant in an export
        x = x + positions[:, 1:]
        return torch.cat([cls.to(x.dtype), x], dim=1)

    def embed_queries(self, queries: Queries) -> Tensor:
        """Mask tokens, or what is seen of the query crops, at the queries' positions: [M, Q, D]."""
        if self.embed_positions is None:
            rule = "VisionTransformer: queries need positions between patches"
            raise ValueError(sentence(rule, "a learned table", 'build it with positions="sincos"'))
        return query_tokens(self, queries) + self.embed_positions(queries.positions, self.width)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table for a grid, [1, N (+1), D]: unchanged where it fits, else resized except for the class row."""
        if grid == self.table_grid:
            return self.pos_embed
        classes, table = self.pos_embed.tensor_split([1 if self.has_class_token else 0], dim=1)
        resized = resize_table(table, self.table_grid, grid, self.position_resize)
        return torch.cat([classes, resized], dim=1)

    def _block_number(self, layer: int) -> int:
        depth = len(self.blocks)
        rule = f"VisionTransformer: layers must lie in [{-depth}, {depth})"
        check(-depth <= layer < depth, rule, layer, f"there are {depth} blocks")
        return layer % depth


def query_tokens(vit: VisionTransformer, queries: Queries) -> Tensor:
    """Queries without positions: mask tokens, [1, D] for all, or with the patches that are seen, [M, Q, D]."""
    rule = 'VisionTransformer: with keys="joint" queries attend to all queries'
    got = f"crop={queries.crop}, to those of a crop only"
    check(queries.keys != "joint" or queries.crop is None, rule, got, 'leave crop out, or set keys="all"')
    content = queries.content
    if content is None:
        return vit.mask_token
    images, crops = content.pixels.shape[:2]
    seen = vit.patch_embed(content.pixels.flatten(0, 1)).unflatten(0, (images, crops)).flatten(1, 2)
    vit.check_mask(content.mask, *seen.shape[:2])
    tokens = torch.where(content.mask[..., None], vit.mask_token.to(seen.dtype), seen)
    return tokens.repeat(len(queries.positions) // images, 1, 1)  # the same beside each global crop


@torch.no_grad()
def attention_map(vit: VisionTransformer, pixels: Tensor, layer: int = -1) -> Tensor:
    """The attention probabilities of a block, [M, heads, N (+1), N (+1)]. For pictures, not for training."""
    number = vit._block_number(layer)
    x = vit.embed(pixels)
    for block in vit.blocks[:number]:
        x = block(x)
    block = vit.blocks[number]
    assert isinstance(block, Block)  # a ModuleList does not know the types of its modules
    qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, vit.heads, -1))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    return (q @ k.transpose(-2, -1) * block.attn.scale).softmax(dim=-1)


def _set_drop_path(blocks: nn.ModuleList, last_rate: float) -> None:
    """Stochastic depth with rates that grow linearly from 0 in the first block; blocks of rate 0 have none."""
    for number, block in enumerate(blocks):
        rate = last_rate * number / max(len(blocks) - 1, 1)
        if rate > 0:
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)


@torch.no_grad()
def _initialize(vit: VisionTransformer, start: str) -> None:
    """Weights, position table and tokens, always in this order, in which they take random numbers."""
    (_initialize_as_dino if start == "dino" else _initialize_as_moco_v3)(vit)
    _initialize_positions(vit)
    nn.init.zeros_(vit.mask_token)
    if vit.cls_token is None:
        return
    if start == "dino":
        nn.init.trunc_normal_(vit.cls_token, std=0.02)
    else:
        nn.init.normal_(vit.cls_token, std=1e-6)


def _initialize_positions(vit: VisionTransformer) -> None:
    if vit.embed_positions is None:
        nn.init.trunc_normal_(vit.pos_embed, std=0.02)
        return
    table = vit.embed_positions(grid_positions(vit.table_grid), vit.width).to(vit.pos_embed.dtype)
    del vit.pos_embed  # the parameter
    class_row = table.new_zeros(int(vit.has_class_token), vit.width)
    vit.register_buffer("pos_embed", torch.cat([class_row, table])[None])


def _initialize_as_dino(vit: nn.Module) -> None:
    """Linear layers: truncated normal 0.02, biases 0. The patch convolution keeps PyTorch's default."""
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _initialize_as_moco_v3(vit: nn.Module) -> None:
    """Linear layers and the patch convolution: uniform, of width sqrt(6 / (fan-in + fan-out)), biases 0."""
    for name, module in vit.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in, fan_out = module.weight[0].numel(), len(module.weight) // (3 if name.endswith("qkv") else 1)
            bound = math.sqrt(6 / (fan_in + fan_out))
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Block(timm_vit.Block):
    """timm's block, which also takes queries as further rows after the raw tokens, through the same weights.

    Raw tokens attend to raw tokens only, so queries do not change them.
    """

    attn: timm_vit.Attention

    def forward(  # type: ignore[override]  # queries instead of timm's attention mask, which is not used here
        self,
        x: Tensor,
        raw: int | None = None,
        keys: str = "all",
        crop: int | None = None,
        sizes: tuple[tuple[int, int], ...] | None = None,
    ) -> Tensor:
        """x [M, T, D]; of its T rows the first `raw` are raw tokens, the others queries. keys, crop: as in `Queries`.

        sizes: x is [rows, D] instead, the tokens of (images, tokens) of several sizes, one after the other.
        """
        attention = self.attn
        qkv = attention.qkv(self.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))
        if sizes is not None:
            attended_by_size = [attention.proj(self_attention(part).flatten(2)) for part in split_sizes(qkv, sizes)]
            x = x + join_sizes([self.drop_path1(part) for part in attended_by_size])
            y = self.mlp(self.norm2(x))
            if isinstance(self.drop_path2, DropPath):
                y = join_sizes([self.drop_path2(part) for part in split_sizes(y, sizes)])
            return x + y
        if raw is None:
            x = x + self.drop_path1(attention.proj(self_attention(qkv).flatten(2)))
            return x + self.drop_path2(self.mlp(self.norm2(x)))
        attended = query_attention(qkv, raw, keys, crop).flatten(2)
        x = x + drop_path_separately(self.drop_path1, attention.proj(attended), raw)
        return x + drop_path_separately(self.drop_path2, self.mlp(self.norm2(x)), raw)


def self_attention(qkv: Tensor) -> Tensor:
    """[M, T, 3, H, E] to [M, T, H, E]. In this layout the gradient needs one copy, where timm's code needs two."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def split_sizes(x: Tensor, sizes: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """[rows, ...] to [images, tokens, ...] of each size."""
    rows = x.split([images * tokens for images, tokens in sizes])
    return [part.unflatten(0, size) for part, size in zip(rows, sizes, strict=True)]


def join_sizes(parts: list[Tensor]) -> Tensor:
    """The inverse of split_sizes."""
    return torch.cat([part.flatten(0, 1) for part in parts])


class DropPath(nn.Module):
    """Stochastic depth: in training drops the whole branch of a sample with this rate and scales up the others."""

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


def drop_path_separately(drop: nn.Module, x: Tensor, raw: int) -> Tensor:
    """Stochastic depth for raw tokens and queries, x [M, raw + Q, D], drawn separately for each as released."""
    if not (isinstance(drop, DropPath) and drop.training):
        return x
    first, second = torch.rand(2, len(x), 1, 1, device=x.device)
    is_raw = torch.arange(x.shape[1], device=x.device).unsqueeze(1) < raw
    return drop_path(x, torch.where(is_raw, first, second), drop.rate)


def drop_path(x: Tensor, uniform: Tensor, rate: float) -> Tensor:
    """Keeps the samples whose uniform number is at least the rate, scaled by 1 / (1 - rate); zeroes the others."""
    keep = 1 - rate
    return x * ((uniform + keep).floor() / keep).to(x.dtype)
