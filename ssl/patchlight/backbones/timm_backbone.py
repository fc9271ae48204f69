"""A timm model as a backbone of this library, for pretraining and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check, sentence
from ..records import Tokens
from .interface import MAP_BLOCKS, Backbone, MapLevel, map_blocks
from .layout import attention_heads, find_layout

NORM_EPS = 1e-6


class TimmBackbone(Backbone):
    """A timm model: a ViT gives its tokens, any other model the cells of its last feature map, as `forward_features` has them.

    Where timm has a final norm inside, patches are after it. A model whose blocks see each patch from `patch_embed` on takes
    masks: `mask_token`, which is no part of the timm model, replaces the embedding of a masked patch. `model` is the timm
    model itself, whose state dict timm loads.
    """

    model: Any  # an nn.Module; its attributes are those of its timm class

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        size = image_size_of(model)
        embedded: list[Tensor] = []
        embed = getattr(model, "patch_embed", nn.Identity())
        with hooked(embed, lambda _module, _inputs, output: embedded.append(output)):
            self.layout = find_layout(
                type(model).__name__,
                model,
                self.features,
                size,
                getattr(model, "num_prefix_tokens", None),
                getattr(model, "output_fmt", None) == "NHWC",
            )
        self.width, self.patch_size = self.layout.width, self.layout.patch_size
        self.prefix_tokens: int = self.layout.prefix
        self.has_class_token = getattr(model, "cls_token", None) is not None and self.prefix_tokens > 0
        cells = (size // self.patch_size) ** 2
        self.is_vit = (
            self.layout.kind == "tokens"
            and hasattr(model, "blocks")
            and len(embedded) == 1
            and isinstance(embedded[0], Tensor)
            and embedded[0].numel() == cells * self.width
        )
        self.returns_blocks = self.is_vit
        self.final_norm = self.is_vit and not isinstance(getattr(model, "norm", nn.Identity()), nn.Identity)
        self.norm_eps = NORM_EPS if self.is_vit and not (self.final_norm or self.has_class_token) else None
        self.blocks = list(model.blocks) if self.is_vit else [model]  # type: ignore[arg-type]  # a Sequential
        attention = getattr(self.blocks[0], "attn", None) if self.is_vit else None
        self.heads = getattr(attention, "num_heads", attention_heads(self.width))
        abilities = {"class_token": self.has_class_token, "masks": self.is_vit}
        self.capabilities = frozenset(name for name, has in abilities.items() if has)
        weight = next(model.parameters())
        self.mask_token = nn.Parameter(weight.new_zeros(1, self.width)) if self.is_vit else None

    @property
    def has_final_norm(self) -> bool:
        return self.final_norm

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches; an error for a size that the timm model does not take."""
        embed = getattr(self.model, "patch_embed", None)
        own = getattr(embed, "img_size", None)
        if own and getattr(embed, "strict_img_size", False) and tuple(own) != (height, width):
            rule = f"{type(self.model).__name__} was created for images of {own[0]}x{own[1]} pixels only"
            remedy = (
                "create it with dynamic_img_size=True, or strict_img_size=False for a Swin, or use crops of that size"
            )
            raise ValueError(sentence(rule, f"{height}x{width}", remedy))
        return super().grid(height, width)

    def features(self, pixels: Tensor) -> Tensor:
        return self.model.forward_features(pixels)

    def forward(
        self,
        pixels: Tensor,
        mask: Tensor | None = None,
        layers: tuple[int, ...] = (),
        residual: bool = False,
    ) -> Tokens:
        """pixels [M, 3, H, W] to tokens; layers: numbers of a ViT's blocks, after the final norm; -1 for other models."""
        grid = self.grid(*pixels.shape[-2:])
        if not self.is_vit:
            check(mask is None, f"{type(self.model).__name__} has no patches to mask", "a mask", "use a ViT")
            cls, patches, grid = self.layout.split(self.features(pixels), grid)
            return Tokens(self._class_token(cls), patches, grid, (patches,) * len(layers))
        with self._masked(mask, len(pixels), grid):
            if not (layers or residual):
                cls, patches, grid = self.layout.split(self.features(pixels), grid)
                return Tokens(self._class_token(cls), patches, grid)
            numbers = sorted({layer % len(self.blocks) for layer in (*layers, -1)})
            last, outputs = self.model.forward_intermediates(
                pixels, indices=numbers, norm=not residual, output_fmt="NLC", return_prefix_tokens=True
            )
        tokens = dict(zip(numbers, map(self._joined, outputs), strict=True))
        cls, patches, grid = self.layout.split(last, grid)
        raw = tokens[numbers[-1]][:, int(self.has_class_token) :] if residual else None
        kept = tuple(tokens[layer % len(self.blocks)] for layer in layers)
        return Tokens(self._class_token(cls), patches, grid, kept, residual=raw)

    @property
    def map_levels(self) -> tuple[MapLevel, ...]:
        if self.is_vit:
            return (MapLevel(self.width, self.patch_size),) * len(MAP_BLOCKS)
        stages = getattr(self.model, "feature_info", None) if hasattr(self.model, "forward_intermediates") else None
        if not stages:
            return super().map_levels
        norm = hasattr(self.model, "layers") and hasattr(self.model, "patch_embed")  # Swin and its kin
        return tuple(MapLevel(stage["num_chs"], stage["reduction"], norm) for stage in list(stages)[-4:])

    def maps(self, pixels: Tensor, blocks: tuple[int, ...] = MAP_BLOCKS) -> tuple[Tensor, ...]:
        """A ViT's patches after some blocks, without the final norm; the last four stages of others, where timm gives them."""
        if not self.is_vit and len(self.map_levels) == 1:
            return super().maps(pixels)
        self.grid(*pixels.shape[-2:])
        numbers = list(map_blocks(len(self.blocks), blocks)) if self.is_vit else len(self.map_levels)
        kept = self.model.forward_intermediates(
            pixels, indices=numbers, norm=False, output_fmt="NCHW", intermediates_only=True
        )
        return tuple(kept)

    def _class_token(self, first: Tensor | None) -> Tensor | None:
        return first if self.has_class_token else None

    def _joined(self, output: Any) -> Tensor:
        """[M, N (+1), D] of a block's patches and, with prefix tokens, the first of them if it is the class token."""
        if not self.prefix_tokens:
            return output
        patches, prefix = output
        return torch.cat([prefix[:, :1], patches], 1) if self.has_class_token else patches

    @contextmanager
    def _masked(self, mask: Tensor | None, images: int, grid: tuple[int, int]) -> Iterator[None]:
        """Within it, the mask token replaces the embeddings of masked patches."""
        if mask is None:
            yield
            return
        self.check_mask(mask, images, grid[0] * grid[1])

        def hide(_module: nn.Module, _inputs: Any, embedded: Tensor) -> Tensor:  # [M, N, D], or [M, rows, columns, D]
            token = self.mask_token
            assert token is not None
            return torch.where(mask.view(*embedded.shape[:-1], 1), token.to(embedded.dtype), embedded)

        with hooked(self.model.patch_embed, hide):
            yield


@contextmanager
def hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    """Within it, the hook is called with what the module returns."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def is_timm_model(module: nn.Module) -> bool:
    """Whether a module is a timm model, with its features before the pooling."""
    return all(hasattr(module, name) for name in ("forward_features", "num_features"))


def image_size_of(model: Any) -> int:
    """Side of the images that a timm model was created for."""
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if own:
        return own[0]
    return (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[-1]
