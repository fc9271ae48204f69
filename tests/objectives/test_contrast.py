"""MoCo v3 and MoBY against loops over images, and when keys enter a queue."""

import dataclasses

import objective_cases as cases
import pytest
import torch
from torch.nn.functional import normalize

from patchlight.objectives.contrast import ordered_pairs
from patchlight.objectives.moby import Moby, MobyOptions
from patchlight.objectives.moco_v3 import MocoV3, MocoV3Options
from patchlight.objectives.selfpatch_contrast import SelfPatchContrast, SelfPatchContrastOptions
from patchlight.records import Cues, Features, Side

WIDTH, BATCH = 6, 4
MOCO = MocoV3Options(hidden=10, out=5)
MOBY = MobyOptions(queue=8, hidden=10, out=5)


def build(kind, options):
    objective = kind(options).double()
    student, predictor, teacher = objective.head(WIDTH), objective.predictor(WIDTH), objective.head(WIDTH)
    heads = [module.double() for module in (student, predictor, teacher)]
    heads[2].requires_grad_(False)
    return objective, heads


def sides(heads, views=2):
    summaries = torch.randn(2, views, BATCH, WIDTH, dtype=torch.float64)
    student, teacher = (cases.cls_features(summary) for summary in summaries)
    return Side(student, head=heads[0], predictor=heads[1]), Side(teacher, head=heads[2])


def run(objective, student, teacher):
    (term,) = objective(student, teacher, cases.views_of(BATCH), Cues(), cases.now_of(objective)).values()
    return term


def rows(student, teacher):
    """Normalised queries and keys, view by view."""
    queries = [student.predictor(student.head(view[None]))[0] for view in student.global_crops.summary]
    keys = [teacher.head(view[None])[0] for view in teacher.global_crops.summary]
    return [normalize(x, dim=1) for x in queries], [normalize(x, dim=1) for x in keys]


def nll(query, own, others, temperature):
    """-log of the softmax weight of the own key among all keys."""
    scores = torch.stack([query @ key for key in [own, *others]]) / temperature
    return scores.logsumexp(0) - scores[0]


def moco_loop(objective, student, teacher):
    queries, keys = rows(student, teacher)
    total = 0
    for q, k in ((0, 1), (1, 0)):
        for image, query in enumerate(queries[q]):
            others = [key for number, key in enumerate(keys[k]) if number != image]
            total = total + nll(query, keys[k][image], others, 0.2) / BATCH
    return total * 2 * 0.2


def moby_loop(objective, student, teacher):
    queries, keys = rows(student, teacher)
    total = 0
    for q, k in ((0, 1), (1, 0)):
        for image, query in enumerate(queries[q]):
            total = total + nll(query, keys[k][image], objective.queue[k], 0.2) / BATCH
    return total


@pytest.mark.parametrize(("kind", "options", "loop"), [(MocoV3, MOCO, moco_loop), (Moby, MOBY, moby_loop)])
def test_loss_and_gradient_are_those_of_the_loop(kind, options, loop):
    objective, heads = build(kind, options)
    student, teacher = sides(heads)
    result, expected = run(objective, student, teacher), loop(objective, student, teacher)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=0)
    learned = [*heads[0].parameters(), *heads[1].parameters()]
    for a, b in zip(torch.autograd.grad(result, learned), torch.autograd.grad(expected, learned), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-11)


def test_more_views_have_the_mean_over_all_directions():
    objective, heads = build(MocoV3, MOCO)
    student, teacher = sides(heads, views=3)
    queries, keys = rows(student, teacher)
    pairs = [
        objective.contrast(torch.stack([queries[a], queries[b]]), torch.stack([keys[a], keys[b]]))
        for a, b in ((0, 1), (0, 2), (1, 2))
    ]
    torch.testing.assert_close(run(objective, student, teacher), torch.stack(pairs).mean())


