"""What is special about self_relation: its algebra, sampling, samples of weight 0, strips, ranges, errors."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from harness import FOLDER
from harness import Case as Recorded
from parity import EPS, ROOT, SEED, assert_as_exact_as_pytorch, every_runner, needs_gpu, outcome, running, signs, spread

from patchlight_kernels import force, registry, self_relation
from patchlight_kernels.registry import Case

SPEC = registry.spec("self_relation")


def some_arguments(
    views=2, images=3, heads=2, rows=7, width=5, teacher_width=None, dtype=torch.float32, device="cpu", **changes
):
    sizes = {"views": views, "images": images, "heads": heads, "rows": rows, "width": width}
    more = {"teacher_width": teacher_width or width, "transposed": teacher_width is not None}
    return SPEC.inputs(Case("test", sizes | more), dtype, device, SEED) | changes


def with_gradient(arguments):
    leaf = arguments["student"].detach().requires_grad_()
    loss = self_relation(**arguments | {"student": leaf})
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def double(arguments):
    return {key: value.double() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}


def by_the_formula(student, teacher, student_scale, teacher_scale, weight):
    """One row at a time, for autograd."""
    loss = 0.0
    for s, b in ((s, b) for s in range(len(student)) for b in range(student.shape[1])):
        rows = []
        for g, n in ((g, n) for g in range(student.shape[2]) for n in range(student.shape[3])):
            target = (teacher_scale * teacher[b, g] @ teacher[b, g, n]).softmax(-1)
            rows.append(-(target * (student_scale * student[s, b, g] @ student[s, b, g, n]).log_softmax(-1)).sum())
        loss = loss + weight[s, b] * torch.stack(rows).mean()
    return loss


# ---------------------------------------------------------------------------------------------- the algebra


@pytest.mark.parametrize("teacher_width", [None, 3, 9])
def test_the_reference_is_the_formula(teacher_width):
    arguments = double(some_arguments(teacher_width=teacher_width))
    leaf = arguments["student"].requires_grad_()
    loss = by_the_formula(**arguments)
    torch.testing.assert_close(with_gradient(arguments), (loss.detach(), torch.autograd.grad(loss, leaf)[0]))


def gradient_from_sums(a, off=0.0):
    """D + D^T of the symmetric relation from two vectors of log-sum-exps, and one product with the features.

    `off` is the relative error of the sums, up or down at random.
    """
    relations = [
        scale * (x @ x.mT) for scale, x in ((a["student_scale"], a["student"]), (a["teacher_scale"], a["teacher"]))
    ]
    both, generator = [], torch.Generator().manual_seed(1)
    for relation in relations:
        sums = relation.logsumexp(-1)
        sums = sums * (1 + off * signs(sums, generator))
        both.append((relation - sums[..., :, None]).exp() + (relation - sums[..., None, :]).exp())
    of_sample = a["weight"] * a["student_scale"] / (2 * 7)
    return of_sample[:, :, None, None, None] * ((both[0] - both[1]) @ a["student"])


def test_the_gradient_needs_the_sums_of_both_rows_only():
    a = double(some_arguments())
    torch.testing.assert_close(with_gradient(a)[1], gradient_from_sums(a))


def test_the_cross_term_is_linear_in_the_students():
    """sum_v <P, s_v> = <P, sum_v s_v>, the relation of all views' features side by side: linear in the student."""
    a = double(some_arguments(views=3))
    target = (a["teacher_scale"] * a["teacher"] @ a["teacher"].mT).softmax(-1)
    relation = a["student_scale"] * a["student"] @ a["student"].mT
    together = torch.cat(list(a["student"]), dim=-1)
    cross = (target * (a["student_scale"] * together @ together.mT)).sum((-1, -2, -3))
    loss = (relation.logsumexp(-1).sum((0, -1, -2)) - cross).sum() / (2 * 7)
    torch.testing.assert_close(self_relation(**a | {"weight": torch.ones(3, 3).double()}), loss)


def test_an_equal_teacher_gives_no_gradient():
    """The loss is then the entropy, its minimum."""
    a = some_arguments(views=1)
    a |= {"teacher": a["student"][0], "teacher_scale": a["student_scale"]}
    loss, gradient = with_gradient(a)
    p = (a["student_scale"] * a["teacher"] @ a["teacher"].mT).softmax(-1)
    torch.testing.assert_close(loss, -(p * p.log()).sum(-1).mean((-1, -2)) @ a["weight"][0])
    assert gradient.abs().max() < 1e-6


