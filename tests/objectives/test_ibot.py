"""iBOT against loops over images and masked patches, and its options."""

import dataclasses

import objective_cases as cases
import pytest
import torch

from patchlight.data.masking import FixedMasks, MaskRule, ReleasedMasks
from patchlight.objectives.ibot import Ibot, IbotOptions
from patchlight.records import Cues, Features, Side, now_at

WIDTH, BATCH, GRID = 10, 3, (3, 4)
SMALL = IbotOptions(prototypes=16, bottleneck=6, hidden=12, warmup_epochs=0)
SEPARATE = dataclasses.replace(SMALL, patch_prototypes=9)
SEMI = dataclasses.replace(SMALL, heads="semi")


def given_masks(padding=0):
    mask = torch.rand(2, BATCH, GRID[0] * GRID[1]) < 0.4
    mask[0, 0] = False  # an image without a mask
    mask[1, 1] = torch.arange(12) == 7  # one with a single patch
    mask[1, 2] = True
    return cases.GivenMasks(mask, padding)


def build(options=SMALL, masks=None):
    objective = Ibot(masks or given_masks(), options).double()
    return objective, objective.head(WIDTH).double(), objective.head(WIDTH).double().requires_grad_(False)


def features():
    summary = torch.randn(2, BATCH, WIDTH, dtype=torch.float64)
    patches = torch.randn(2, BATCH, GRID[0] * GRID[1], WIDTH, dtype=torch.float64)
    return Features(summary, patches, GRID)


def sides(student_head, teacher_head, predictor=None):
    local = cases.cls_features(torch.randn(2, BATCH, WIDTH, dtype=torch.float64))
    return Side(features(), local, head=student_head, predictor=predictor), Side(features(), head=teacher_head)


def run(objective, student, teacher, clock=None):
    clock = clock or cases.clock_of(0)
    now = now_at(clock, objective.schedule(clock))
    cues = objective.cue(cases.views_of(BATCH), GRID, now)
    return objective(student, teacher, cases.views_of(BATCH), cues, now)


def patch_loop(objective, student, teacher, average="image", temperature=0.07):
    """The formula, view by view and image by image."""
    total = 0
    for view in range(2):
        for image in range(BATCH):
            mask = objective.masks.mask[view, image]
            s, t = (
                (side.predictor or side.head.patch_prototypes).logits(side.head(side.global_crops.patches[view, image]))
                for side in (student, teacher)
            )
            q = ((t - objective.patch_target.center) / temperature).softmax(dim=-1)
            losses = -(q * (s / 0.1).log_softmax(dim=-1)).sum(dim=-1)
            divisor = max(int(mask.sum()), 1) if average == "image" else 1
            total = total + losses[mask].sum() / divisor
    return total / (2 * BATCH)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("average", ["image", "sum"])
@pytest.mark.parametrize("options", [SMALL, SEPARATE, SEMI], ids=["shared", "separate", "semi"])
def test_patch_term_and_gradient_are_those_of_the_loop(options, average, padding):
    objective, *heads = build(dataclasses.replace(options, patch_average=average), given_masks(padding))
    objective.patch_target.center.normal_()
    predictor = objective.predictor(WIDTH)
    student, teacher = sides(*heads, predictor if predictor is None else predictor.double())
    result, expected = run(objective, student, teacher)["ibot/patch"], patch_loop(objective, student, teacher, average)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=0)
    modules = [heads[0], *([predictor] if predictor else [])]
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (result, expected)]
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_only_masked_patches_get_a_gradient():
    objective, *heads = build(masks=given_masks(padding=4))
    student, teacher = sides(*heads)
    patches = student.global_crops.patches.requires_grad_()
    run(objective, student, teacher)["ibot/patch"].backward()
    assert torch.equal(patches.grad.abs().sum(dim=-1) > 0, objective.masks.mask)


def test_empty_masks_everywhere_give_zero():
    objective, *heads = build(masks=cases.GivenMasks(torch.zeros(2, BATCH, 12, dtype=torch.bool), padding=4))
    student, teacher = sides(*heads)
    assert run(objective, student, teacher)["ibot/patch"] == 0
    for target in ("centering", "sinkhorn"):
        again = Ibot(objective.masks, dataclasses.replace(SMALL, target=target, patch_center_over="masked")).double()
        assert run(again, student, teacher)["ibot/patch"] == 0
        again.after_step()
        assert all(value.isfinite().all() for value in again.state_dict().values())