def test_the_queue_takes_the_keys_of_all_batches_when_the_step_is_done_oldest_out_first():
    objective, heads = build(Moby, MOBY)
    before = objective.queue.clone()
    for _ in range(2):  # 8 keys per step fill the queue of 8
        keys = []
        for _ in range(2):
            student, teacher = sides(heads)
            keys.append(torch.stack(rows(student, teacher)[1]))
            run(objective, student, teacher)
            assert torch.equal(objective.queue, before)
        objective.after_step()
        before = objective.queue.clone()
        torch.testing.assert_close(before, torch.cat(keys, dim=1))
        assert objective.oldest == 0
    student, teacher = sides(heads)
    run(objective, student, teacher)
    objective.after_step()
    torch.testing.assert_close(objective.queue[:, :4], torch.stack(rows(student, teacher)[1]))
    assert torch.equal(objective.queue[:, 4:], before[:, 4:])
    assert objective.oldest == 4


def test_the_queue_starts_with_unit_rows():
    torch.testing.assert_close(Moby(MOBY).queue.norm(dim=-1), torch.ones(2, 8))


def test_low_precision_does_not_reach_the_scores():
    objective, heads = build(MocoV3, MOCO)
    student, teacher = sides(heads)
    exact = run(objective, student, teacher)
    queries, keys = (torch.stack(x).float() for x in rows(student, teacher))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(objective.contrast(queries, keys), exact.float(), rtol=1e-6, atol=0)


def test_what_is_missing_is_named():
    objective, heads = build(MocoV3, MOCO)
    student, teacher = sides(heads)
    with pytest.raises(ValueError, match="the student needs a predictor, got none"):
        run(objective, dataclasses.replace(student, predictor=None), teacher)
    with pytest.raises(ValueError, match="needs another view"):
        ordered_pairs(1)
    objective, heads = build(Moby, MOBY)
    with pytest.raises(ValueError, match="must be two views, each with its queue, got 3"):
        run(objective, *sides(heads, views=3))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (lambda: MocoV3Options(temperature=0), "temperature must be a number in .* got 0"),
        (lambda: MobyOptions(queue=0), "MobyOptions.queue must be a whole number in .* got 0"),
    ],
)
def test_invalid_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        options()


def patch_sides(heads, neighbors=True):
    summaries, patches = torch.randn(2, 2, BATCH, WIDTH).double(), torch.randn(3, 2, BATCH, 6, WIDTH).double()
    student = Side(Features(summaries[0], patches[0], (2, 3)), head=heads[0], predictor=heads[1])
    teacher = Features(summaries[1], patches[1], (2, 3), patches[2] if neighbors else None)
    return student, Side(teacher, head=heads[2])


def test_patches_must_match_their_neighbors_among_the_summaries_of_other_images():
    objective, heads = build(SelfPatchContrast, SelfPatchContrastOptions(hidden=10, out=5))
    student, teacher = patch_sides(heads)
    crops, total, count = teacher.global_crops, 0, 0
    summaries, keys = [], []
    for view in range(2):
        rows = torch.cat([crops.neighbors[view].flatten(0, 1), crops.summary[view]])
        rows = normalize(heads[2].mlp(rows), dim=1)
        keys.append(rows[:-BATCH].unflatten(0, (BATCH, 6)))
        summaries.append(rows[-BATCH:])
    for view in range(2):
        queries = heads[1].mlp(heads[0].mlp(student.global_crops.patches[view].flatten(0, 1)))
        queries = normalize(queries, dim=1).unflatten(0, (BATCH, 6))
        for image in range(BATCH):
            others = [summaries[v][i] for v in range(2) for i in range(BATCH) if i != image]
            for patch in range(6):
                total = total + nll(queries[image, patch], keys[view][image, patch], others, 0.2)
                count += 1
    result, expected = run(objective, student, teacher), total / count
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=0)
    learned = [*heads[0].parameters(), *heads[1].parameters()]
    for a, b in zip(torch.autograd.grad(result, learned), torch.autograd.grad(expected, learned), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-11)


def test_patches_need_aggregated_neighbors():
    objective, heads = build(SelfPatchContrast, SelfPatchContrastOptions(hidden=10, out=5))
    with pytest.raises(ValueError, match="must aggregate each patch's neighbors, got features without"):
        run(objective, *patch_sides(heads, neighbors=False))
