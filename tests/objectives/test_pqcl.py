"""PQCL against loops over views, images and patches, its heads, and its needs."""

import dataclasses

import objective_cases as cases
import pytest
import torch

from patchlight.objectives.dino import DinoOptions
from patchlight.objectives.geometry import relative_positions
from patchlight.objectives.ibot import IbotOptions
from patchlight.objectives.pqcl import Pqcl, PqclOptions, choose_host
from patchlight.objectives.selfpatch import SelfPatchOptions
from patchlight.records import Crops, Cues, Features, Queries, QueryContent, Side, Views, now_at

WIDTH, BATCH, CROPS, GRID = 10, 3, 2, (2, 3)
QUERIES = CROPS * 6
HOST = DinoOptions(prototypes=14, bottleneck=6, hidden=12)


def build(**options):
    objective = Pqcl(HOST, PqclOptions(warmup_epochs=0, **options)).double()
    heads = [Pqcl(HOST, PqclOptions(heads="vanilla")).head(WIDTH).double() for _ in range(2)]
    return objective, *heads


def features(*shape: int, queries: int = 0) -> Features:
    summary, patches, predicted = (
        torch.randn(*shape[:2], n, WIDTH, dtype=torch.float64) for n in (1, shape[2], queries)
    )
    return Features(summary[:, :, 0], patches, GRID, queries=predicted if queries else None)


def sides(student_head, teacher_head, predictor=None):
    student = Side(features(2, BATCH, 8, queries=QUERIES), head=student_head, predictor=predictor)
    return student, Side(features(2, BATCH, 8), query_crops=features(CROPS, BATCH, 6), head=teacher_head)


def run(objective, student, teacher, cues=Cues()):  # noqa: B008 frozen
    return objective(student, teacher, cases.views_of(BATCH), cues, cases.now_of(objective))["pqcl/query"]


def loop(objective, student, teacher, head, temperature=0.07, mask=None):
    """mask [B, Q]: only these positions count."""
    total, number, center = 0.0, 0, objective.target.center
    for view in range(2):
        for image in range(BATCH):
            for crop in range(CROPS):
                for patch in range(6):
                    if mask is not None and not mask[image, crop * 6 + patch]:
                        continue
                    number += 1
                    t = teacher.head(teacher.query_crops.patches[crop, image, patch])
                    t = teacher.head.prototypes.logits(t)
                    s = student.global_crops.queries[view, image, crop * 6 + patch]
                    s = (head.prototypes.logits(head(s)) / 0.1).log_softmax(-1)
                    total -= (((t - center) / temperature).softmax(-1) * s).sum()
    assert mask is not None or number == 2 * BATCH * QUERIES
    return total / number


