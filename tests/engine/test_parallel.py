"""The same run on one process, on two, sharded, in a 2 x 2 mesh, accumulated and with checkpointed activations."""

from dataclasses import replace
from functools import partialmethod

import pytest
import torch
from engine.tape import TapeRecorder
from engine.tiny_run import (
    DINO,
    IBOT,
    PQCL,
    SELFPATCH,
    largest_difference,
    on_processes,
    outcome,
    tiny_run,
    tiny_trainer,
    train_tiny,
)
from torch import nn

from patchlight.backbones.architectures import build_backbone
from patchlight.engine import gradients
from patchlight.engine.dtensor import local
from patchlight.engine.graph import WARM_UP
from patchlight.engine.parallel import Mesh, parallelize, processes
from patchlight.run import Parallel
from patchlight_kernels import force

STEPS = 6
STEP_LENGTH = 1e-3  # the tiny run's largest learning rate: how far a gradient with a wrong sign moves a weight


def assert_equal_runs(expected: dict, result: dict) -> None:
    """Losses, gradient norms and weights up to fp32 rounding: a hundredth of one optimizer step."""
    assert result["clock"] == expected["clock"]
    for a, b in zip(expected["terms"], result["terms"], strict=True):
        for name in a.keys() - {"teacher/spread"}:  # of each rank's own images
            assert b[name] == pytest.approx(a[name], rel=2e-5), name
    for part in ("student", "teacher", "objectives"):
        assert largest_difference(expected[part], result[part]) < STEP_LENGTH / 100, part


@pytest.mark.parametrize("options", [(DINO,), (IBOT,), (DINO, SELFPATCH)], ids=["dino", "ibot", "dino+selfpatch"])
def test_two_replicas_and_two_shards_train_like_one_process(options, tmp_path):
    single = train_tiny(tiny_run(tmp_path, options=options), STEPS)
    assert len({terms["loss"] for terms in single["terms"]}) == STEPS
    for shard in (1, 2):
        run = tiny_run(
            tmp_path, options=options, parallel={"precision": "fp32", "shard": shard}, data={"batch_per_rank": 4}
        )
        first, second = on_processes(2, train_tiny, run, STEPS)
        assert_equal_runs(single, first)
        assert largest_difference(first["teacher"], second["teacher"]) == 0


def test_two_by_two_processes_train_like_one(tmp_path):
    single = train_tiny(tiny_run(tmp_path), STEPS)
    run = tiny_run(tmp_path, parallel={"precision": "fp32", "shard": 2}, data={"batch_per_rank": 2})
    assert_equal_runs(single, on_processes(4, train_tiny, run, STEPS)[3])


@pytest.mark.parametrize("options", [(DINO,), (IBOT,)], ids=["dino", "ibot"])
def test_four_accumulated_batches_are_one_batch_four_times_as_large(options, tmp_path):
    """Loss, gradients, centers and teacher: all move once per optimizer step."""
    single = train_tiny(tiny_run(tmp_path, options=options), STEPS)
    parallel = {"precision": "fp32", "accumulate": 4}
    four = train_tiny(tiny_run(tmp_path, options=options, parallel=parallel, data={"batch_per_rank": 2}), STEPS)
    assert_equal_runs(single, four)


def test_accumulation_over_shards(tmp_path):
    single = train_tiny(tiny_run(tmp_path), STEPS)
    parallel = {"precision": "fp32", "accumulate": 2, "shard": 2}
    run = tiny_run(tmp_path, parallel=parallel, data={"batch_per_rank": 2})
    assert_equal_runs(single, on_processes(2, train_tiny, run, STEPS)[0])


def test_global_clipping_over_shards(tmp_path):
    """The norm must be that of the whole tensors, not of one rank's pieces."""
    optim = {"clip": 0.3, "clip_mode": "global", "warmup_epochs": 0, "base_lr": 1e-3 * 32}
    single = train_tiny(tiny_run(tmp_path, optim=optim), STEPS)
    parallel = {"precision": "fp32", "shard": 2}
    run = tiny_run(tmp_path, optim=optim, parallel=parallel, data={"batch_per_rank": 4})
    assert_equal_runs(single, on_processes(2, train_tiny, run, STEPS)[0])


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_layerwise_optimizers_over_shards(name, tmp_path):
    optim = {"name": name, "base_lr": {"lars": 0.3, "lamb": 1e-3}[name] * 32, "warmup_epochs": 0, "momentum": 0.9}
    single = train_tiny(tiny_run(tmp_path, optim=optim), STEPS)
    run = tiny_run(tmp_path, optim=optim, parallel={"precision": "fp32", "shard": 2}, data={"batch_per_rank": 4})
    assert_equal_runs(single, on_processes(2, train_tiny, run, STEPS)[0])


