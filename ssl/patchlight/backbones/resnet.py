"""ResNet, on timm's modules and under timm's parameter names; its patches are the cells of the last feature map."""

from __future__ import annotations

from timm.models import resnet as timm_resnet
from torch import Tensor

from ..checks import check, sentence
from ..records import Tokens
from .interface import MAP_BLOCKS, Backbone, MapLevel

ARCHITECTURES = {
    "resnet18": {"bottleneck": False, "depths": (2, 2, 2, 2)},
    "resnet50": {"bottleneck": True, "depths": (3, 4, 6, 3)},
}
STRIDE = 32


class ResNet(Backbone):
    """Four stages of convolutions. It has no tokens that could be masked, and no attention.

    It ends without a norm; as published, its summary is the mean of the patches as they are. BatchNorm connects the images
    of a batch, and an exported teacher has running statistics of its own, as in MoCo v3.

    stem_width: channels of the first stage, 64 as published.
    """

    capabilities = frozenset[str]()
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
        rule = f"ResNet: patch_size must be {STRIDE}, the stride of its last map"
        check(patch_size == STRIDE, rule, patch_size, f"set it to {STRIDE}")
        self.patch_size = patch_size
        self.grid(image_size, image_size)
        block = timm_resnet.Bottleneck if bottleneck else timm_resnet.BasicBlock
        channels = tuple(stem_width * 2**stage for stage in range(4))
        parts = timm_resnet.ResNet(
            block,  # type: ignore[arg-type]  # timm takes the class, but its annotation names an instance
            depths,
            num_classes=0,
            channels=channels,
            drop_path_rate=drop_path,
        )
        self.conv1, self.bn1, self.act1, self.maxpool = parts.conv1, parts.bn1, parts.act1, parts.maxpool
        stages = (parts.get_submodule(f"layer{number}") for number in (1, 2, 3, 4))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.blocks = [module for module in parts.modules() if isinstance(module, block)]  # of all stages
        self.width = parts.num_features
        self.heads = max(1, self.width // 64)  # of a class-attention summary, as in a ViT of this width

    def forward(self, pixels: Tensor, mask: Tensor | None = None, layers: tuple[int, ...] = ()) -> Tokens:
        """pixels [M, 3, H, W] to tokens."""
        if mask is not None or layers:
            got = f"a mask of {None if mask is None else tuple(mask.shape)} and layers={layers}"
            raise ValueError(
                sentence("ResNet: it has no tokens to mask and no layers of tokens", got, "use a transformer")
            )
        grid = self.grid(*pixels.shape[-2:])
        return Tokens(None, self.maps(pixels)[-1].flatten(2).transpose(1, 2).contiguous(), grid)

    @property
    def map_levels(self) -> tuple[MapLevel, ...]:
        return tuple(MapLevel(self.width // 2 ** (3 - stage), STRIDE // 2 ** (3 - stage)) for stage in range(4))

    def maps(self, pixels: Tensor, blocks: tuple[int, ...] = MAP_BLOCKS) -> tuple[Tensor, ...]:
        """The maps after each stage."""
        x, kept = self.maxpool(self.act1(self.bn1(self.conv1(pixels)))), []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            kept.append(x)
        return tuple(kept)
