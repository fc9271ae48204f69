"""Any module that turns images into patches, as a backbone of this library."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..checks import check
from ..records import Tokens
from .interface import Backbone
from .layout import attention_heads, find_layout
from .timm_backbone import TimmBackbone, is_timm_model


def wrap_backbone(module: nn.Module, image_size: int = 224) -> Backbone:
    """A backbone of any module: a timm model, or one that maps images [M, 3, H, W] to a feature map [M, D, rows, columns]
    or to tokens [M, N, D], before which may be a class token. `.model` of what it returns is the module itself.

    It tries one square image to find width, patch size and class token. image_size: of that image; a timm model knows its
    own. Whether what the module has suffices for an objective is checked when both come together.
    """
    kind = "a class" if isinstance(module, type) else f"a {type(module).__name__}"
    check(isinstance(module, nn.Module), "A backbone must be an nn.Module", kind, "pass the network itself")
    if isinstance(module, Backbone):
        return module
    if is_timm_model(module):
        return TimmBackbone(module)
    return ModuleBackbone(module, image_size)


class ModuleBackbone(Backbone):
    """A module whose output is a feature map or tokens, as it is: patches without a norm of ours, no masks, no layers."""

    norm_eps = None

    def __init__(self, model: nn.Module, image_size: int) -> None:
        super().__init__()
        self.model = model
        self.layout = find_layout(type(model).__name__, model, model, image_size)
        self.width, self.patch_size = self.layout.width, self.layout.patch_size
        self.has_class_token = self.layout.prefix > 0
        self.capabilities = frozenset({"class_token"} if self.has_class_token else ())
        self.heads = attention_heads(self.width)
        self.blocks = [model]

    @property
    def has_final_norm(self) -> bool:
        return False  # unknown: patches are taken as they are

    def forward(self, pixels: Tensor, mask: Tensor | None = None, layers: tuple[int, ...] = ()) -> Tokens:
        """pixels [M, 3, H, W] to tokens."""
        got: Any = "a mask" if mask is not None else f"layers={layers}"
        rule = f"{type(self.model).__name__} is a module of images only"
        check(mask is None and not layers, rule, got, "use a ViT of this library or of timm")
        return Tokens(*self.layout.split(self.model(pixels), self.grid(*pixels.shape[-2:])))
