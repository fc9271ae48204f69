"""An exported teacher through torch.hub, as a plain timm model without a classifier.

torch.hub.load("path/to/this/repository", "teacher", source="local", path="runs/.../teacher.safetensors")
"""

import json
import math
from pathlib import Path
from typing import Any

dependencies = ["torch", "timm", "safetensors"]


def teacher(path, heads=None):
    """The backbone of a teacher.safetensors, in eval mode, for any image size that its patches divide.

    heads: attention heads of a vision transformer. By default those in the checkpoint's facts.json, if that file is beside
    the weights, or else 64 channels per head, as all of them have but MoCo v3's ViT-S.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"teacher: path must be a file, got {path}, which is none; check the path.")
    try:
        model = _model(path, heads)
    except _HeadsError:
        raise
    except Exception as error:  # a file that is damaged, or of another library, can be wrong in any way
        reason = (str(error).strip() or "no reason").splitlines()[0].rstrip(":.")
        raise ValueError(
            f"teacher: path must be a teacher.safetensors of a run, with its facts.json or without, got {path}, which cannot "
            f"be read ({type(error).__name__}: {reason}); copy it again from its checkpoint."
        ) from error
    bad = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(
            f"teacher: weights must be finite, got {len(bad)} tensors that are not, such as {bad[0]}, in {path}; take an "
            "earlier checkpoint."
        )
    return model.eval()


class _HeadsError(ValueError):
    """The number of heads is not known."""


def _model(path, heads):
    from safetensors.torch import load_file

    weights = load_file(path)
    facts = path.with_name("facts.json")
    run: dict[str, Any] = {"sizes": {}, "image_size": 224}
    if facts.exists():
        run = json.loads(facts.read_text())["run"]["model"]
    if "conv1.weight" in weights:
        model = _resnet(weights)
    elif "layers.0.blocks.0.norm1.weight" in weights:
        model = _swin(weights, run["image_size"])
    else:
        model = _vit(weights, heads or run["sizes"].get("heads"))
    model.load_state_dict(weights, strict=True)
    return model


def _vit(weights, heads):
    from timm.models.vision_transformer import VisionTransformer

    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    if heads is None:
        heads, rest = divmod(width, 64)
        if rest:
            raise _HeadsError(
                f"teacher: heads must be given where 64 does not divide the width, got {width}; pass heads."
            )
    class_token = "cls_token" in weights
    return VisionTransformer(
        img_size=math.isqrt(weights["pos_embed"].shape[1] - class_token) * patch,
        patch_size=patch,
        num_classes=0,
        embed_dim=width,
        depth=_count(weights, "blocks."),
        num_heads=heads,
        class_token=class_token,
        global_pool="token" if class_token else "avg",
        fc_norm=False,
        dynamic_img_size=True,
    )


def _swin(weights, image_size):
    from timm.models.swin_transformer import SwinTransformer

    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    tables = [
        weights[f"layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in range(_count(weights, "layers."))
    ]
    return SwinTransformer(
        img_size=image_size,  # windows of a stage are no larger than its grid
        patch_size=patch,
        num_classes=0,
        embed_dim=width,
        depths=tuple(_count(weights, f"layers.{stage}.blocks.") for stage in range(len(tables))),
        num_heads=tuple(table.shape[1] for table in tables),
        window_size=(math.isqrt(tables[0].shape[0]) + 1) // 2,
        strict_img_size=False,
    )


def _resnet(weights):
    from timm.models.resnet import BasicBlock, Bottleneck, ResNet

    return ResNet(
        Bottleneck if "layer1.0.conv3.weight" in weights else BasicBlock,  # type: ignore[arg-type]  # timm takes the class
        tuple(_count(weights, f"layer{stage}.") for stage in (1, 2, 3, 4)),
        num_classes=0,
        channels=tuple(weights[f"layer{stage}.0.bn1.weight"].shape[0] for stage in (1, 2, 3, 4)),
    )


def _count(weights, prefix):
    """How many different numbers follow the prefix."""
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})
