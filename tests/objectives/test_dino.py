"""DINO against loops over pairs of views, and its options."""

import dataclasses

import objective_cases as cases
import pytest
import torch
import torch.nn.functional as F

from patchlight.objectives.dino import Dino, DinoOptions, other_views
from patchlight.records import Crops, Cues, Features, Side, Views

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


GRID, POINTS = (5, 4), 3


def with_patches(views: int = 2, overlap: bool = True):
    """DINO+ and sides with patches, of global crops at places that overlap, or do not in one image."""
    objective, *heads = build(dataclasses.replace(SMALL, patches=True, patch_points=POINTS))
    corner, size = torch.randint(0, 12, (views, BATCH, 2)), torch.randint(25, 50, (views, BATCH, 2))
    box = torch.cat([corner, size], dim=-1).double()
    if not overlap:
        box[0, 1, 0] += 1000
    crops = Crops(torch.zeros(views, BATCH, 3, 1, 1), box, torch.rand(views, BATCH) < 0.5)

    def side(head):
        x = torch.randn(views, BATCH, GRID[0] * GRID[1], WIDTH, dtype=torch.float64)
        return Side(Features(x.mean(2), x, GRID), head=head)

    return objective, side(heads[0]), side(heads[1]), Views(crops, None, None, torch.arange(BATCH))


def read_at(patches, crops, view, image, xy):
    """[D] the features of a crop at a point of the image, by grid_sample."""
    x, y, w, h = crops.box[view, image].tolist()
    u, v = (xy[0] - x) / w, (xy[1] - y) / h
    u = 1 - u if crops.flip[view, image] else u
    at = torch.tensor([[[[2 * u - 1, 2 * v - 1]]]], dtype=torch.float64)
    maps = patches[view, image].T.unflatten(1, GRID)[None]
    return F.grid_sample(maps, at, align_corners=False).flatten()


def patch_loop(objective, student, teacher, crops):
    """Pair by pair, image by image, point by point; and the teacher's logits of all points that count."""
    total, seen, number, views = 0.0, [], 0, len(crops.box)
    for s in range(views):
        for t in range(views):
            if s == t:
                continue
            for image in range(BATCH):
                number += POINTS**2
                corners = [[*box[:2], box[0] + box[2], box[1] + box[3]] for box in crops.box[[s, t], image].tolist()]
                low, high = ([f(pair) for pair in zip(*corners, strict=True)] for f in (max, min))
                if high[2] <= low[0] or high[3] <= low[1]:
                    continue
                for j in range(POINTS):
                    for i in range(POINTS):
                        xy = [
                            a + (n + 0.5) / POINTS * (b - a) for n, a, b in ((i, low[0], high[2]), (j, low[1], high[3]))
                        ]
                        a = student.head(read_at(student.global_crops.patches, crops, s, image, xy))
                        b = teacher.head(read_at(teacher.global_crops.patches, crops, t, image, xy))
                        seen.append(teacher.head.prototypes.logits(b))
                        target = ((seen[-1] - objective.patch_target.center) / 0.04).softmax(-1)
                        total = total - (target * (student.head.prototypes.logits(a) / 0.1).log_softmax(-1)).sum()
    return total / number, torch.stack(seen)


@pytest.mark.parametrize(("views", "overlap"), [(2, True), (2, False), (3, True)])
def test_patches_are_compared_at_the_points_that_two_crops_share(views, overlap):
    """SERE's DINO+: values, gradients and the patches' own center; crops without a common region add nothing."""
    objective, student, teacher, batch = with_patches(views, overlap)
    objective.patch_target.center.normal_()
    leaf = student.global_crops.patches.requires_grad_()
    expected, seen = patch_loop(objective, student, teacher, batch.global_crops)
    terms = objective(student, teacher, batch, Cues(), cases.now_of(objective))
    torch.testing.assert_close(terms["dino/patch"], expected, rtol=1e-9, atol=0)
    leaves = [leaf, *(p for p in student.head.parameters() if p.requires_grad)]
    pair = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (terms["dino/patch"], expected)]
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    before = objective.patch_target.center.clone()
    objective.after_step()
    torch.testing.assert_close(objective.patch_target.center, 0.9 * before + 0.1 * seen.mean(0), rtol=1e-9, atol=1e-12)


def test_patches_leave_the_term_of_the_class_token_alone():
    objective, student, teacher, batch = with_patches()
    plain = Dino(SMALL).double()
    now = cases.now_of(objective)
    both, alone = (o(student, teacher, batch, Cues(), now) for o in (objective, plain))
    assert torch.equal(both["dino/cls"], alone["dino/cls"])
    assert (both.keys(), alone.keys()) == ({"dino/cls", "dino/patch"}, {"dino/cls"})
    assert (objective.prototype_counts(), plain.prototype_counts()) == (dict.fromkeys(both, 20), {"dino/cls": 20})
    assert plain.state_dict().keys() == {"target.center"}
    assert (objective.needs().global_crops, plain.needs().global_crops) == (2, 1)
    with pytest.raises(ValueError, match=r"DinoOptions\.patch_points"):
        DinoOptions(patches=True, patch_points=1)


def test_sinkhorn_of_patches_ignores_crops_without_a_common_region():
    objective, student, teacher, batch = with_patches(overlap=False)
    options = dataclasses.replace(objective.options, target="sinkhorn")
    again = Dino(options).double()
    crops = batch.global_crops
    kept = dataclasses.replace(crops, box=crops.box.clone())
    term = again(student, teacher, batch, Cues(), cases.now_of(again))["dino/patch"]
    kept.box[0, 1, 0] += 500  # no region either: only what the points would be differs
    moved = again(student, teacher, dataclasses.replace(batch, global_crops=kept), Cues(), cases.now_of(again))
    assert term.isfinite()
    torch.testing.assert_close(moved["dino/patch"], term, rtol=1e-12, atol=0)
