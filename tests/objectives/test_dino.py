"""DINO against loops over pairs of views, and its options."""

import dataclasses

import objective_cases as cases
import pytest
import torch

from patchlight.objectives.dino import Dino, DinoOptions, other_views
from patchlight.records import Cues, Side

WIDTH, BATCH, LOCAL = 12, 3, 4
SMALL = DinoOptions(prototypes=20, bottleneck=6, hidden=16)


def build(options=SMALL):
    objective = Dino(options).double()
    return objective, objective.head(WIDTH).double(), objective.head(WIDTH).double().requires_grad_(False)


def features(views, batch=BATCH):
    return cases.cls_features(torch.randn(views, batch, WIDTH, dtype=torch.float64))


def sides(student_head, teacher_head, local=LOCAL, teacher_local=False, batch=BATCH):
    student = Side(features(2, batch), features(local, batch) if local else None, head=student_head)
    teacher_crops = features(local, batch) if teacher_local else None
    return student, Side(features(2, batch), teacher_crops, head=teacher_head)


def logits(head, side):
    return [head.prototypes.logits(head(view)) for crops in side.crop_sizes() for view in crops.summary]


def loop(objective, student, teacher, temperature=0.04):
    """The formula, pair by pair."""
    total = pairs = 0
    for t, teacher_logits in enumerate(logits(teacher.head, teacher)[:2]):
        q = ((teacher_logits - objective.target.center) / temperature).softmax(dim=-1)
        for s, student_logits in enumerate(logits(student.head, student)):
            if s != t:
                total = total - (q * (student_logits / 0.1).log_softmax(dim=-1)).sum(dim=-1).mean()
                pairs += 1
    return total / pairs


def run(objective, student, teacher, epoch=0):
    return objective(student, teacher, cases.views_of(BATCH), Cues(), cases.now_of(objective, epoch))["dino/cls"]