def corners(images, points):
    """Grids from end to end of an overlap box: axis-aligned, some mirrored, one without overlap, one along the border."""
    start, stop = -1 + torch.rand(2, images).double(), torch.rand(2, images).double()
    start[:, 0], stop[:, 0] = -1, 1
    steps = torch.linspace(0, 1, points).double()
    x, y = start[..., None] + (stop - start)[..., None] * steps
    x[1] = x[1].flip(-1)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    grid[2] = -2
    return grid


def sampled_twice(relation, grid, side):
    """As released: along the keys, then along the queries; [B, G, N, N] to [B, G, points, points]."""
    images, heads = relation.shape[:2]
    for _ in range(2):
        maps = relation.flatten(1, 2).unflatten(-1, (side, side))
        relation = F.grid_sample(maps, grid, align_corners=False).flatten(2).unflatten(1, (heads, -1)).mT
    return relation.reshape(images, heads, grid[0, ..., 0].numel(), -1)


def test_sampling_the_features_samples_the_relation():
    """Samp(R(f)) = R(Samp f), in value and in gradient, on overlaps, mirrored ones, borders, and without overlap."""
    images, heads, side, points, width = 4, 2, 5, 4, 6
    features = torch.randn(images, heads, side * side, width).double().requires_grad_()
    grid = corners(images, points)
    relation = sampled_twice(features @ features.mT, grid, side)
    maps = features.mT.flatten(1, 2).unflatten(-1, (side, side))
    samples = F.grid_sample(maps, grid, align_corners=False).flatten(2).unflatten(1, (heads, -1)).mT
    torch.testing.assert_close(samples @ samples.mT, relation)
    teacher = torch.randn(images, heads, points**2, width).double()
    target = (3 * teacher @ teacher.mT).softmax(-1)
    released = -(target * (0.4 * relation).log_softmax(-1)).sum(-1).mean()
    loss = self_relation(samples[None], teacher, 0.4, 3.0)
    torch.testing.assert_close(loss, released)
    torch.testing.assert_close(
        torch.autograd.grad(loss, features, retain_graph=True), torch.autograd.grad(released, features)
    )


@every_runner
@pytest.mark.parametrize("kind", ["pixel", "channel"])
@pytest.mark.parametrize("recorded", ["sere_step_globals_a", "sere_step_globals_nooverlap_b"])
def test_the_recorded_relations_give_the_recorded_loss(recorded, kind, device, name):
    """The released code's relations of two views as those of their square roots, each view against the other's teacher."""
    case = Recorded(FOLDER / f"{recorded}.safetensors")
    features = {}
    for side in ("student", "teacher"):
        relation = case[f"{side}_relation_{kind}" + ("_sampled" if kind == "pixel" else "")].double()
        values, vectors = torch.linalg.eigh(relation if kind == "pixel" else relation[:, None])
        roots = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
        features[side] = roots.unflatten(0, (2, -1)).to(device, torch.float32)
    scale = 1 / float(case.meta[f"temperature_{kind}"])
    with running(device, name):
        losses = [self_relation(features["student"][[1 - v]], features["teacher"][v], 1.0, scale) for v in (0, 1)]
    case.close(f"loss_{kind}", torch.stack(losses).mean(), rel=1e-5)


# ------------------------------------------------------------------------------------------- strips and blocks


@pytest.mark.parametrize("sizes", [(1, 9, 2, 100, 40), (2, 1, 1, 230, 17), (1, 5, 1, 64, 33), (1, 1, 1, 1100, 5)])
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_strips_on_the_cpu(sizes, threads):
    """Many samples or few for the threads, and more rows than a strip of relations has."""
    arguments = some_arguments(*sizes)
    torch.set_num_threads(threads)
    with running("cpu", "cpp"):
        result = outcome(SPEC, arguments)
    assert_as_exact_as_pytorch(SPEC, arguments, result, f"{sizes}, {threads} threads")


def test_one_of_these_sizes_needs_a_second_strip():
    """Strips are up to 2^20 relations: all of 1024 rows."""
    text = (ROOT / "csrc/self_relation/self_relation_cpu.cpp").read_text()
    assert 1 << int(re.search(r"kStrip = 1 << (\d+);", text)[1]) < 1100**2