@pytest.mark.parametrize("over", ["all", "masked"])
def test_patch_center_is_the_mean_of_the_patches_it_is_over(over):
    objective, *heads = build(dataclasses.replace(SEPARATE, patch_center_over=over), given_masks(padding=5))
    student, teacher = sides(*heads)
    run(objective, student, teacher)
    objective.after_step()
    logits = heads[1].patch_prototypes.logits(heads[1](teacher.global_crops.patches))
    logits = logits.flatten(0, 2) if over == "all" else logits[objective.masks.mask]
    torch.testing.assert_close(objective.patch_target.center, 0.1 * logits.mean(dim=0), rtol=1e-9, atol=0)
    summaries = heads[1].prototypes.logits(heads[1](teacher.global_crops.summary)).mean(dim=(0, 1))
    torch.testing.assert_close(objective.target.center, 0.1 * summaries, rtol=1e-9, atol=0)


def test_sinkhorn_ignores_padding():
    options = dataclasses.replace(SEPARATE, target="sinkhorn")
    few, *heads = build(options)
    many = Ibot(cases.GivenMasks(few.masks.mask, padding=8), options).double()
    student, teacher = sides(*heads)
    result, expected = run(few, student, teacher), run(many, student, teacher)
    torch.testing.assert_close(result["ibot/patch"], expected["ibot/patch"], rtol=1e-5, atol=0)
    assert not torch.allclose(result["ibot/patch"], patch_term(build(SEPARATE, few.masks)[0], student, teacher))


def patch_term(objective, student, teacher):
    return run(objective, student, teacher)["ibot/patch"]


def test_patches_have_a_temperature_of_their_own():
    options = dataclasses.replace(SMALL, warmup_epochs=2, patch_teacher_temperature=0.1, teacher_temperature=0.04)
    objective, *heads = build(options)
    student, teacher = sides(*heads)
    for epoch, temperature in ((0, 0.04), (5, 0.1)):
        result = run(objective, student, teacher, cases.clock_of(epoch))
        expected = patch_loop(objective, student, teacher, temperature=temperature)
        torch.testing.assert_close(result["ibot/patch"], expected, rtol=1e-9, atol=0)
        assert objective.temperature.at(cases.clock_of(epoch)) == 0.04


def test_masks_and_their_schedule_start_at_their_epoch():
    options = dataclasses.replace(SMALL, warmup_epochs=3, patch_start_epoch=2)
    objective, *heads = build(options)
    student, teacher = sides(*heads)
    for epoch, temperature in enumerate([0.04, 0.04, 0.04, 0.055, 0.07, 0.07]):
        clock = cases.clock_of(epoch)
        assert objective.patch_temperature.at(clock) == pytest.approx(temperature)
        now = now_at(clock, objective.schedule(clock))
        cues = objective.cue(cases.views_of(BATCH), GRID, now)
        assert cues.mask.any() == (epoch >= 2)
        assert (objective(student, teacher, cases.views_of(BATCH), cues, now)["ibot/patch"] > 0) == (epoch >= 2)
        assert objective.temperature.at(clock) == pytest.approx([0.04, 0.055, 0.07][min(epoch, 2)])


def test_shared_prototypes_are_one_module():
    shared, separate = (build(options)[1] for options in (SMALL, SEPARATE))
    assert shared.patch_prototypes is shared.prototypes
    assert separate.patch_prototypes.count == 9
    assert build(SEPARATE)[0].patch_target.center.shape == (9,)


@pytest.mark.parametrize(
    ("options", "of_patches", "student_only"),
    [({}, None, None), ({"heads": "shared"}, None, None), ({"heads": "semi"}, None, 16), ({"heads": "vanilla"}, 16, None),
     ({"heads": "vanilla", "patch_prototypes": 9}, 9, None), ({"patch_prototypes": 9}, 9, None)],
)  # fmt: skip
def test_the_prototypes_of_patches(options, of_patches, student_only):
    """Those of both branches, and those of the student alone."""
    objective = Ibot(given_masks(), dataclasses.replace(SMALL, **options))
    head, predictor = objective.head(WIDTH), objective.predictor(WIDTH)
    own = head.own_patch_prototypes
    assert (own and own.count, predictor and predictor.count) == (of_patches, student_only)
    counts = objective.prototype_counts()
    assert counts == {"ibot/cls": 16, "ibot/patch": of_patches or 16}
    assert objective.patch_target.center.shape == (counts["ibot/patch"],)


def test_semi_shared_heads_keep_both_terms_apart_in_the_student():
    """The class token's prototypes learn nothing from patches, those of patches nothing from the class token."""
    objective, head, teacher_head = build(SEMI)
    predictor = objective.predictor(WIDTH).double()
    terms = run(objective, *sides(head, teacher_head, predictor))
    for term, learns, stays in (("ibot/cls", head.prototypes, predictor), ("ibot/patch", predictor, head.prototypes)):
        weights = [module.weight_v for module in (learns, stays)]
        a, b = torch.autograd.grad(terms[term], weights, retain_graph=True, allow_unused=True)
        assert a.abs().max() > 0
        assert b is None or not b.any()


