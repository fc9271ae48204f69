"""The methods by the options of their objectives, and the papers to cite for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Paper:
    """A paper as its own page gives it."""

    key: str
    title: str
    authors: tuple[str, ...]
    year: int
    place: str  # a conference, a journal, or arXiv's number
    kind: str = "inproceedings"

    def bibtex(self) -> str:
        field = {"inproceedings": "booktitle", "article": "journal"}[self.kind]
        rows = {
            "title": f"{{{self.title}}}",
            "author": " and ".join(self.authors),
            field: self.place,
            "year": self.year,
        }
        body = "".join(f"  {name} = {{{value}}},\n" for name, value in rows.items())
        return f"@{self.kind}{{{self.key},\n{body}}}"


DINO = Paper(
    "caron2021dino",
    "Emerging Properties in Self-Supervised Vision Transformers",
    (
        "Caron, Mathilde",
        "Touvron, Hugo",
        "Misra, Ishan",
        "Jégou, Hervé",
        "Mairal, Julien",
        "Bojanowski, Piotr",
        "Joulin, Armand",
    ),
    2021,
    "International Conference on Computer Vision (ICCV)",
)
IBOT = Paper(
    "zhou2022ibot",
    "iBOT: Image BERT Pre-Training with Online Tokenizer",
    (
        "Zhou, Jinghao",
        "Wei, Chen",
        "Wang, Huiyu",
        "Shen, Wei",
        "Xie, Cihang",
        "Yuille, Alan",
        "Kong, Tao",
    ),
    2022,
    "International Conference on Learning Representations (ICLR)",
)
MOCO_V3 = Paper(
    "chen2021mocov3",
    "An Empirical Study of Training Self-Supervised Vision Transformers",
    ("Chen, Xinlei", "Xie, Saining", "He, Kaiming"),
    2021,
    "International Conference on Computer Vision (ICCV)",
)
MOBY = Paper(
    "xie2021moby",
    "Self-Supervised Learning with Swin Transformers",
    (
        "Xie, Zhenda",
        "Lin, Yutong",
        "Yao, Zhuliang",
        "Zhang, Zheng",
        "Dai, Qi",
        "Cao, Yue",
        "Hu, Han",
    ),
    2021,
    "arXiv:2105.04553",
    "article",
)
SELFPATCH = Paper(
    "yun2022selfpatch",
    "Patch-level Representation Learning for Self-supervised Vision Transformers",
    ("Yun, Sukmin", "Lee, Hankook", "Kim, Jaehyung", "Shin, Jinwoo"),
    2022,
    "Conference on Computer Vision and Pattern Recognition (CVPR)",
)
PQCL = Paper(
    "zhang2023pqcl",
    "Patch-level Contrastive Learning via Positional Query for Visual Pre-training",
    ("Zhang, Shaofeng", "Zhou, Qiang", "Wang, Zhibin", "Wang, Fan", "Yan, Junchi"),
    2023,
    "International Conference on Machine Learning (ICML)",
)
SERE = Paper(
    "li2023sere",
    "SERE: Exploring Feature Self-relation for Self-supervised Transformer",
    ("Li, Zhong-Yu", "Gao, Shanghua", "Cheng, Ming-Ming"),
    2023,
    "IEEE Transactions on Pattern Analysis and Machine Intelligence",
    "article",
)
# By the class of an objective's options: the method's name, its paper.
METHODS = {
    "DinoOptions": ("DINO", DINO),
    "IbotOptions": ("iBOT", IBOT),
    "MocoV3Options": ("MoCo v3", MOCO_V3),
    "MobyOptions": ("MoBY", MOBY),
    "SelfPatchOptions": ("SelfPatch", SELFPATCH),
    "SelfPatchContrastOptions": ("SelfPatch with negatives", SELFPATCH),
    "PqclOptions": ("PQCL", PQCL),
    "SereOptions": ("SERE", SERE),
}


def kinds_of(run: Mapping[str, Any]) -> list[str]:
    """The classes of a run's objectives, from its plain values."""
    return [str(options["kind"]) for options in run.get("objectives", {}).get("options", ())]


def methods_of(run: Mapping[str, Any]) -> list[str]:
    """The names of a run's methods; one that is not ours has the name of its class."""
    return [METHODS[kind][0] if kind in METHODS else kind.removesuffix("Options") for kind in kinds_of(run)]


def papers_of(run: Mapping[str, Any]) -> list[Paper]:
    """The papers of a run's methods, each once."""
    return list(
        {paper.key: paper for kind in kinds_of(run) if kind in METHODS for paper in [METHODS[kind][1]]}.values()
    )