@pytest.mark.parametrize("own", [False, True])
def test_loss_and_gradient_are_those_of_the_loop(own):
    """The student's queries go through its predictor if there is one, else through the shared head."""
    objective, student_head, teacher_head = build()
    predictor = build()[1] if own else None
    objective.target.center.normal_()
    student, teacher = sides(student_head, teacher_head.requires_grad_(False), predictor)
    student.global_crops.queries.requires_grad_()
    used = predictor or student_head
    leaves = [student.global_crops.queries, *(p for p in used.parameters() if p.requires_grad)]
    result, expected = run(objective, student, teacher), loop(objective, student, teacher, used)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=0)
    for a, b in zip(torch.autograd.grad(result, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_the_center_is_its_own_and_counts_every_query_patch_once():
    objective, *heads = build()
    student, teacher = sides(*heads)
    run(objective, student, teacher)
    objective.after_step()
    rows = teacher.query_crops.patches.flatten(0, 2)
    expected = 0.1 * heads[1].prototypes.logits(heads[1](rows)).mean(dim=0)
    torch.testing.assert_close(objective.target.center, expected, rtol=1e-9, atol=0)


def test_no_gradient_reaches_the_teacher():
    objective, student_head, teacher_head = build()
    student, teacher = sides(student_head, teacher_head.requires_grad_(True))
    teacher.query_crops.patches.requires_grad_()
    run(objective, student, teacher).backward()
    assert teacher.query_crops.patches.grad is None
    assert all(parameter.grad is None for parameter in teacher_head.parameters())


def test_the_patch_prototypes_of_a_host_are_used():
    host = IbotOptions(prototypes=9, patch_prototypes=14, bottleneck=6, hidden=12)
    objective = Pqcl(host, PqclOptions(warmup_epochs=0))
    assert objective.target.center.shape == (14,)
    head = cases.LogitsHead(14, 9, 14)
    student = Side(
        Features(torch.zeros(2, 1, 14), torch.zeros(2, 1, 4, 14), GRID, queries=torch.randn(2, 1, 6, 14)), head=head
    )
    patches = torch.randn(1, 1, 6, 14)
    teacher = Side(student.global_crops, query_crops=Features(patches[:, :, 0], patches, GRID), head=head)
    objective.target = torch.nn.Identity()
    objective.target.forward = lambda z, directions, temperature: torch.zeros(14)
    expected = -((patches / 0.07).softmax(-1) * (student.global_crops.queries / 0.1).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(run(objective, student, teacher), expected)


@pytest.mark.parametrize(("heads", "own", "student_only"), [("shared", 0, 0), ("semi", 0, 1), ("vanilla", 1, 0)])
def test_separate_heads(heads, own, student_only):
    objective = build(heads=heads)[0]
    head, predictor = objective.head(WIDTH), objective.predictor(WIDTH)
    assert (head is not None, predictor is not None) == (own, student_only)
    for module in filter(None, (head, predictor)):
        assert module(torch.zeros(1, WIDTH)).shape == (1, HOST.bottleneck)
        assert module.prototypes.count == HOST.prototypes


def views() -> Views:
    def crops(count: int, height: int, width: int) -> Crops:
        box = 10 + 50 * torch.rand(count, BATCH, 4)
        return Crops(torch.zeros(count, BATCH, 3, height, width), box, torch.rand(count, BATCH) < 0.5)

    return Views(crops(2, 16, 16), None, crops(CROPS, 8, 12), torch.arange(BATCH))


@pytest.mark.parametrize(
    ("query_keys", "keys", "crop"),
    [("all", "all", None), ("crop", "all", 6), ("raw", "raw", None), ("joint", "joint", None)],
)
@pytest.mark.parametrize(("flip_aware", "anchor"), [(True, "corner"), (False, "center")])
def test_the_cue_has_the_positions_and_the_keys(query_keys, keys, crop, flip_aware, anchor):
    objective, batch = build(query_keys=query_keys, flip_aware=flip_aware, anchor=anchor)[0], views()
    cue = objective.cue(batch, (4, 4), cases.now_of(objective))
    assert (cue.mask, cue.queries.keys, cue.queries.crop, cue.queries.content) == (None, keys, crop, None)
    expected = relative_positions(batch.query_crops, batch.global_crops, GRID, (4, 4), flip_aware, anchor)
    assert torch.equal(cue.queries.positions, expected)


@pytest.mark.parametrize("over", ["masked", "all"])
def test_the_loss_is_over_the_masked_positions_or_over_all(over):
    """Of partly masked query crops; the center is over all patches either way."""
    objective, student_head, teacher_head = build(query_mask_ratio=0.5, query_loss_over=over)
    student, teacher = sides(student_head, teacher_head.requires_grad_(False))
    objective.target.center.normal_()
    mask = torch.rand(BATCH, QUERIES) < 0.5
    mask[0, 0], mask[1] = True, False
    cues = Cues(queries=Queries(torch.zeros(2, BATCH, QUERIES, 2), content=QueryContent(torch.zeros(0), mask)))
    leaf = student.global_crops.queries.requires_grad_()
    expected = loop(objective, student, teacher, student_head, mask=mask if over == "masked" else None)
    result = run(objective, student, teacher, cues)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaf)[0] for loss in (result, expected)), rtol=1e-8, atol=0)
    assert objective.target.row_count == BATCH * QUERIES