@every_runner
def test_nothing_of_size_rows_by_rows_is_kept_for_the_backward(device, name):
    arguments = some_arguments(1, 1, 1, 90, 4, device=device)
    sizes = []
    with (
        running(device, name),
        torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x),
    ):
        self_relation(**arguments | {"student": arguments["student"].requires_grad_()})
    assert max(sizes) <= 90 * 4


@every_runner
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_backward_that_computes_relations_again(device, name, dtype):
    """As on a GPU: the forward keeps two vectors of sums, and the backward starts from those."""
    arguments = some_arguments(dtype=dtype, device=device)
    leaf = arguments["student"].requires_grad_()
    with running(device, name):
        loss, _, _, empty = torch.ops.patchlight.self_relation_fwd(*SPEC.op.bind(**arguments)[:-1], False)
        assert empty.numel() == 0
        later = torch.autograd.grad(3 * loss, leaf)[0]
        at_once = torch.autograd.grad(3 * self_relation(**arguments), leaf)[0]
    (moves,) = spread(lambda given: with_gradient(given)[1:], arguments)
    tolerance = 4 * torch.finfo(dtype).eps
    assert (later - at_once).abs().max() <= tolerance * at_once.abs().max() + 3 * 4 * moves


# ---------------------------------------------------------------------------------------------------- weights, ranges, gradients


@every_runner
def test_a_sample_of_weight_0_changes_nothing(device, name):
    """Even with NaN in it; its gradient is 0. A teacher may hold NaN too if all its students have weight 0."""
    arguments = some_arguments(device=device)
    arguments["weight"][1, 0] = 0
    arguments["weight"][:, 2] = 0
    arguments["student"][1, 0] = torch.nan
    arguments["student"][0, 2] = torch.inf
    arguments["teacher"][2] = torch.nan
    with running(device, name):
        loss, gradient = with_gradient(arguments)
        clean = arguments | {key: arguments[key].nan_to_num(0, 0) for key in ("student", "teacher")}
        expected = with_gradient(clean)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])
    assert (gradient[1, 0] == 0).all()
    assert (gradient[:, 2] == 0).all()
    assert loss.isfinite()


@every_runner
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_what_is_not_finite_reaches_the_loss(device, name, which, bad):
    arguments = some_arguments(rows=40, device=device)
    arguments[which].view(-1)[-1] = bad
    with running(device, name):
        assert self_relation(**arguments).isnan()


@every_runner
def test_no_overlap_costs_ln_n(device, name):
    """All samples are 0: both softmaxes are uniform, and there is no gradient."""
    arguments = some_arguments(rows=9, device=device, weight=None)
    zeros = {key: torch.zeros_like(arguments[key]) for key in ("student", "teacher")}
    with running(device, name):
        loss, gradient = with_gradient(arguments | zeros)
    torch.testing.assert_close(loss.item(), math.log(9))
    assert (gradient == 0).all()


@every_runner
def test_extreme_relations_stay_finite(device, name):
    """Also rows whose sums differ by more than an exponent can hold."""
    arguments = some_arguments(device=device)
    arguments["student"][..., ::2, :] *= 100
    arguments["teacher"][..., 1::2, :] *= 100
    with running(device, name):
        result = outcome(SPEC, arguments)
    assert all(value.isfinite().all() for value in result.values())
    wide = {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in double(arguments).items()}
    saved = (
        (gradient_from_sums(wide, off=EPS) - gradient_from_sums(wide)).abs().max().item()
    )  # the sums are in the thousands
    assert_as_exact_as_pytorch(SPEC, arguments, result, name, also={"gradient of student": saved})


def test_samples_weigh_the_same_by_default():
    arguments = some_arguments()
    equal = self_relation(**arguments | {"weight": torch.full((2, 3), 1 / 6)})
    assert torch.equal(self_relation(**arguments | {"weight": None}), equal)


def test_nothing_flows_into_the_teacher_or_the_weight():
    arguments = some_arguments()
    for key in ("student", "teacher", "weight"):
        arguments[key].requires_grad_()
    self_relation(**arguments).backward()
    assert arguments["student"].grad is not None
    assert arguments["teacher"].grad is None
    assert arguments["weight"].grad is None


def test_a_second_backward_gives_the_same():
    arguments = some_arguments()
    leaf = arguments["student"].requires_grad_()
    loss = self_relation(**arguments)
    first = torch.autograd.grad(7 * loss, leaf, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(7 * loss, leaf)[0])