@pytest.mark.parametrize("local", [0, LOCAL])
def test_loss_and_gradient_are_those_of_the_pair_loop(local):
    objective, *heads = build()
    student, teacher = sides(*heads, local=local)
    objective.target.center.normal_()
    result, expected = run(objective, student, teacher), loop(objective, student, teacher)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=0)
    parameters = [p for p in heads[0].parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(result, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_pair_weights():
    weights = other_views(2, torch.zeros(5, 1, 1))
    assert weights.shape == (2, 5)
    assert weights[0, 0] == weights[1, 1] == 0
    assert weights.sum().item() == pytest.approx(1)
    assert set(weights[weights > 0].tolist()) == {weights[0, 1].item()}
    with pytest.raises(ValueError, match="two global crops"):
        other_views(1, torch.zeros(1, 1, 1))


def test_a_view_is_not_its_own_target():
    objective, *heads = build()
    student, teacher = sides(*heads, local=0)
    summary = student.global_crops.summary.requires_grad_()

    def gradient():
        (result,) = torch.autograd.grad(run(objective, student, teacher), summary)
        return result

    before = gradient()
    teacher.global_crops.summary[0].normal_()
    after = gradient()
    assert torch.equal(after[0], before[0])
    assert not torch.allclose(after[1], before[1])


def test_no_gradient_reaches_the_teacher():
    objective, student_head, teacher_head = build()
    student, teacher = sides(student_head, teacher_head.requires_grad_(True))
    teacher.global_crops.summary.requires_grad_()
    run(objective, student, teacher).backward()
    assert all(parameter.grad is None for parameter in teacher_head.parameters())
    assert teacher.global_crops.summary.grad is None
    assert student_head.mlp[0].weight.grad.any()


@pytest.mark.parametrize("center_over", ["global", "all"])
def test_center_is_the_mean_of_the_crops_it_is_over(center_over):
    objective, *heads = build(dataclasses.replace(SMALL, center_over=center_over))
    student, teacher = sides(*heads, teacher_local=True)
    run(objective, student, teacher)
    teacher_logits = logits(heads[1], teacher)
    expected = torch.stack(teacher_logits if center_over == "all" else teacher_logits[:2]).mean(dim=(0, 1))
    with torch.no_grad():  # the teacher follows the student before the center moves
        heads[1].prototypes.weight_v.normal_()
    objective.after_step()
    torch.testing.assert_close(objective.target.center, 0.1 * expected, rtol=1e-9, atol=0)


def test_four_micro_batches_are_one_batch():
    objective, *heads = build()
    other, *_ = build()
    objective.target.center.normal_()
    other.load_state_dict(objective.state_dict())
    student, teacher = sides(*heads, batch=4 * BATCH)
    whole = run(objective, student, teacher)
    parts = 0
    for i in range(4):
        images = slice(i * BATCH, (i + 1) * BATCH)
        cut = [
            Side(*[cases.cls_features(crops.summary[:, images]) for crops in side.crop_sizes()], head=side.head)
            for side in (student, teacher)
        ]
        parts = parts + run(other, *cut) / 4
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=0)
    for each in (objective, other):
        each.after_step()
    torch.testing.assert_close(other.target.center, objective.target.center, rtol=1e-12, atol=0)


def test_temperature_follows_the_clock():
    objective, *heads = build(dataclasses.replace(SMALL, teacher_temperature=0.07, warmup_epochs=4))
    student, teacher = sides(*heads)
    for epoch, temperature in ((0, 0.04), (1, 0.05), (3, 0.07), (9, 0.07)):
        expected = loop(objective, student, teacher, temperature)
        torch.testing.assert_close(run(objective, student, teacher, epoch), expected, rtol=1e-9, atol=0)


def test_sinkhorn_balances_the_teachers_rows():
    objective, *heads = build(dataclasses.replace(SMALL, target="sinkhorn"))
    student, teacher = sides(*heads)
    target = objective.teacher_targets(teacher, teacher.head, 0.04, has_local=True)
    logits = target.z @ target.prototypes.T
    share = ((logits + target.bias) / 0.04).softmax(dim=-1).mean(dim=(0, 1))
    assert share.std() < 0.7 * (logits / 0.04).softmax(dim=-1).mean(dim=(0, 1)).std()
    assert run(objective, student, teacher).isfinite()
    objective.after_step()
    assert objective.state_dict() == {}


def test_the_defaults_are_the_released_ones():
    objective = Dino()
    assert objective.target.center.shape == (65536,)
    assert objective.temperature.at(cases.clock_of(0)) == 0.04
    head = Dino(DinoOptions(prototypes=32)).head(WIDTH)
    assert [layer.out_features for layer in head.mlp if hasattr(layer, "out_features")] == [2048, 2048, 256]
    assert not head.prototypes.weight_g.requires_grad
    assert Dino(DinoOptions(prototypes=32, train_norm=True)).head(WIDTH).prototypes.weight_g.requires_grad


def test_needs_follow_the_center():
    assert not Dino(SMALL).needs().teacher_sees_local
    assert Dino(dataclasses.replace(SMALL, center_over="all")).needs().teacher_sees_local


@pytest.mark.parametrize("branch", ["student", "teacher"])
def test_a_missing_head_is_named(branch):
    objective, student_head, teacher_head = build()
    heads = [None if branch == name else head for name, head in (("student", student_head), ("teacher", teacher_head))]
    with pytest.raises(ValueError, match=f"dino: its head must be in both branches, got none in the {branch}"):
        run(objective, *sides(*heads))


def test_missing_local_crops_of_the_teacher_are_named():
    objective, *heads = build(dataclasses.replace(SMALL, center_over="all"))
    with pytest.raises(ValueError, match="center_over='all' needs local crops in the teacher"):
        run(objective, *sides(*heads))
    run(objective, *sides(*heads, local=0))  # without local crops anywhere, "all" are the global ones


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="center_over"):
        DinoOptions(center_over="local")
    with pytest.raises(ValueError, match="sinkhorn"):
        Dino(dataclasses.replace(SMALL, target="none"))