@pytest.mark.parametrize(("ratio", "count"), [(0.5, 3), (0.25, 1), (0.999, 5)])
def test_partly_masked_query_crops_hide_as_many_patches_in_each(ratio, count):
    """By the images' running numbers, and so the same for any split over batches; another seed hides others."""
    objective, batch = build(query_mask_ratio=ratio)[0], views()
    content = objective.cue(batch, (4, 4), cases.now_of(objective)).queries.content
    assert torch.equal(content.pixels, batch.query_crops.pixels.transpose(0, 1))
    assert content.mask.shape == (BATCH, QUERIES)
    assert (content.mask.unflatten(1, (CROPS, 6)).sum(-1) == count).all()

    def masks(first: int, seed: int = 0):
        """Of 40 batches, the first of which begins with image `first`."""
        again = Pqcl(HOST, objective.options, seed)
        found = []
        for number in range(40):
            clock = dataclasses.replace(cases.clock_of(0), first_image=first + number * BATCH)
            found.append(again.cue(batch, (4, 4), now_at(clock, again.schedule(clock))).queries.content.mask)
        return torch.cat(found)

    drawn = masks(0)
    assert torch.equal(drawn[:BATCH], content.mask)
    assert torch.equal(drawn[BATCH:], masks(BATCH)[:-BATCH])
    assert not torch.equal(drawn, masks(0, seed=1))
    assert (drawn.any(0) & ~drawn.all(0)).all(), "every position is hidden in some crops"


def test_without_masked_positions_all_are_seen():
    objective = build(query_mask_ratio=0.0, query_loss_over="all")[0]
    content = objective.cue(views(), (4, 4), cases.now_of(objective)).queries.content
    assert content.mask.shape == (BATCH, QUERIES)
    assert not content.mask.any()


def test_what_masks_nothing_is_refused():
    with pytest.raises(ValueError, match="a loss over masked positions needs some, got query_mask_ratio=0; set"):
        PqclOptions(query_mask_ratio=0.0)
    with pytest.raises(ValueError, match=r"query_mask_ratio must be a number in \[0, 1\], got 1.5"):
        PqclOptions(query_mask_ratio=1.5)
    with pytest.raises(ValueError, match="query_loss_over"):
        PqclOptions(query_loss_over="seen")
    objective = build(query_mask_ratio=0.1)[0]
    with pytest.raises(ValueError, match=r"a query crop needs a masked position, got 0\.1 of 6; raise"):
        objective.cue(views(), (4, 4), cases.now_of(objective))


def test_the_defaults_are_those_of_the_methods_table():
    objective = Pqcl(IbotOptions())
    options = objective.options
    assert (options.heads, options.query_keys, options.flip_aware, options.anchor) == ("shared", "all", True, "corner")
    assert objective.target.center.shape == (8192,)
    epochs = [objective.temperature.at(cases.clock_of(epoch)) for epoch in (0, 29, 300)]
    assert epochs == pytest.approx([0.04, 0.07, 0.07])
    assert objective.needs().host == "ibot"
    assert build()[0].needs().host == "dino"


def test_ibot_is_the_host_before_dino():
    assert choose_host((HOST, IbotOptions())) == IbotOptions()
    assert choose_host((SelfPatchOptions(), HOST)) is HOST
    with pytest.raises(
        ValueError, match=r"needs iBOT or DINO beside it, got SelfPatchOptions, PqclOptions only; add IbotOptions"
    ):
        choose_host((SelfPatchOptions(), PqclOptions()))


def test_what_is_missing_is_named():
    objective, *heads = build()
    student, teacher = sides(*heads)
    with pytest.raises(ValueError, match=r"pqcl: its head .* got none in the teacher"):
        run(objective, student, dataclasses.replace(teacher, head=None))
    with pytest.raises(ValueError, match="got none in the teacher; pass"):
        run(objective, student, dataclasses.replace(teacher, query_crops=None))
    without_queries = dataclasses.replace(student, global_crops=dataclasses.replace(student.global_crops, queries=None))
    with pytest.raises(ValueError, match="got none in the student; pass"):
        run(objective, without_queries, teacher)
    for field, value in (("heads", "own"), ("query_keys", "none"), ("anchor", "middle")):
        with pytest.raises(ValueError, match=f"PqclOptions.{field}"):
            PqclOptions(**{field: value})
