"""SelfPatch against loops over crops, and its options."""

import dataclasses

import objective_cases as cases
import pytest
import torch

from patchlight.objectives.interface import NeighborRule
from patchlight.objectives.selfpatch import SelfPatch, SelfPatchOptions
from patchlight.records import Cues, Features, Side

WIDTH, BATCH = 10, 2
SMALL = SelfPatchOptions(prototypes=14, bottleneck=6, hidden=12)


def build(**options):
    objective = SelfPatch(dataclasses.replace(SMALL, **options)).double()
    return objective, objective.head(WIDTH).double(), objective.head(WIDTH).double().requires_grad_(False)


def features(views, grid, neighbors):
    summary = torch.randn(views, BATCH, WIDTH, dtype=torch.float64)
    patches, others = torch.randn(2, views, BATCH, grid[0] * grid[1], WIDTH, dtype=torch.float64)
    return Features(summary, patches, grid, neighbors=others if neighbors else None)


def side(head, neighbors, local=True):
    return Side(features(2, (4, 5), neighbors), features(3, (2, 3), neighbors) if local else None, head=head)


def sides(student_head, teacher_head):
    return side(student_head, False), side(teacher_head, True)


def run(objective, student, teacher):
    return objective(student, teacher, cases.views_of(BATCH), Cues(), cases.now_of(objective))["selfpatch/patch"]


def crop_losses(objective, student, teacher):
    """[patches] the loss of every patch, one tensor per crop."""
    for student_size, teacher_size in zip(student.crop_sizes(), teacher.crop_sizes(), strict=True):
        for crop, neighbors in zip(student_size.patches, teacher_size.neighbors, strict=True):
            t = teacher.head.prototypes.logits(teacher.head(neighbors))
            q = ((t - objective.target.center) / 0.04).softmax(dim=-1)
            s = student.head.prototypes.logits(student.head(crop))
            yield -(q * (s / 0.1).log_softmax(dim=-1)).sum(dim=-1).flatten()


@pytest.mark.parametrize("average", ["crop", "patch"])
def test_loss_and_gradient_are_those_of_the_loop(average):
    objective, *heads = build(average=average)
    objective.target.center.normal_()
    student, teacher = sides(*heads)
    losses = list(crop_losses(objective, student, teacher))
    expected = torch.stack([x.mean() for x in losses]).mean() if average == "crop" else torch.cat(losses).mean()
    result = run(objective, student, teacher)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=0)
    parameters = [p for p in heads[0].parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(result, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_without_local_crops_in_the_teacher_only_global_crops_count():
    objective, *heads = build(teacher_sees_local=False)
    student, teacher = sides(*heads)
    expected = torch.stack([x.mean() for x in crop_losses(objective, student, teacher)][:2]).mean()
    for teacher_side in (teacher, Side(teacher.global_crops, head=teacher.head)):
        torch.testing.assert_close(run(objective, student, teacher_side), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("center_over", ["all", "global"])
def test_center_counts_every_patch_once(center_over):
    objective, *heads = build(center_over=center_over)
    student, teacher = sides(*heads)
    run(objective, student, teacher)
    objective.after_step()
    used = teacher.crop_sizes() if center_over == "all" else [teacher.global_crops]
    rows = torch.cat([size.neighbors.flatten(0, 2) for size in used])
    expected = 0.1 * heads[1].prototypes.logits(heads[1](rows)).mean(dim=0)
    torch.testing.assert_close(objective.target.center, expected, rtol=1e-9, atol=0)


def test_sinkhorn_changes_the_targets():
    objective, *heads = build()
    balanced, *_ = build(target="sinkhorn")
    student, teacher = sides(*heads)
    assert not torch.allclose(run(objective, student, teacher), run(balanced, student, teacher), rtol=1e-3)
    balanced.after_step()


def test_no_gradient_reaches_the_teacher_or_the_class_summary():
    objective, student_head, teacher_head = build()
    student, teacher = sides(student_head, teacher_head.requires_grad_(True))
    student.global_crops.summary.requires_grad_()
    run(objective, student, teacher).backward()
    assert student.global_crops.summary.grad is None
    assert all(parameter.grad is None for parameter in teacher_head.parameters())


def test_needs_follow_the_options():
    rule = NeighborRule(radius=2, k=8, border="clip")
    needs = build(neighbors=rule)[0].needs()
    assert needs.neighbors == rule
    assert needs.local_crops
    assert needs.teacher_sees_local
    assert needs.summary == "class_attention"
    fewer = build(teacher_sees_local=False, neighbors=NeighborRule(pool="mean"))[0].needs()
    assert not fewer.local_crops
    assert not fewer.teacher_sees_local
    assert fewer.summary is None


def test_the_defaults_are_the_released_ones():
    objective = SelfPatch()
    assert objective.target.center.shape == (4096,)
    assert objective.needs().neighbors == NeighborRule(radius=1, k=4, border="wrap", pool="class_attention")
    assert objective.temperature.at(cases.clock_of(0)) == 0.04


def test_what_is_missing_is_named():
    objective, *heads = build()
    student, teacher = sides(*heads)
    with pytest.raises(ValueError, match=r"selfpatch: its head .* got none in the student"):
        run(objective, side(None, False), teacher)
    with pytest.raises(ValueError, match="needs local crops in the teacher"):
        run(objective, student, side(heads[1], True, local=False))
    with pytest.raises(ValueError, match="needs local crops in the student"):
        run(objective, side(heads[0], False, local=False), teacher)
    with pytest.raises(ValueError, match="must aggregate each patch's neighbors"):
        run(objective, student, side(heads[1], False))
    with pytest.raises(ValueError, match="average"):
        SelfPatchOptions(average="image")
    with pytest.raises(ValueError, match="center_over"):
        SelfPatchOptions(center_over="local")
