"""A timm model as a backbone of this library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..records import Tokens


class TimmBackbone(nn.Module):
    """A timm model with our interface: a ViT gives its tokens, any other model the cells of its last feature map."""

    model: Any  # an nn.Module; its attributes are those of its timm class

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.width: int = self.model.num_features
        self.prefix_tokens: int = getattr(model, "num_prefix_tokens", 0)
        self.has_class_token = getattr(model, "cls_token", None) is not None
        self.is_vit = hasattr(model, "blocks") and hasattr(model, "patch_embed")
        self.patch_size: int = (
            self.model.patch_embed.patch_size[0] if self.is_vit else self.model.feature_info[-1]["reduction"]
        )

    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        return self.model.blocks if self.is_vit else nn.Sequential(self.model)

    def forward(self, pixels: Tensor, layers: tuple[int, ...] = ()) -> Tokens:
        """pixels [M, 3, H, W] to tokens after the final norm; layers: numbers of a ViT's blocks, -1 for other models."""
        if not self.is_vit:
            (map_MDhw,) = self.model.forward_intermediates(
                pixels, indices=1, intermediates_only=True, output_fmt="NCHW"
            )
            patches = map_MDhw.flatten(2).transpose(1, 2)
            rows, columns = map_MDhw.shape[-2:]
            return Tokens(None, patches, (rows, columns), (patches,) * len(layers))
        depth = len(self.blocks)
        numbers = sorted({layer % depth for layer in (*layers, -1)})
        outputs = self.model.forward_intermediates(
            pixels, indices=numbers, norm=True, intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True
        )
        tokens = {
            number: torch.cat([prefix[:, :1], patches], 1) if self.has_class_token else patches
            for number, (patches, prefix) in zip(numbers, outputs, strict=True)
        }
        last = tokens[depth - 1]
        cls, patches = (last[:, 0], last[:, 1:]) if self.has_class_token else (None, last)
        grid = pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size
        return Tokens(cls, patches, grid, tuple(tokens[layer % depth] for layer in layers))
