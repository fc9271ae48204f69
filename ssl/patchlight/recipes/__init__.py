"""Recipes: functions that return a complete `Run`. The docstring of each is its help text."""

from __future__ import annotations

from collections.abc import Callable

from ..run import Run
from . import ours, papers
from .switches import with_local_crops, with_objectives

__all__ = ["RECIPES", "with_local_crops", "with_objectives"]

RECIPES: dict[str, Callable[[], Run]] = {
    recipe.__name__: recipe
    for recipe in (
        ours.demo,
        ours.debug,
        ours.small_data,
        ours.selfpatch_vits16_large_batch,
        papers.dino_vits16_in1k,
        papers.dino_vits16_in1k_300ep,
        papers.dino_vits16_in1k_800ep,
        papers.dino_vits16_in1k_two_views,
        papers.dino_resnet50_ins300,
        papers.ibot_vits16_in1k,
        papers.selfpatch_vits16_in1k,
        papers.selfpatch_vits16_in1k_released,
        papers.pass_vits16_in1k,
        papers.dino_vitti16_coco,
        papers.selfpatch_vitti16_coco,
        papers.pass_vitti16_coco,
        papers.dino_vitti8_coco,
        papers.selfpatch_vitti8_coco,
        papers.moco_v3_vits16_in1k,
        papers.moco_v3_vits16_in1k_100ep,
        papers.moco_v3_vits16_ins300,
        papers.moco_v3_vitb16_in1k,
        papers.moco_v3_resnet50_in1k,
        papers.moby_vits16_in1k,
        papers.moby_swint_in1k,
        papers.moby_vitti16_coco,
        papers.moby_swint_coco,
        papers.selfpatch_moby_vitti16_coco,
        papers.selfpatch_moby_vitti16_coco_negatives,
        papers.selfpatch_moby_swint_coco_negatives,
        papers.pqcl_vits16_in1k,
        papers.pqcl_vitb16_in1k,
        papers.pqcl_dino_vits16_in1k,
        papers.pqcl_vits16_in1k_ablation,
        papers.pqcl_vits16_in1k_released,
        papers.sere_vits16_in1k,
        papers.sere_vits16_ins300,
        papers.sere_ibot_vits16_in1k,
        papers.sere_ibot_vitb16_in1k,
        papers.sere_ibot_vitb16_in1k_200ep,
        papers.sere_ibot_vits16_ins300,
        papers.sere_moco_v3_vits16_ins300,
    )
}
