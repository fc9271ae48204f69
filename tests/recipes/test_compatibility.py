"""Every pairing that builds also trains, and the page agrees with the code."""

from functools import cache

import pytest
import torch
from engine.tiny_run import MetricsInMemory
from parity import ROOT

from patchlight.data.policy import CropPolicy
from patchlight.engine.assembly import build_loader, build_trainer
from patchlight.engine.parallel import Mesh
from patchlight.recipes.compatibility import BACKBONES, Pairing, page, pairings
from patchlight.records import Views

ALL = [pairing for row in pairings() for pairing in row]
ALLOWED = list({(*pairing.options, pairing.backbone): pairing for pairing in ALL if pairing.run is not None}.values())


def name(pairing: Pairing) -> str:
    return "-".join(
        [pairing.backbone, *(type(options).__name__.removesuffix("Options") for options in pairing.options)]
    )


@cache
def batch(backbone: str, crops: CropPolicy) -> Views:
    run = next(pairing.run for pairing in ALLOWED if pairing.backbone == backbone and pairing.run.data.crops == crops)
    return next(build_loader(run, Mesh(torch.device("cpu"))))


class SameBatch:
    """Real crops, made once per backbone and crop policy."""

    dataset_size, stall_seconds, replaced = 8, 0.0, 0

    def __init__(self, pairing: Pairing) -> None:
        self.views = batch(pairing.backbone, pairing.run.data.crops)

    def __next__(self) -> Views:
        return self.views


@pytest.mark.parametrize("pairing", ALLOWED, ids=name)
def test_an_allowed_pairing_trains(pairing):
    """Two steps: all terms finite, and every part that can learn has moved."""
    metrics = MetricsInMemory()
    trainer = build_trainer(pairing.run, None, SameBatch(pairing), metrics)
    before = {name: parameter.detach().clone() for name, parameter in trainer.student.named_parameters()}
    for _ in range(2):
        trainer.step()
    for step in metrics.steps:
        assert all(value.isfinite().all() for value in step.values())
        assert step["step/refused"] == 0
        for part in trainer.objectives.objectives():
            assert {term for term in step if term.startswith(f"{part.name}/")} >= set(part.terms) != set()
    learning = [(n, p) for n, p in trainer.student.named_parameters() if p.requires_grad]
    unchanged = {
        n for n, p in learning if torch.equal(p, before[n]) and not n.endswith(".k.bias")
    }  # adds the same to all scores
    needs = [objective.needs() for objective in trainer.objectives.objectives()]
    if not any(need.masks or need.queries for need in needs):
        unchanged.discard("backbone.mask_token")
    assert not unchanged


def test_the_page_agrees_with_the_code():
    assert (ROOT / "docs/compatibility.md").read_text() == page(), (
        "run python -m patchlight.recipes.compatibility > docs/compatibility.md"
    )


def test_every_backbone_has_a_pairing_and_every_refusal_a_reason():
    assert {pairing.backbone for pairing in ALLOWED} == set(BACKBONES)
    assert all(pairing.reason for pairing in ALL if pairing.run is None)
