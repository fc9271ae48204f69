"""The layers of a backbone in the order in which an image passes them, for rates that depend on depth."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from timm.models import group_parameters, resnet, swin_transformer, vision_transformer

from ..backbones.resnet import ResNet
from ..backbones.swin import SwinTransformer
from ..backbones.timm_backbone import TimmBackbone
from ..backbones.vit import VisionTransformer
from ..checks import check
from .encoder import EvaluatedBackbone

# Our backbones have the parameter names of these classes of timm.
NAMED_AS: Mapping[type, type] = {
    VisionTransformer: vision_transformer.VisionTransformer,
    SwinTransformer: swin_transformer.SwinTransformer,
    ResNet: resnet.ResNet,
}
FINAL_NORM = "norm"  # timm counts it with the last block; BEiT and iBOT with the head
HEAD = "~"  # a name that no model has, for the place of a head
MASK_TOKEN = "mask_token"  # of pretraining, not trained afterwards


def parameter_layers(backbone: EvaluatedBackbone) -> tuple[dict[str, int], int]:
    """The layer of each parameter of a backbone but the mask token, by name; and the layer of a head on top of it.

    0 is the stem, then comes a layer per block of all stages, as timm groups them: what leads to a stage (Swin's
    downsampling) counts with the first block of that stage. The final norm is in the head's layer.
    """
    model, prefix = (backbone.model, "model.") if isinstance(backbone, TimmBackbone) else (backbone, "")
    matcher: Any = getattr(NAMED_AS.get(type(model), type(model)), "group_matcher", None)
    rule, remedy = "Layer decay needs a backbone whose layers are known: ours and timm's models", "set layer_decay to 1"
    check(matcher is not None, rule, type(getattr(model, "model", model)).__name__, remedy)
    names = [name for name, _ in model.named_parameters() if name != MASK_TOKEN]
    named: Any = SimpleNamespace(named_parameters=lambda: [(name, None) for name in (*names, HEAD)])
    found = group_parameters(named, matcher(model), reverse=True)
    top = found[HEAD]
    return {f"{prefix}{name}": top if name.split(".")[0] == FINAL_NORM else found[name] for name in names}, top