@every_runner
def test_the_channel_form_is_the_transpose(device, name):
    """Strided channels, an expanded teacher and views that are not adjacent give what copies give."""
    maps, teacher = torch.randn(3, 2, 6, 11, device=device), torch.randn(1, 1, 4, 11, device=device)
    student = maps.transpose(0, 1)[:, :, None].mT  # [2, 3, 1, 11, 6]
    teacher = teacher.expand(3, 1, 4, 11).mT
    weight = torch.rand(2, 1, device=device).expand(2, 3)
    with running(device, name):
        strided = with_gradient(
            {"student": student, "teacher": teacher, "student_scale": 0.3, "teacher_scale": 0.5, "weight": weight}
        )
        copied = with_gradient(
            {
                "student": student.contiguous(),
                "teacher": teacher.contiguous(),
                "student_scale": 0.3,
                "teacher_scale": 0.5,
                "weight": weight.contiguous(),
            }
        )
    torch.testing.assert_close(strided, copied, rtol=1e-6, atol=1e-8)


# ------------------------------------------------------------------------------------------------------- the rest

WRONG = {
    "no views": ({"student": torch.zeros(3, 2, 7, 5)}, ValueError, r"heads, rows, width\], got shape \(3, 2, 7, 5\)"),
    "integers": ({"student": torch.zeros(2, 3, 2, 7, 5, dtype=torch.long)}, TypeError, "got torch.int64; cast it"),
    "teacher's rows": ({"teacher": torch.zeros(3, 2, 8, 5)}, ValueError, r"\[3, 2, 7, width\] .*, got shape \(3, 2, 8, 5\)"),
    "teacher's heads": ({"teacher": torch.zeros(3, 1, 7, 5)}, ValueError, "sample both at the same points"),
    "mixed dtypes": ({"teacher": torch.zeros(3, 2, 7, 5).half()}, TypeError, "teacher must be torch.float32 like student"),
    "mixed devices": ({"teacher": torch.zeros(3, 2, 7, 5, device="meta")}, ValueError, "must be on cpu like student, got meta"),
    "weights transposed": ({"weight": torch.zeros(3, 2)}, ValueError, r"weight must be \(2, 3\), got \(3, 2\)"),
    "half weights": ({"weight": torch.zeros(2, 3).half()}, TypeError, "weight must be torch.float32 beside a student"),
    "weights elsewhere": ({"weight": torch.zeros(2, 3, device="meta")}, ValueError, "weight must be on cpu like student"),
    "scale 0": ({"student_scale": 0.0}, ValueError, "student_scale must be positive and finite, got 0.0"),
    "scale nan": ({"teacher_scale": math.nan}, ValueError, "teacher_scale must be positive and finite, got nan"),
    "scale inf": ({"teacher_scale": math.inf}, ValueError, "teacher_scale must be positive and finite, got inf"),
    "scale tensor": ({"student_scale": torch.tensor(0.1)}, TypeError, "must be a Python float, got a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_say_rule_got_and_remedy(wrong):
    change, kind, words = WRONG[wrong]
    with pytest.raises(kind, match=words) as caught:
        self_relation(**some_arguments() | change)
    assert str(caught.value).startswith("self_relation: ")
    assert ";" in str(caught.value), "no remedy"


@pytest.mark.parametrize("sizes", [(0, 1, 2, 3, 4), (2, 0, 2, 3, 4), (2, 1, 0, 3, 4), (2, 1, 2, 0, 4)])
def test_no_rows_or_views_cost_nothing(sizes):
    loss, gradient = with_gradient(some_arguments(*sizes))
    assert loss == 0
    assert (gradient == 0).all()


def test_no_channels_make_all_rows_equal():
    arguments = some_arguments(1, 1, 2, 5, 0, weight=torch.ones(1, 1))
    torch.testing.assert_close(self_relation(**arguments), torch.tensor(5.0).log())


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_gpu) for name in ("triton", "cuda")])
def test_offsets_beyond_32_bits(name):
    sample = torch.randn(256, 64, device="cuda", dtype=torch.bfloat16)
    student = sample.expand(1, 140_000, 1, -1, -1).contiguous()  # 2.3e9 values
    with running("cuda", name):
        loss, gradient = with_gradient(
            {"student": student, "teacher": student[0], "student_scale": 0.125, "teacher_scale": 0.25, "weight": None}
        )
    with force("reference"):
        expected = self_relation(student[:, :1], student[0, :1], 0.125, 0.25)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    assert torch.equal(gradient[0, 0], gradient[0, -1])
