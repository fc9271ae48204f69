"""Which objectives, backbone, summary and crops work together: one rule for each way in which they do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .backbones.architectures import ARCHITECTURES, capabilities_of
from .backbones.interface import CAPABILITIES, Backbone
from .checks import check, sentence
from .data.policy import CropPolicy
from .objectives.interface import Needs, Objective


@dataclass(frozen=True, slots=True)
class Given:
    """What objectives are given, and how messages name its parts."""

    backbone: str  # its name
    capabilities: frozenset[str]
    class_token: bool  # whether its tokens have one, so that patches are after a norm
    fixed_positions: bool  # whether its table of positions is fixed
    summary: str
    crops: CropPolicy
    names: tuple[str, str, str] = ("summary", "positions", "crops")

    @classmethod
    def of_backbone(cls, backbone: Backbone, summary: str, crops: CropPolicy) -> Given:
        """That of a backbone which is there."""
        lacks = set() if backbone.has_class_token else {"class_token"}
        name = type(getattr(backbone, "model", backbone)).__name__
        fixed = getattr(backbone, "embed_positions", None) is not None
        return cls(name, backbone.capabilities - lacks, backbone.has_class_token, fixed, summary, crops)


def check_objectives(given: Given, objectives: Sequence[Objective]) -> None:
    """Refuses objectives whose needs are not met."""
    summary = given.names[0]
    if given.crops.query_crops and not any(objective.needs().queries for objective in objectives):
        raise ValueError(
            "Query crops need an objective that uses them, got query crops but no such objective; add PqclOptions(), or choose "
            "a crop policy without them."
        )
    if given.summary == "cls" and "class_token" not in given.capabilities:
        rule = f"{summary}='cls' needs a backbone that {CAPABILITIES['class_token']}"
        raise ValueError(sentence(rule, given.backbone, "use 'mean' or 'class_attention'"))
    if given.summary == "class_attention" and given.class_token:
        rule = f"{summary}='class_attention' needs a backbone without a class token"
        remedy = "build it with class_token=False (a timm ViT also with global_pool='avg', fc_norm=False), or use 'cls'"
        raise ValueError(sentence(rule, f"{given.backbone} with one", remedy))
    for objective in objectives:
        for reason in refusals(given, objective.name, objective.needs()):
            raise ValueError(reason)


def refusals(given: Given, name: str, needs: Needs) -> Iterator[str]:
    """A sentence for each need of an objective that is not met."""
    summary, _, crops = given.names
    for capability, what in CAPABILITIES.items():
        if getattr(needs, capability, False) and capability not in given.capabilities:
            able = sorted(arch for arch in ARCHITECTURES if capability in capabilities_of(arch))
            yield f"{name} needs a backbone that {what}, got {given.backbone}; choose from {able}."
    if needs.summary not in (None, given.summary):
        yield (
            f"The objectives need {summary}={needs.summary!r}, got {given.summary!r}; set it, or pool neighbors by mean."
        )
    globals_here = sum(spec.count for spec in given.crops.global_crops)
    if globals_here < needs.global_crops:
        yield f"{name} needs {needs.global_crops} global crops, got {globals_here}; add to {crops}."
    if needs.local_crops and not given.crops.local_crops:
        yield (
            "The objectives need local crops, got a crop policy without them; add some, "
            "or give the teacher global crops only."
        )
    if needs.queries:
        yield from query_refusals(given)


def query_refusals(given: Given) -> Iterator[str]:
    """Query crops must be there and no larger than the global crops, and positions must be fixed."""
    crops, positions = given.crops, given.names[1]
    if not crops.query_crops:
        yield "The objectives need query crops, got a crop policy without them; use pqcl_policy()."
        return
    if not given.fixed_positions:
        yield f"Queries lie between the patches and need fixed positions, got {positions}='learned'; set it to 'sincos'."
    size, largest = crops.query_crops[0].size, crops.global_crops[0].size
    if size > largest:
        yield f"Query crops must not be larger than the global crops, got {size} and {largest} pixels; shrink them."


def check_batch(name: str, needs: Needs, batch: int, remedy: str) -> None:
    """Refuses a batch of a process that is too small for an objective's heads."""
    rule = f"{name} has BatchNorm, which needs 2 images per process"
    check(not needs.batch_norm or batch >= 2, rule, batch, remedy)


def check_global_batch(name: str, needs: Needs, images: int, product: str = "") -> None:
    """Refuses a number of images of an optimizer step that an objective's queue is no multiple of."""
    rule = f"{name} needs a global batch that divides its queue of {needs.batch_divides}"
    fits = not needs.batch_divides or needs.batch_divides % images == 0
    check(fits, rule, f"{images}{product}", "change one of them")
