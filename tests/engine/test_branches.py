"""The features of branches, the update of the teacher, and what several objectives may need of both."""

from dataclasses import replace

import pytest
import torch
from engine.tiny_run import DINO, IBOT, SELFPATCH, NoiseLoader, tiny_run
from torch import nn

from patchlight.data.policy import dino_policy
from patchlight.engine.assembly import build_branches, build_objectives
from patchlight.engine.branches import check_teacher_student
from patchlight.objectives.interface import Needs, NeighborRule, Objective
from patchlight.objectives.weighted import WeightedObjectives
from patchlight.records import Clock, Cues, Wanted, now_at
from patchlight_kernels import force


def now_of(objectives):
    clock = Clock(0, 10, 0, 5)
    return now_at(clock, objectives.schedule(clock))


def built(run):
    objectives = build_objectives(run)
    return (*build_branches(run.model, objectives.objectives()), objectives, next(NoiseLoader(run)))


def test_a_crop_has_the_same_features_alone():
    student, _, _, views = built(tiny_run("", options=(IBOT,)))
    mask = torch.rand(2, 8, 16) < 0.4
    global_crops, local_crops, _ = student(views, Cues(mask))
    assert (global_crops.grid, local_crops.grid) == ((4, 4), (3, 3))
    for view in range(2):
        alone = student.summary(student.backbone(views.global_crops.pixels[view], mask[view]))
        torch.testing.assert_close(global_crops.summary[view], alone.summary)
        torch.testing.assert_close(global_crops.patches[view], alone.patches)
        alone = student.summary(student.backbone(views.local_crops.pixels[view]))
        torch.testing.assert_close(local_crops.patches[view], alone.patches)


def test_the_teacher_is_called_once_per_size_and_not_on_local_crops_unless_wanted():
    _, teacher, _, views = built(tiny_run(""))
    sizes = []
    teacher.backbone.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape))
    assert teacher(views, wanted=Wanted(local_crops=False)).local_crops is None
    assert sizes == [(16, 3, 16, 16)]
    teacher(views)
    assert sizes[1:] == [(16, 3, 16, 16), (16, 3, 12, 12)]


def test_the_teacher_starts_as_a_copy_without_gradients_in_training_mode():
    student, teacher, _, _ = built(tiny_run("", model={"drop_path": 0.5, "image_size": 16, "patch_size": 4}))
    check_teacher_student(teacher, student)
    expected = student.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in teacher.state_dict().items())
    assert teacher.training
    assert not any(type(module).__name__ == "DropPath" for module in teacher.modules())
    assert any(type(module).__name__ == "DropPath" for module in student.modules())


@pytest.mark.parametrize("refused", [None, 0.0, 1.0])
def test_the_teacher_moves_by_one_minus_momentum(refused):
    student, teacher, _, _ = built(tiny_run(""))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    teacher.follow(student, 0.9, None if refused is None else torch.tensor(refused))
    target = dict(student.named_parameters())
    for name, parameter in teacher.named_parameters():
        expected = before[name] if refused else before[name] * 0.9 + target[name] * 0.1
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)
        if refused:
            assert torch.equal(parameter, before[name])


class WithPredictor(Objective):
    name = "predicts"

    def head(self, width):
        return nn.BatchNorm1d(width)

    def predictor(self, width):
        return nn.Linear(width, 3)


def test_predictors_belong_to_the_student_and_buffers_do_not_follow():
    run = tiny_run("")
    student, teacher = build_branches(run.model, [WithPredictor()])
    check_teacher_student(teacher, student)
    views = next(NoiseLoader(run))
    sides = [branch.sides(branch(views))["predicts"] for branch in (student, teacher)]
    assert isinstance(sides[0].predictor, nn.Linear)
    assert sides[1].predictor is None
    student.heads["predicts"].running_mean += 1
    teacher.follow(student, 0.5)
    assert torch.equal(teacher.heads["predicts"].running_mean, torch.zeros(20))


def test_an_aliasing_teacher_is_refused():
    student, teacher, _, _ = built(tiny_run(""))
    teacher.backbone.blocks[1] = student.backbone.blocks[1]
    with pytest.raises(ValueError, match=r"teacher aliases student: .*backbone.blocks.1"):
        check_teacher_student(teacher, student)


def test_a_teacher_on_views_of_the_students_memory_is_refused():
    student, teacher, _, _ = built(tiny_run(""))
    teacher.backbone.pos_embed.data = student.backbone.pos_embed.data[:, :]
    with pytest.raises(ValueError, match=r"teacher aliases student.*1 shared parameters such as backbone.pos_embed"):
        check_teacher_student(teacher, student)


