"""SERE against the released formulation: whole relations, sampled twice by grid_sample, in float64 and by loops."""

import dataclasses
import math

import objective_cases as cases
import pytest
import torch
import torch.nn.functional as F
from dispatched import dispatched
from torch._subclasses.fake_tensor import FakeTensorMode

from patchlight.objectives.batch_relation import batch_relation_loss
from patchlight.objectives.sere import Sere, SereOptions, sere_weights
from patchlight.records import Crops, Cues, Features, Side, Views

WIDTH, BATCH = 12, 3
GRID, LOCAL_GRID = (4, 5), (3, 2)
SMALL = SereOptions(heads=3, global_points=4, local_points=3)


def build(views=2, local=4, dtype=torch.float64, seed=0, grids=(GRID, LOCAL_GRID), **options):
    """The objective, both sides with features like those of a backbone, and the views."""
    torch.manual_seed(seed)
    given = dataclasses.replace(SMALL, **options)
    objective = Sere(given, given.heads, local=local > 0)
    student_head, teacher_head = objective.head(WIDTH).to(dtype), objective.head(WIDTH).to(dtype).requires_grad_(False)
    predictor = objective.predictor(WIDTH)
    for module in filter(None, (student_head, teacher_head, predictor)):
        for parameter in module.to(dtype).parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)

    def features(count, grid, learns):
        x = torch.randn(count, BATCH, grid[0] * grid[1], WIDTH, dtype=dtype).requires_grad_(learns)
        return Features(x[:, :, 0], torch.full_like(x, torch.nan), grid, residual=x)

    student = Side(
        features(views, grids[0], True), features(local, grids[1], True) if local else None, head=student_head,
        predictor=predictor,
    )  # fmt: skip
    return (
        objective,
        student,
        Side(features(views, grids[0], False), head=teacher_head),
        some_views(views, local, dtype),
    )


def some_views(views, local, dtype):
    """Random boxes; some pairs do not overlap."""

    def crops(count, low, high):
        corner, size = torch.randint(0, 45, (count, BATCH, 2)), torch.randint(low, high, (count, BATCH, 2))
        box = torch.cat([corner, size], dim=-1).to(dtype)
        return Crops(torch.zeros(count, BATCH, 3, 1, 1), box, torch.rand(count, BATCH) < 0.5)

    return Views(crops(views, 25, 60), crops(local, 10, 30) if local else None, None, torch.arange(BATCH))


def grid_of(crops, view, image, other, count, points):
    """[S, S, 2] for grid_sample: where the points of the overlap with another box lie in this crop; -2 if there is none."""
    (x, y, w, h), (ox, oy, ow, oh) = crops.box[view, image].tolist(), other.tolist()
    left, top, right, bottom = max(x, ox), max(y, oy), min(x + w, ox + ow), min(y + h, oy + oh)
    grid = torch.full((count, count, 2), -2.0, dtype=torch.float64)
    if right <= left or bottom <= top:
        return grid
    for j in range(count):
        for i in range(count):
            a, b = (n / (count - 1) if points == "ends" else (n + 0.5) / count for n in (i, j))
            u, v = (left + a * (right - left) - x) / w, (top + b * (bottom - top) - y) / h
            u = 1 - u if crops.flip[view, image] else u
            grid[j, i] = torch.tensor([2 * u - 1, 2 * v - 1], dtype=torch.float64)
    return grid


def sampled(relation, grid, size):
    """[M, N, N] sampled at the points along keys, then along queries: [M, S * S, S * S]."""
    for _ in range(2):
        maps = relation.unflatten(2, size)  # of each query
        relation = F.grid_sample(maps, grid.to(maps.dtype).expand(len(maps), -1, -1, -1), align_corners=False)
        relation = relation.flatten(2).mT
    return relation


def cross_entropy(teacher, student):
    return -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1).mean()