def test_checkpointed_activations_change_nothing(tmp_path):
    model = {"image_size": 16, "patch_size": 4, "drop_path": 0.5, "sizes": {"width": 20, "depth": 2, "heads": 2}}
    plain = train_tiny(tiny_run(tmp_path, model=model), STEPS)
    again = train_tiny(
        tiny_run(tmp_path, model=model, parallel={"precision": "fp32", "checkpoint_activations": True}), STEPS
    )
    assert again["terms"] == plain["terms"]
    assert largest_difference(plain["student"], again["student"]) == 0


def train_compiled(run, steps: int) -> dict:
    """With compiled units, by a backend that saves the minute that the default one needs."""
    nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")
    return train_tiny(run, steps)


@pytest.mark.parametrize("options", [(DINO,), (DINO, SELFPATCH)], ids=["dino", "dino+selfpatch"])
def test_compiled_checkpointed_and_sharded_units_train_like_plain_ones(options, tmp_path):
    single = train_tiny(tiny_run(tmp_path, options=options), 3)
    parallel = {"precision": "fp32", "shard": 2, "compile": "on", "checkpoint_activations": True}
    run = tiny_run(tmp_path, options=options, parallel=parallel, data={"batch_per_rank": 4})
    assert_equal_runs(single, on_processes(2, train_compiled, run, 3)[0])


def test_bf16_over_shards_stays_near_fp32(tmp_path):
    single = train_tiny(tiny_run(tmp_path, parallel={"precision": "bf16"}), STEPS)
    exact = train_tiny(tiny_run(tmp_path), STEPS)
    run = tiny_run(tmp_path, parallel={"precision": "bf16", "shard": 2}, data={"batch_per_rank": 4})
    two = on_processes(2, train_tiny, run, STEPS)[0]
    rounded = abs(single["terms"][-1]["loss"] - exact["terms"][-1]["loss"])
    assert 0 < rounded < 0.02
    assert abs(two["terms"][-1]["loss"] - exact["terms"][-1]["loss"]) < 2 * rounded + 0.005
    assert all(array.dtype == "float32" for array in two["teacher"].values())