def test_a_teacher_of_another_shape_or_with_gradients_is_refused():
    student, teacher, _, _ = built(tiny_run(""))
    teacher.requires_grad_(True)
    with pytest.raises(ValueError, match="must not collect gradients"):
        check_teacher_student(teacher, student)
    del teacher.heads["dino"]
    with pytest.raises(ValueError, match=r"must have the student's parameters, got \['heads.dino"):
        check_teacher_student(teacher, student)


def test_the_loss_is_the_weighted_sum_of_the_terms():
    run = tiny_run("", options=(DINO, SELFPATCH), objectives={"weights": {"selfpatch/patch": 0.1}})
    run = replace(run, objectives=replace(run.objectives, options=(DINO, SELFPATCH)))
    student, teacher, objectives, views = built(run)
    with force(neighbor_topk="reference"):
        teacher_sides = teacher.sides(teacher(views, wanted=objectives.teacher_wants))
    loss, terms = objectives(student.sides(student(views)), teacher_sides, views, Cues(), now_of(objectives))
    assert terms.keys() == {"dino/cls", "selfpatch/patch"}
    torch.testing.assert_close(loss, terms["dino/cls"] + 0.1 * terms["selfpatch/patch"])


def test_an_objective_gets_only_what_it_needs_from_the_teacher():
    """SelfPatch makes the teacher compute local crops; DINO beside it must not get them."""
    run = tiny_run("", options=(DINO, SELFPATCH))
    _, teacher, objectives, views = built(run)
    with force(neighbor_topk="reference"):
        features = teacher(views, wanted=objectives.teacher_wants)
    received = {}

    def remember(name: str):
        def forward(student, teacher, views, cues, now):
            received[name] = teacher
            return {name: torch.zeros(())}

        return forward

    for objective in objectives.objectives():
        objective.forward = remember(objective.name)
    objectives(teacher.sides(features), teacher.sides(features), views, Cues(), now_of(objectives))
    assert received["dino"].local_crops is None
    assert received["selfpatch"].local_crops is features.local_crops
    assert received["dino"].head is teacher.heads["dino"]


def test_a_weight_without_a_term_is_refused():
    run = tiny_run("")
    run = replace(run, objectives=replace(run.objectives, weights={"dino/clss": 2.0}))
    with pytest.raises(ValueError, match=r"got \['dino/clss'\] where the terms are \['dino/cls'\]"):
        built(run)


class WithNeeds(Objective):
    def __init__(self, **needs) -> None:
        super().__init__()
        self.wanted = Needs(**needs)

    def needs(self) -> Needs:
        return self.wanted


def test_objectives_must_agree():
    same = WeightedObjectives(
        [WithNeeds(neighbors=NeighborRule(k=2)), WithNeeds(neighbors=NeighborRule(k=2)), WithNeeds()]
    )
    assert same.teacher_wants.neighbors == NeighborRule(k=2)
    with pytest.raises(ValueError, match="must agree on neighbors"):
        WeightedObjectives([WithNeeds(neighbors=NeighborRule(k=2)), WithNeeds(neighbors=NeighborRule(k=4))])
    with pytest.raises(ValueError, match="must agree on masks"):
        WeightedObjectives([WithNeeds(masks=True), WithNeeds(masks=True)])


def test_objectives_are_checked_against_model_and_data():
    run = tiny_run("", options=(SELFPATCH,))
    with pytest.raises(ValueError, match=r"need Model.summary='class_attention', got 'cls'"):
        build_objectives(replace(run, model=replace(run.model, summary="cls")))
    with pytest.raises(ValueError, match="need local crops"):
        build_objectives(replace(run, data=replace(run.data, crops=dino_policy(0, 16, 12))))


def test_crops_of_all_sizes_go_through_the_backbone_together():
    student, _, _, views = built(tiny_run(""))
    apart = student(views)
    student.sizes_together = True
    calls, forward_sizes = [], student.backbone.forward_sizes
    student.backbone.forward_sizes = lambda crops, residual: calls.append(len(crops)) or forward_sizes(crops, residual)
    together = student(views)
    assert calls == [2]
    for one, other in zip(apart[:2], together[:2], strict=True):
        torch.testing.assert_close(one.summary, other.summary)
        torch.testing.assert_close(one.patches, other.patches)