def official(objective, student, teacher, views):
    """Both terms, pair by pair and image by image."""
    o, predictor = objective.options, student.predictor
    teacher_global = teacher.head(teacher.global_crops.residual)
    student_global = student.head(student.global_crops.residual)
    local = None
    if o.asymmetric:
        student_global = predictor.prediction(student_global)
    if student.local_crops is not None:
        local = predictor.local_head(student.local_crops.residual)
        local = predictor.local_prediction(local) if o.asymmetric else local
    spatial, channel, overlap = [], [], []
    globals_ = views.global_crops
    for q in range(len(globals_.box)):
        pairs = [(student_global, globals_, v, GRID, o.global_points) for v in range(len(globals_.box)) if v != q]
        if local is not None:
            pairs += [(local, views.local_crops, v, LOCAL_GRID, o.local_points) for v in range(len(local.spatial))]
        for features, crops, v, size, count in pairs:
            for image in range(BATCH):
                grids = [
                    grid_of(*place, image, box, count, o.points)
                    for place, box in (((globals_, q), crops.box[v, image]), ((crops, v), globals_.box[q, image]))
                ]
                overlap.append(bool((grids[0] > -2).any()))
                relations = [relation(x, o) for x in (teacher_global.spatial[q, image], features.spatial[v, image])]
                t, s = (sampled(r, g, z) for r, g, z in zip(relations, grids, (GRID, size), strict=True))
                spatial.append(cross_entropy(t / o.teacher_spatial_temperature, s / o.student_spatial_temperature))
                t, s = teacher_global.channel[q, image] / 20**0.5, features.channel[v, image] / math.prod(size) ** 0.5
                channel.append(
                    cross_entropy(t.T @ t / o.teacher_channel_temperature, s.T @ s / o.student_channel_temperature)
                )
    assert any(overlap)
    if o.no_overlap == "skip":
        assert not all(overlap)
        spatial = [loss for loss, exists in zip(spatial, overlap, strict=True) if exists]
    return {"sere/spatial": torch.stack(spatial).mean(), "sere/channel": torch.stack(channel).mean()}