@pytest.mark.parametrize("heads", ["shared", "semi"])
def test_a_number_of_patch_prototypes_needs_separate_heads(heads):
    with pytest.raises(ValueError, match=f"in both branches, got 9 with heads='{heads}'; leave it out, or set"):
        IbotOptions(heads=heads, patch_prototypes=9)
    with pytest.raises(ValueError, match=r"IbotOptions\.heads"):
        IbotOptions(heads="own")


class Recorder(cases.GivenMasks):
    """Records the running numbers that it gets."""

    def __call__(self, first, views, batch, grid, device):
        self.first = [*getattr(self, "first", []), first]
        return self.mask


def test_micro_batches_get_the_running_numbers_of_one_batch():
    recorder = Recorder(given_masks().mask)
    objective, *heads = build(masks=recorder)
    clock = cases.clock_of(1)  # after 1000 images
    for number in range(3):
        run(objective, *sides(*heads), clock.at_batch(number, 0, 1, BATCH))
    objective.after_step()
    run(objective, *sides(*heads), clock.next(3 * BATCH).at_batch(0, 0, 1, BATCH))
    assert recorder.first == [1000, 1000 + BATCH, 1000 + 2 * BATCH, 1000 + 3 * BATCH]


def test_ranks_get_their_part_of_the_running_numbers():
    first = []
    for rank in range(2):
        objective = Ibot(Recorder(given_masks().mask), SMALL)
        for number in range(2):
            clock = cases.clock_of(0).at_batch(number, rank, 2, BATCH)
            objective.cue(cases.views_of(BATCH), GRID, now_at(clock, objective.schedule(clock)))
        first.append(objective.masks.first)
    assert first == [[0, 2 * BATCH], [BATCH, 3 * BATCH]]


@pytest.mark.parametrize("masks", [FixedMasks(MaskRule(((0.0, 0.0), (0.3, 0.2)))), ReleasedMasks()])
def test_runs_on_both_kinds_of_masks(masks):
    objective, *heads = build(masks=masks)
    student, teacher = sides(*heads)
    cues = objective.cue(cases.views_of(BATCH), GRID, cases.now_of(objective))
    assert cues.mask.shape == (2, BATCH, 12)
    rows = objective.masked_patches(cues, GRID)
    assert len(rows.row) == masks.rows(2, BATCH, GRID)
    assert torch.equal(torch.zeros(72).index_fill_(0, rows.row[rows.valid], 1).bool().view(2, BATCH, 12), cues.mask)
    assert run(objective, student, teacher)["ibot/patch"] > 0


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_masked_patches_come_in_order_and_then_padding(share):
    mask = torch.rand(2, BATCH, GRID[0] * GRID[1]) < share
    flat, padding = mask.flatten(), min(5, int((~mask).sum()))
    for average in ("image", "sum"):
        objective, *_ = build(dataclasses.replace(SMALL, patch_average=average), cases.GivenMasks(mask, padding))
        rows = objective.masked_patches(Cues(mask=mask), GRID)
        assert torch.equal(rows.row, (~flat).int().argsort(stable=True)[: objective.masks.rows(2, BATCH, GRID)])
        assert torch.equal(rows.valid, flat[rows.row])
        expected = mask.sum(2).flatten()[rows.row // mask.shape[2]].clamp(min=1) * 2 * BATCH
        assert torch.equal(torch.as_tensor(rows.divisor), expected if average == "image" else torch.tensor(2 * BATCH))


def test_what_is_missing_is_named():
    objective, *heads = build()
    student, teacher = sides(*heads)
    with pytest.raises(ValueError, match="forward needs the mask that cue returned, got none"):
        objective(student, teacher, cases.views_of(BATCH), Cues(), cases.now_of(objective))
    with pytest.raises(ValueError, match=r"ibot: its head .* got none in the teacher"):
        run(objective, student, Side(features()))
    with pytest.raises(ValueError, match="at least one patch of a batch must be masked"):
        run(build(masks=FixedMasks(MaskRule(((0.01, 0.0),))))[0], student, teacher)
    with pytest.raises(ValueError, match="patch_average"):
        IbotOptions(patch_average="median")
    with pytest.raises(ValueError, match="patch_center_over"):
        IbotOptions(patch_center_over="visible")
    assert objective.needs().masks
