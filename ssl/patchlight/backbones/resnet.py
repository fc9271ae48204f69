"""ResNet, on timm's modules and under timm's parameter names; its patches are the cells of the last feature map."""

from __future__ import annotations

from timm.models import resnet as timm_resnet
from torch import Tensor, nn

from ..records import Tokens

ARCHITECTURES = {
    "resnet18": {"bottleneck": False, "depths": (2, 2, 2, 2)},
    "resnet50": {"bottleneck": True, "depths": (3, 4, 6, 3)},
}
STRIDE = 32


class ResNet(nn.Module):
    """Four stages of convolutions. It has no tokens: nothing that could be masked, and no attention.

    It ends without a norm; as published, its summary is the mean of the patches as they are. BatchNorm joins the images
    of a batch, and the running statistics that an exported teacher carries are its own, as in MoCo v3.

    stem_width: channels of the first stage, 64 as published.
    """

    offers: frozenset[str] = frozenset()
    has_class_token = False
    norm_eps = None

    def __init__(
        self,
        bottleneck: bool,
        depths: tuple[int, int, int, int],
        stem_width: int = 64,
        patch_size: int = STRIDE,
        image_size: int = 224,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if patch_size != STRIDE:
            raise ValueError(
                f"ResNet: patch_size must be {STRIDE}, the step of its last map, got {patch_size}; set it."
            )
        self.patch_size = patch_size
        self.grid(image_size, image_size)
        block = timm_resnet.Bottleneck if bottleneck else timm_resnet.BasicBlock
        channels = tuple(stem_width * 2**stage for stage in range(4))
        parts = timm_resnet.ResNet(block, depths, num_classes=0, channels=channels, drop_path_rate=drop_path)
        self.conv1, self.bn1, self.act1, self.maxpool = parts.conv1, parts.bn1, parts.act1, parts.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = parts.layer1, parts.layer2, parts.layer3, parts.layer4
        self.width = parts.num_features
        self.heads = max(1, self.width // 64)  # of a class-attention summary, as wide as a ViT's

    @property
    def blocks(self) -> list[nn.Module]:
        """Those of all stages."""
        return [*self.layer1, *self.layer2, *self.layer3, *self.layer4]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the last map for an image of this many pixels."""
        if height % STRIDE or width % STRIDE or min(height, width) < STRIDE:
            raise ValueError(
                f"ResNet: height and width must be multiples of {STRIDE}, got {height}x{width}; resize or crop the images."
            )
        return height // STRIDE, width // STRIDE

    def forward(self, pixels: Tensor, mask: Tensor | None = None, layers: tuple[int, ...] = ()) -> Tokens:
        """pixels [M, 3, H, W] to tokens."""
        if mask is not None or layers:
            raise ValueError(
                f"ResNet: it has no tokens to mask and no layers of tokens, got a mask of "
                f"{None if mask is None else tuple(mask.shape)} and layers={layers}; use a transformer."
            )
        grid = self.grid(*pixels.shape[-2:])
        x = self.maxpool(self.act1(self.bn1(self.conv1(pixels))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return Tokens(None, x.flatten(2).transpose(1, 2).contiguous(), grid)