def relation(x, options):
    """[M, N, N] of [N, D]."""
    heads = x.unflatten(-1, (options.heads, -1)).transpose(0, 1)
    return heads @ heads.mT / math.sqrt(WIDTH if options.scale == "width" else WIDTH // options.heads)


def run(objective, student, teacher, views):
    return objective(student, teacher, views, Cues(), cases.now_of(objective))


def leaves_of(student):
    leaves = [student.global_crops.residual, *student.head.parameters()]
    leaves += [] if student.local_crops is None else [student.local_crops.residual]
    return leaves + ([] if student.predictor is None else list(student.predictor.parameters()))


def test_the_random_crops_include_some_without_overlap():
    *_, views = build()
    corners = torch.cat([views.global_crops.box, views.local_crops.box])[..., :2]
    assert len(corners.unique(dim=0)) == 6
    objective, student, teacher, views = build(no_overlap="skip")
    official(objective, student, teacher, views)  # asserts it


@pytest.mark.parametrize(
    ("views", "local", "options"),
    [
        (2, 4, {}),
        (2, 0, {}),
        (3, 1, {"heads": 1}),
        (2, 2, {"points": "centers", "scale": "width"}),
        (2, 4, {"no_overlap": "skip"}),
        (2, 1, {"asymmetric": False, "heads": 12}),
        (2, 0, {"asymmetric": False, "teacher_spatial_temperature": 1.0, "student_spatial_temperature": 0.5}),
        (2, 1, {"teacher_channel_temperature": 1.0, "student_channel_temperature": 0.1}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_terms_and_gradients_are_those_of_the_released_formulation(views, local, options):
    objective, student, teacher, crops = build(views, local, **options)
    result, expected = run(objective, student, teacher, crops), official(objective, student, teacher, crops)
    assert result.keys() == expected.keys()
    leaves = leaves_of(student)
    for name in result:
        torch.testing.assert_close(result[name], expected[name], rtol=1e-10, atol=0)
        pair = [
            torch.autograd.grad(term[name], leaves, retain_graph=True, allow_unused=True) for term in (result, expected)
        ]
        assert any(gradient is not None and gradient.abs().max() > 1e-6 for gradient in pair[1])
        for a, b in zip(*pair, strict=True):
            a, b = (torch.zeros(()) if x is None else x for x in (a, b))
            torch.testing.assert_close(a, b.expand_as(a).to(a), rtol=1e-8, atol=1e-11)


def test_crops_without_overlap_have_a_constant_loss_without_a_gradient():
    for rule, expected in (("count", math.log(16)), ("skip", 0.0)):
        objective, student, teacher, views = build(local=0, no_overlap=rule)
        views.global_crops.box[0, :, 0] += 1000
        term = run(objective, student, teacher, views)["sere/spatial"]
        assert term.item() == pytest.approx(expected, rel=1e-12)
        (gradient,) = torch.autograd.grad(term, student.global_crops.residual)
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_bf16_is_no_further_off_than_the_released_formulation():
    """Over several batches, as a single error may be small by chance."""
    errors = {(term, which): 0.0 for term in ("sere/spatial", "sere/channel") for which in ("result", "released")}
    with torch.no_grad():
        for seed in range(8):
            objective, *parts = build(local=2, dtype=torch.float32, seed=seed)
            with torch.autocast("cpu", torch.bfloat16):
                found = {"result": run(objective, *parts), "released": official(objective, *parts)}
            exact = run(objective, *(mapped(part, torch.Tensor.double) for part in parts))
            for term, which in errors:
                errors[term, which] += abs(found[which][term].item() - exact[term].item())
    for term in ("sere/spatial", "sere/channel"):
        assert 0 < errors[term, "result"] <= 2 * errors[term, "released"], errors


def mapped(part, change):
    """The same with every floating tensor changed; modules are moved to float64 in place."""
    if isinstance(part, torch.nn.Module):
        return part.double()
    if dataclasses.is_dataclass(part):
        values = {field.name: mapped(getattr(part, field.name), change) for field in dataclasses.fields(part)}
        return dataclasses.replace(part, **values)
    return change(part) if isinstance(part, torch.Tensor) and part.is_floating_point() else part


@pytest.mark.parametrize("rule", ["count", "skip"])
def test_a_step_does_not_wait_for_the_device(rule):
    """Fake tensors have no values: code that reads one, or makes a shape from it, raises."""
    objective, *parts = build(no_overlap=rule)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        student, teacher, views = (mapped(part, mode.from_tensor) for part in parts)
        crops = student.global_crops.residual
        (gradient,) = torch.autograd.grad(sum(run(objective, student, teacher, views).values()), crops)
    assert gradient.shape == crops.shape


@pytest.mark.parametrize("rule", ["count", "skip"])
def test_a_step_dispatches_few_operations(rule):
    """Square grids, 2 + 8 crops: 216 and 60 before both axes, and all pairs of a size, were computed at once."""
    objective, *parts = build(local=8, grids=((4, 4), (2, 2)), no_overlap=rule)
    terms, forward = dispatched(run, objective, *parts)
    _, backward = dispatched(sum(terms.values()).backward)
    assert len(forward.names) <= 120, forward.names
    assert len(backward.names) <= 46, backward.names


@pytest.mark.parametrize("views", [2, 3])
def test_it_is_traced_whole(views):
    torch._dynamo.reset()
    objective, *parts = build(views)
    compiled = torch.compile(objective.forward, fullgraph=True, backend="eager")
    result, expected = compiled(*parts, Cues(), cases.clock_of(0)), run(objective, *parts)
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, rtol=1e-12, atol=0)


def test_what_cannot_work_is_refused():
    objective, student, teacher, views = build()
    bare = dataclasses.replace(student.global_crops, residual=None)
    one_view = dataclasses.replace(views.global_crops, box=views.global_crops.box[:1])
    for wrong, sentence in (
        (
            lambda: run(objective, dataclasses.replace(student, global_crops=bare), teacher, views),
            "before the final norm, got",
        ),
        (
            lambda: run(objective, dataclasses.replace(student, predictor=None), teacher, views),
            "the student needs a predictor",
        ),
        (lambda: run(objective, student, dataclasses.replace(teacher, head=None), views), "got none in the teacher"),
        (
            lambda: run(objective, student, teacher, dataclasses.replace(views, global_crops=one_view)),
            "got one per image",
        ),
        (lambda: run(Sere(SMALL, 3, local=False), student, teacher, views), "got crops but no heads"),
        (lambda: Sere(SereOptions(), heads=5).head(12), "heads must divide the backbone's width, got 5 and 12"),
        (lambda: SereOptions(heads=0), "heads must be a whole number in .* got 0"),
        (lambda: SereOptions(global_points=1), "global_points must be a whole number in .* got 1"),
        (lambda: SereOptions(teacher_channel_temperature=0.0), "teacher_channel_temperature must be .*got 0.0"),
        (lambda: SereOptions(no_overlap="drop"), "got 'drop'"),
        (lambda: sere_weights({}, 3.0, 2.0), "nor sum to more than 4.*got 3.0 and 2.0"),
        (lambda: sere_weights({}, -1.0, 2.0, rescale_base=False), "must not be negative.*got -1.0 and 2.0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            wrong()


def test_weights_rescale_the_host_as_released_unless_turned_off():
    host = {"ibot/cls": 1.0, "ibot/patch": 0.5}
    released = sere_weights(host, 0.2, 0.5)
    assert released == pytest.approx({"ibot/cls": 1.65, "ibot/patch": 0.825, "sere/spatial": 0.2, "sere/channel": 0.5})
    assert sere_weights(host, 0.2, 0.5, rescale_base=False) == host | {"sere/spatial": 0.2, "sere/channel": 0.5}


def barlow(student, teacher, views):
    """The published loss, pair by pair: BatchNorm without weights, the correlation over the batch, both sums over channels."""
    losses = []
    for s, predicted in enumerate(student):
        for t, given in enumerate(teacher):
            if s == t and s < views:
                continue
            a, b = (F.batch_norm(x.mean(dim=1), None, None, training=True, eps=1e-5) for x in (predicted, given))
            c = a.T @ b / BATCH
            on = sum((1 - c[i, i]) ** 2 for i in range(WIDTH))
            losses.append(on + 0.005 * sum(c[i, j] ** 2 for i in range(WIDTH) for j in range(WIDTH) if i != j))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("views", "local", "asymmetric"), [(2, 0, True), (2, 3, True), (3, 2, False)])
def test_the_channel_relation_over_the_batch_is_that_of_barlow_twins(views, local, asymmetric):
    objective, student, teacher, crops = build(views, local, channel="batch", asymmetric=asymmetric)
    result = run(objective, student, teacher, crops)
    features = objective.student_features(student, student.head)
    of_student = [*features.global_crops.channel, *(features.local_crops.channel if local else [])]
    expected = barlow(of_student, teacher.head(teacher.global_crops.residual).channel, views)
    torch.testing.assert_close(result["sere/channel"], expected, rtol=1e-10, atol=0)
    leaves = leaves_of(student)
    pair = [
        torch.autograd.grad(term, leaves, retain_graph=True, allow_unused=True)
        for term in (result["sere/channel"], expected)
    ]
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(*(torch.zeros(()) if x is None else x for x in (a, b)), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(
        result["sere/spatial"], run(*build(views, local, asymmetric=asymmetric))["sere/spatial"], rtol=0, atol=0
    )
    assert objective.needs().batch_norm
    assert not build()[0].needs().batch_norm


def test_the_batch_relation_has_the_right_gradient():
    student, teacher = (torch.randn(2, 5, 4, dtype=torch.float64) for _ in range(2))
    weight = torch.rand(2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(batch_relation_loss, (student.requires_grad_(), teacher.requires_grad_(), weight))
    dead = student.detach().clone()
    dead[:, :, 0] = 3.0  # a channel without variance is related to nothing
    assert batch_relation_loss(dead, dead, torch.eye(2)).item() == pytest.approx(
        2 + batch_relation_loss(dead[..., 1:], dead[..., 1:], torch.eye(2)).item()
    )


def batch_relation_on_a_rank(rank, student, teacher):
    """The loss and the gradient of a rank's images."""
    part = student[:, 3 * rank : 3 * rank + 3].clone().requires_grad_()
    loss = batch_relation_loss(part, teacher[:, 3 * rank : 3 * rank + 3], torch.ones(2, 2))
    loss.backward()
    return loss.detach(), part.grad


def test_the_batch_relation_of_two_processes_is_that_of_all_their_images():
    """A run averages gradients over processes: each has the whole gradient of its images, times their number."""
    student, teacher = (torch.randn(2, 6, 4, dtype=torch.float64) for _ in range(2))
    whole = student.clone().requires_grad_()
    loss = batch_relation_loss(whole, teacher, torch.ones(2, 2))
    loss.backward()
    ranks = cases.in_two_processes(batch_relation_on_a_rank, student, teacher)
    for rank_loss, _ in ranks:
        torch.testing.assert_close(rank_loss, loss.detach(), rtol=1e-12, atol=0)
    gradient = torch.cat([gradient for _, gradient in ranks], dim=1) / 2
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-9, atol=1e-13)


def test_heads_that_do_not_divide_the_width_are_named_with_those_that_do():
    with pytest.raises(
        ValueError, match=r"got 6 and 2048; set SereOptions\.heads to none, or to one of \[1, 2, 4, 8, 16"
    ):
        Sere(SereOptions(heads=6), heads=6).head(2048)
