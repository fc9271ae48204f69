"""Centers, Sinkhorn and temperatures against their definitions."""

import harness
import objective_cases as cases
import pytest
import torch

from patchlight.objectives import targets
from patchlight.objectives.targets import Center, Sinkhorn, TeacherTemperature, build_target
from patchlight.records import Clock

ROWS, WIDTH, COUNT = 24, 5, 11


def rows_and_directions(rows=ROWS, dtype=torch.float32):
    z = torch.nn.functional.normalize(torch.randn(rows, WIDTH, dtype=dtype), dim=1)
    return z, torch.nn.functional.normalize(torch.randn(COUNT, WIDTH, dtype=dtype), dim=1)


def clock(step, steps_per_epoch=10):
    return Clock(step=step, total=1000, images_seen=0, steps_per_epoch=steps_per_epoch)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["teacher_temp_const", "teacher_temp_warmup"])
def test_temperature_by_epoch_is_the_released_one(name):
    case = harness.Case(harness.FOLDER / "dino_schedules.safetensors")
    config = case.config[name]
    temperature = TeacherTemperature(
        config["warmup_teacher_temp"], config["teacher_temp"], config["warmup_teacher_temp_epochs"]
    )
    result = [temperature.at(clock(10 * epoch + 9)) for epoch in range(config["nepochs"])]
    assert (torch.tensor(result, dtype=torch.float64) - case[f"output.{name}"]).abs().max() <= 1e-12


def test_temperature_by_step_is_the_same_line_in_small_steps():
    temperature = TeacherTemperature(0.04, 0.07, 3, by="step")
    result = [temperature.at(clock(step)) for step in range(32)]
    assert result[0] == 0.04
    assert result[29] == pytest.approx(0.07, abs=1e-15)
    assert result[30:] == [0.07, 0.07]
    assert len(set(result[:30])) == 30


def test_one_warmup_epoch_stays_at_the_warmup_temperature():
    temperature = TeacherTemperature(0.04, 0.07, 1)
    assert [temperature.at(clock(step)) for step in (0, 9, 10)] == [0.04, 0.04, 0.07]


def test_center_is_the_running_mean_of_logits_and_used_one_step_late():
    center, expected = Center(COUNT, momentum=0.8), torch.zeros(COUNT)
    for _ in range(3):
        z, w = rows_and_directions()
        assert torch.equal(center(z, w, 0.04), -center.center)
        torch.testing.assert_close(center.center, expected)  # not moved yet
        center.after_step()
        expected = 0.8 * expected + 0.2 * (z @ w.T).mean(dim=0)
        torch.testing.assert_close(center.center, expected)


def test_center_over_four_micro_batches_is_the_center_of_one_batch():
    z, w = rows_and_directions()
    whole, pieces = Center(COUNT), Center(COUNT)
    whole(z, w, 0.04)
    for part in z.split([1, 7, 6, 10]):  # of unequal size, so that a mean of means would differ
        pieces(part, w, 0.04)
        assert not pieces.center.any()
    whole.after_step()
    pieces.after_step()
    torch.testing.assert_close(pieces.center, whole.center, rtol=1e-6, atol=1e-8)


def test_center_counts_marked_rows_only():
    z, w = rows_and_directions()
    marked = torch.arange(ROWS) % 3 == 0
    center = Center(COUNT)
    center(z, w, 0.04, marked)
    center.after_step()
    torch.testing.assert_close(center.center, 0.1 * (z[marked] @ w.T).mean(dim=0))


def test_center_sums_half_precision_rows_in_fp32():
    z, w = rows_and_directions(rows=4096)
    center = Center(COUNT)
    center(z.bfloat16(), w, 0.04)
    center.after_step()
    torch.testing.assert_close(center.center, 0.1 * (z.bfloat16().double() @ w.double().T).mean(dim=0).float())


def test_autocast_changes_nothing():
    z, w = rows_and_directions()
    center = Center(COUNT)
    with torch.autocast("cpu", torch.bfloat16):
        center(z, w, 0.04)
        center.after_step()
        bias = Sinkhorn()(z, w, 0.04)
    torch.testing.assert_close(center.center, 0.1 * (z @ w.T).mean(dim=0))
    assert torch.equal(bias, Sinkhorn()(z, w, 0.04))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_does_not_change_the_center(bad):
    z, w = rows_and_directions()
    center = Center(COUNT)
    center(z, w, 0.04)
    center.after_step()
    kept = center.center.clone()
    with_bad = z.clone()
    with_bad[3, 2] = bad
    center(with_bad, w, 0.04)
    center.after_step()
    assert torch.equal(center.center, kept)
    center(z, w, 0.04)
    center.after_step()
    torch.testing.assert_close(center.center, 0.19 * (z @ w.T).mean(dim=0))