@pytest.mark.parametrize("options", [(DINO,), (DINO, SELFPATCH), (IBOT, PQCL)], ids=["dino", "selfpatch", "pqcl"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_16_bit_residual_stream_changes_its_own_format_only(precision, options, tmp_path):
    """Forward and backward; everything outside the blocks has the formats that it has without the option."""
    formats, losses = {}, {}
    for residual in ("fp32", "16bit"):
        parallel = {"precision": precision, "residual": residual}
        trainer = tiny_trainer(tiny_run(tmp_path, options=options, parallel=parallel))
        stream = set()
        for branch in (trainer.student, trainer.teacher):
            for block in branch.backbone.blocks:
                block.register_forward_hook(
                    lambda block, inputs, output: stream.update({inputs[0].dtype, output.dtype})
                )
                if branch is trainer.student:
                    block.register_full_backward_hook(lambda block, inputs, outputs: stream.add(outputs[0].dtype))
        features = []
        trainer.student.register_forward_hook(lambda branch, inputs, output: features.append(output))
        with force(neighbor_topk="reference"):
            trainer.step()
        expected = torch.bfloat16 if (precision, residual) == ("bf16", "16bit") else torch.float32
        assert stream == {expected}
        tensors, _ = torch.utils._pytree.tree_flatten(features)
        formats[residual] = [x.dtype for x in tensors if isinstance(x, torch.Tensor)]
        formats[residual] += [p.grad.dtype for p in trainer.student.parameters() if p.grad is not None]
        losses[residual] = trainer.metrics.steps[0]["loss"].item()
    assert formats["fp32"] == formats["16bit"]
    assert (losses["fp32"] == losses["16bit"]) is (precision == "fp32")
    assert losses["16bit"] == pytest.approx(losses["fp32"], rel=0.01)


def test_a_16_bit_residual_stream_needs_a_vision_transformer():
    branch = nn.Module()
    branch.backbone = build_backbone("resnet18", stem_width=4)
    with pytest.raises(ValueError, match=r'residual="16bit" needs a vision transformer, got ResNet; leave'):
        parallelize(branch, Parallel(residual="16bit"), Mesh(torch.device("cpu")), trained=True, compiled=False)


def test_wrong_number_of_processes_is_refused():
    with (
        pytest.raises(ValueError, match=r"replicate x shard must equal the number of processes, got 3 x 1 for 1"),
        processes(Parallel(replicate=3)),
    ):
        pass


def infinite_on_one_rank(run) -> tuple[float, tuple, bool]:
    """Rank 1 reports an infinite term although all gradients are finite."""
    with processes(run.parallel) as mesh:
        trainer = tiny_trainer(run, mesh)
        trainer.step_values.write(trainer.clock)
        terms = trainer.device_step.accumulate(trainer.batches)
        terms["dino/cls"] = terms["dino/cls"] + (float("inf") if mesh.rank == 1 else 0.0)
        before = [local(parameter).clone() for parameter in trainer.student.parameters()]
        refused, _ = trainer.update.step(terms, trainer.step_values.values)
        after = [local(parameter) for parameter in trainer.student.parameters()]
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return refused.item(), trainer.update.refusals(), same


def test_what_is_not_finite_on_one_rank_all_ranks_refuse_and_name(tmp_path):
    run = tiny_run(tmp_path, parallel={"precision": "fp32", "shard": 2}, data={"batch_per_rank": 4})
    assert on_processes(2, infinite_on_one_rank, run) == [(1.0, (1, 1, "the loss term dino/cls"), True)] * 2


def count_reductions(run, kind: str) -> int:
    """How often one step reduces gradients over processes."""
    gradients.BUCKET = 2000  # so that a tiny student has several
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train_tiny(run, 1)
    return sum(event.count for event in profile.key_averages() if kind in event.key)


@pytest.mark.parametrize(("shard", "kind"), [(1, "allreduce"), (2, "reduce_scatter")])
def test_only_the_last_accumulated_batch_reduces_gradients(shard, kind, tmp_path):
    def reductions(batches: int) -> int:
        parallel = {"precision": "fp32", "shard": shard, "accumulate": batches}
        run = tiny_run(tmp_path, parallel=parallel, data={"batch_per_rank": 4 // batches})
        return on_processes(2, count_reductions, run, kind)[0]

    assert 5 < reductions(4) < 2 * reductions(1)


def reduce_while_backward_runs(rank: int) -> tuple[list[int], float]:
    """How many buckets were sent when each parameter's gradient came; and the largest error of the means."""
    gradients.BUCKET = 100
    with processes(Parallel()):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(4)), nn.Linear(5, 1))
        unused = nn.Parameter(torch.zeros(3))
        model.register_parameter("unused", unused)
        mean = gradients.GradientMean(model, 2)
        sent: list[int] = []
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _: sent.append(mean.sent))
        x = torch.arange(40.0).view(2, 4, 5) / 40
        rank = torch.distributed.get_rank()
        for _ in range(2):
            model.zero_grad()
            mean.begin(last=False)
            model(x[rank, :2]).sum().backward()
            mean.begin(last=True)
            model(x[rank, 2:]).sum().backward()
            mean.finish()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        assert unused.grad is None
        model.zero_grad()
        model(x.flatten(0, 1)).sum().backward()
        expected = [p.grad / 2 for p in model.parameters() if p.grad is not None]
        return sent, max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


def test_replicas_send_gradients_while_the_backward_runs():
    for sent, error in on_processes(2, reduce_while_backward_runs, 0):
        first = sent[:10]
        assert max(first) == 0, "nothing is sent in a batch that is not the last"
        assert max(sent[10:20]) > 0 and error < 1e-6


def repeat_recorded(run, steps: int) -> dict:
    recorder = TapeRecorder()
    with force(neighbor_topk="reference"), processes(run.parallel) as mesh:
        trainer = tiny_trainer(run, mesh, recorder=recorder)
        for _ in range(steps):
            trainer.step()
        assert recorder.replays == steps - WARM_UP
        return outcome(trainer)


def test_recorded_replicas_train_like_launched_ones(tmp_path):
    run = tiny_run(tmp_path, options=(DINO, SELFPATCH), data={"batch_per_rank": 4})
    launched = on_processes(2, train_tiny, run, 7)
    recorded = on_processes(2, repeat_recorded, run, 7)
    for one, other in zip(launched, recorded, strict=True):
        assert one["terms"] == other["terms"]
        assert largest_difference(one["student"], other["student"]) == 0


def start_with_another_seed(run) -> str:
    with processes(run.parallel) as mesh:
        parallel = replace(run.parallel, seed=mesh.rank)
        try:
            tiny_trainer(replace(run, parallel=parallel), mesh)
        except ValueError as error:
            return str(error)
    return "started"


def test_processes_with_different_weights_are_refused(tmp_path):
    run = tiny_run(tmp_path, data={"batch_per_rank": 4})
    assert all("equal weights" in message for message in on_processes(2, start_with_another_seed, run))


def fail_on_one_rank(run) -> str:
    with processes(run.parallel) as mesh:
        if mesh.rank == 1:
            raise SystemExit(7)  # as an error would, without its traceback in the test's output
        return "rank 0 did not wait"


def test_an_error_ends_a_rank_without_waiting_for_others(tmp_path):
    with pytest.raises(AssertionError, match=r"exit codes \[\d+, 7\]|exit codes \[-?\d+, 7\]"):
        on_processes(2, fail_on_one_rank, tiny_run(tmp_path), timeout=20)


def test_a_mesh_of_one_process_communicates_nothing():
    mesh = Mesh(torch.device("cpu"))
    x = torch.tensor([3.0])
    assert mesh.sum_over_shards(x) is x
    assert mesh.max_over_all(x) is x
    assert mesh.any(True)
    assert not mesh.any(False)
