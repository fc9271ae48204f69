"""The published settings of segmentation: which protocol a paper has for a head and a data set, and where it is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...checks import check
from ...usage import word_after
from ..images import PROCEDURAL
from .protocols import (
    HEADS,
    WHOLE,
    ConvSegment,
    FpnSegment,
    LinearSegment,
    SegmentProtocol,
    UperNetSegment,
    head_name,
)


@dataclass(frozen=True)
class Setting:
    """A protocol as published."""

    papers: tuple[str, ...]  # the words that name it
    layout: str
    protocol: SegmentProtocol
    width: int  # of the backbone that it is for
    source: str  # where it is printed, and where the values are from that are printed nowhere


_AS_IBOT = "steps and batch; the rest, which SERE takes from iBOT, as iBOT released it for"
SETTINGS = (
    Setting(
        ("sere", "pqcl"),
        "ade20k",
        UperNetSegment(),
        384,
        f"SERE, 4.2, and PQCL, 4.3 (160k steps): {_AS_IBOT} ViT-S/16",
    ),
    Setting(
        ("sere-vitb",),
        "ade20k",
        UperNetSegment(rate=8e-5, layer_decay=0.65),
        768,
        f"SERE, 4.2: {_AS_IBOT} ViT-B/16",
    ),
    Setting(("sere",), "voc2012", UperNetSegment(steps=20_000), 384, f"SERE, 4.2: {_AS_IBOT} ViT-S/16 and ADE20K"),
    Setting(
        ("sere",),
        "imagenet-s",
        ConvSegment(),
        384,
        "SERE, 4.2; share of the image, colors and drop path as its authors released them for ImageNet-S",
    ),
    Setting(
        ("selfpatch",),
        "ade20k",
        FpnSegment(),
        384,
        "SelfPatch, 4.2: 40k steps; the rest as SelfPatch released it, with AdamW, which it took from XCiT",
    ),
    Setting(
        ("pass",),
        "ade20k",
        FpnSegment(
            optimizer="sgd", rate=0.01, min_rate=1e-4, power=0.9, warmup=0, weight_decay=5e-4, drop_path=0.0
        ),
        384,
        "PASS, B.2: 40k steps and all else as mmsegmentation has it for Semantic FPN; no drop path is named",
    ),
)  # fmt: skip

_SMALL = {
    "steps": 50,
    "warmup": 5,
    "batch": 8,
    "crop": 96,
    "test_short_side": 96,
    "colors": "none",
    "scales": (1.0, 1.5),
}
_QUICK = {**_SMALL, "test": WHOLE, "long_side": 0}
OURS: dict[type[SegmentProtocol], SegmentProtocol] = {  # for procedural scenes: minutes on a CPU
    LinearSegment: LinearSegment(**_QUICK),  # type: ignore[arg-type]  # of mixed types
    ConvSegment: ConvSegment(**_QUICK, epochs=0, warmup_epochs=0, area=None),  # type: ignore[arg-type]
    FpnSegment: FpnSegment(**_QUICK, channels=32, pyramid=True, rate=3e-4),  # type: ignore[arg-type]
    UperNetSegment: UperNetSegment(**_QUICK, channels=32, helper_channels=16, rate=3e-4),  # type: ignore[arg-type]
}


def default_protocol(head: type[SegmentProtocol], words: Sequence[str]) -> SegmentProtocol:
    """What the flags of a command line change: the published setting of its layout and paper, or ours."""
    layout, paper = word_after("--layout", words, PROCEDURAL), word_after("--paper", words)
    setting = setting_of(head, layout, paper)
    if setting is not None:
        return setting.protocol
    return OURS[head] if layout == PROCEDURAL else head()


def setting_of(head: type[SegmentProtocol], layout: str, paper: str = "", width: int = 0) -> Setting | None:
    """The published setting of a head on a data set; None where there is none. paper: whose, by default the first one's.

    width: of the backbone; where a paper has a setting for it and no paper was named, that one.
    """
    fitting = [s for s in SETTINGS if type(s.protocol) is head and s.layout == layout]
    name = next(word for word, kind in HEADS.items() if kind is head)
    if paper:
        known = ", ".join(word for s in fitting for word in s.papers) or "none"
        rule, remedy = f"A paper must have a setting of {name} on {layout}", f"papers that have one: {known}"
        fitting = [s for s in fitting if paper in s.papers]
        check(bool(fitting), rule, repr(paper), remedy)
    return next((s for s in fitting if s.width == width), fitting[0] if fitting else None)


def published_for(
    protocol: SegmentProtocol, layout: str, paper: str, width: int
) -> tuple[SegmentProtocol, tuple[str, ...]]:
    """What a result is compared with, and notes that say what it is. Where nothing is published it is the protocol itself."""
    setting = setting_of(type(protocol), layout, paper, width)
    if setting is None:
        return protocol, (f"no published setting for {head_name(protocol)} on {layout}; ours",)
    notes = [f"published setting: {setting.source}"]
    if not paper and setting is not setting_of(type(protocol), layout):
        notes.append(f"--paper {setting.papers[0]} has the published setting for a backbone of this width")
    return setting.protocol, tuple(notes)