def test_a_step_without_marked_rows_does_not_change_the_center():
    z, w = rows_and_directions()
    center = Center(COUNT)
    center.center.fill_(2.0)
    center(z, w, 0.04, torch.zeros(ROWS, dtype=torch.bool))
    center.after_step()
    assert (center.center == 2).all()


def test_center_keeps_nothing_but_its_state_between_steps():
    center = Center(COUNT)
    center(*rows_and_directions(), 0.04)
    assert center.row_count == ROWS
    center.after_step()
    kept = center.center.clone()
    assert set(center.state_dict()) == {"center"}
    assert not center.logit_sum.any()
    assert not center.row_count.any()
    center.after_step()  # a step without rows
    assert torch.equal(center.center, kept)


def plain_sinkhorn(logits, temperature, iterations=3):
    """[R, K] targets as in SwAV, in float64, by scaling the matrix itself."""
    q = (logits.double() / temperature).exp().T
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def softmax_with(bias, z, w, temperature):
    return ((z @ w.T + bias) / temperature).double().softmax(dim=1)


@pytest.mark.parametrize("chunk", [1 << 26, 5 * COUNT])
@pytest.mark.parametrize("temperature", [0.04, 0.5])
def test_sinkhorn_bias_gives_the_plain_algorithms_rows(temperature, chunk, monkeypatch):
    monkeypatch.setattr(targets, "CHUNK_LOGITS", chunk)  # the second one makes chunks of 5, 5, 5, 5 and 4 rows
    z, w = rows_and_directions()
    result = softmax_with(Sinkhorn()(z, w, temperature), z, w, temperature)
    torch.testing.assert_close(result, plain_sinkhorn(z @ w.T, temperature), rtol=1e-4, atol=1e-6)


def test_sinkhorn_uses_all_prototypes_equally_in_the_limit():
    z, w = rows_and_directions()
    z[:, 0] += 2  # rows that all prefer the same prototypes
    share = softmax_with(Sinkhorn(iterations=50)(z, w, 0.2), z, w, 0.2).mean(dim=0)
    torch.testing.assert_close(share, torch.full_like(share, 1 / COUNT), rtol=1e-3, atol=0)
    assert (z @ w.T / 0.2).softmax(dim=1).mean(dim=0).max() > 3 / COUNT


def test_sinkhorn_leaves_out_rows_that_are_not_marked():
    z, w = rows_and_directions()
    marked = torch.arange(ROWS) % 4 > 0
    torch.testing.assert_close(Sinkhorn()(z, w, 0.1, marked), Sinkhorn()(z[marked], w, 0.1))
    assert not Sinkhorn()(z, w, 0.1, torch.zeros(ROWS, dtype=torch.bool)).any()


def test_sinkhorn_is_finite_for_logits_too_large_for_exp():
    z, w = rows_and_directions()
    bias = Sinkhorn()(z, 100 * w, 0.04)
    assert bias.isfinite().all()
    assert softmax_with(bias, z, 100 * w, 0.04).isfinite().all()


def test_two_processes_agree_with_one():
    z, w = rows_and_directions()
    center = Center(COUNT)
    center(z, w, 0.1)
    center.after_step()
    bias = Sinkhorn()(z, w, 0.1)
    for rank_center, rank_bias in cases.in_two_processes(cases.targets_on_a_rank, z.split([5, 19]), w):
        torch.testing.assert_close(rank_center, center.center, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(rank_bias, bias, rtol=1e-5, atol=1e-6)


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="target must be one of centering, sinkhorn, got 'softmax'"):
        build_target("softmax", COUNT, 0.9)
    with pytest.raises(ValueError, match="by must be one of epoch, step, got"):
        TeacherTemperature(0.04, 0.07, 30, by="iteration")
    with pytest.raises(ValueError, match="positive"):
        TeacherTemperature(0.0, 0.07, 30)
