"""A step reads everything that changes on its device, so it can be recorded once and repeated."""

import pytest
import torch
from engine.tape import OperationStream, TapeRecorder
from engine.tiny_run import (
    COMBINATIONS,
    DINO,
    IBOT,
    MetricsInMemory,
    NoiseLoader,
    Prepared,
    largest_difference,
    outcome,
    tiny_run,
    tiny_trainer,
)

from patchlight.engine.assembly import build_trainer
from patchlight.engine.graph import WARM_UP, choose_recorder
from patchlight.engine.parallel import Mesh
from patchlight_kernels import force

# Schedules that move in every step, and a first epoch with frozen prototypes.
MOVING = {"warmup_epochs": 2, "weight_decay": 0.1, "weight_decay_end": 0.3, "freeze_prototypes_epochs": 1}


def build(folder, options, optimizer="adamw", recorder=None, **parts):
    optim = {"name": optimizer, **MOVING, **parts.pop("optim", {})}
    run = tiny_run(folder, options=options, optim=optim, model={"drop_path": 0.2}, **parts)
    return tiny_trainer(run, recorder=recorder)


SETTINGS = [
    *((optimizer, precision, 1) for optimizer in ("adamw", "lars", "lamb") for precision in ("fp32", "bf16", "fp16")),
    ("adamw", "bf16", 2),
]


@pytest.mark.parametrize(("optimizer", "precision", "accumulate"), SETTINGS)
@pytest.mark.parametrize("options", COMBINATIONS.values(), ids=COMBINATIONS)
def test_two_steps_are_the_same_operations(options, optimizer, precision, accumulate, tmp_path):
    """Their numbers included: what differs between them is read on the device."""
    trainer = build(tmp_path, options, optimizer, parallel={"precision": precision, "accumulate": accumulate})
    streams = []
    with force(neighbor_topk="reference"):
        for step in range(7):  # of which 5 are in the first epoch
            views = [next(trainer.loader) for _ in range(accumulate)]
            trainer.step_values.write(trainer.clock)
            with OperationStream() as stream:
                trainer.device_step(views)
            trainer.clock = trainer.clock.next(trainer.global_batch)
            if step > 0:  # the first one makes the optimizer's state
                streams.append(stream.operations)
    for number, operations in enumerate(streams[1:]):
        for old, new in zip(streams[0], operations, strict=True):
            assert old == new, f"step {number + 2}: {new}, where step 1 had {old}"


@pytest.mark.parametrize("options", COMBINATIONS.values(), ids=COMBINATIONS)
@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_repeated_steps_are_those_of_python(options, optimizer, tmp_path):
    """Bit by bit, over the end of the first epoch, with accumulation and drop path."""
    results = []
    for recorder in (None, TapeRecorder()):
        trainer = build(tmp_path, options, optimizer, recorder, parallel={"precision": "fp32", "accumulate": 2})
        torch.manual_seed(3)
        with force(neighbor_topk="reference"):
            for _ in range(9):
                trainer.step()
        results.append(outcome(trainer))
        if recorder is not None:
            assert (recorder.launches, recorder.replays) == (WARM_UP, 9 - WARM_UP)
            assert trainer.repeated_step.recorded
    python, repeated = results
    assert python["terms"] == repeated["terms"]
    for part in ("student", "teacher", "objectives"):
        assert largest_difference(python[part], repeated[part]) == 0, part


def test_a_recorded_run_resumes_and_logs_as_any_other(tmp_path):
    results = {}
    for name, graph in (("python", False), ("recorded", True)):
        folder = tmp_path / name
        for resume in (False, True):
            recorder = TapeRecorder() if graph else None
            output = {"folder": str(folder), "log_every": 2, "save_every": 10**6, "resume": resume}
            steps = {"epochs": 4 if resume else 2, "steps_per_epoch": 5}
            trainer = build("", (DINO,), recorder=recorder, output=output, schedule={"epochs": 4, "steps_per_epoch": 5})
            trainer.begin()
            for _ in range(steps["epochs"] * 5 - trainer.clock.step):
                trainer.step()
            trainer.save()
        results[name] = outcome(trainer)
    assert results["python"]["clock"] == results["recorded"]["clock"]
    assert largest_difference(results["python"]["student"], results["recorded"]["student"]) == 0


def test_a_step_that_cannot_be_recorded_is_launched_aloud(tmp_path, capsys):
    recorder = TapeRecorder()
    trainer = build(tmp_path, (DINO,), recorder=recorder)
    forward = trainer.device_step.forward

    def waits(views, now):
        loss, terms = forward(views, now)
        loss.item()
        return loss, terms

    trainer.device_step.forward = waits
    for _ in range(WARM_UP + 2):
        trainer.step()
    assert trainer.clock.step == WARM_UP + 2 and not trainer.repeated_step.recorded
    assert "launched from Python: recording one failed: aten._local_scalar_dense" in capsys.readouterr().out
    required = build(tmp_path / "on", (DINO,), recorder=TapeRecorder())
    required.repeated_step.required = True
    required.device_step.forward = waits
    for _ in range(WARM_UP):
        required.step()
    with pytest.raises(RuntimeError, match=r'Parallel.graph="on" needs a step that can be recorded, got aten'):
        required.step()


def test_batches_of_another_shape_are_refused(tmp_path):
    trainer = build(tmp_path, (DINO,), recorder=TapeRecorder())
    for _ in range(WARM_UP + 1):
        trainer.step()
    trainer.loader.batch = 4
    with pytest.raises(ValueError, match="All batches of a recorded step must have the same shapes, got"):
        trainer.step()


def test_the_choice_is_explained(tmp_path):
    run = tiny_run(tmp_path)
    assert choose_recorder(run, Mesh(torch.device("cpu")), False) == (None, ("launched", "the device is cpu"))
    with pytest.raises(ValueError, match=r'Parallel.graph="on" needs .*, got the device is cpu; use graph="off"'):
        tiny_trainer(tiny_run(tmp_path, parallel={"graph": "on"}))
    cuda = torch.device("cuda")
    sharded = tiny_run(tmp_path, parallel={"shard": 2})
    assert choose_recorder(sharded, Mesh(cuda, 0, 2), False)[1] == ("launched", "FSDP2 gathers shards from Python")
    released = tiny_run(tmp_path, objectives={"mask_counts": "released", "options": (IBOT,)})
    assert "draws masks on the host" in choose_recorder(released, Mesh(cuda), True)[1][1]
    off = tiny_run(tmp_path, parallel={"graph": "off"})
    assert choose_recorder(off, Mesh(cuda), False) == (None, ("launched", 'Parallel.graph="off"'))


class OnGpu(NoiseLoader):
    def __next__(self):
        views = super().__next__()
        return views.with_tensors(tensor.cuda() for tensor in views.tensors())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("compile", ["off", "on"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("options", COMBINATIONS.values(), ids=COMBINATIONS)
def test_a_cuda_graph_computes_what_launched_steps_do(options, precision, compile, tmp_path):
    """20 steps each, from the same weights and random numbers; some kernels add in an order of their own."""
    results = []
    for graph in ("off", "on"):
        parallel = {"precision": precision, "graph": graph, "compile": compile}
        run = tiny_run(tmp_path, options=options, optim=MOVING, model={"drop_path": 0.2}, parallel=parallel)
        trainer = build_trainer(run, loader=OnGpu(run), metrics=MetricsInMemory())
        torch.cuda.manual_seed(3)
        for _ in range(20):
            trainer.step()
        assert trainer.repeated_step.recorded is (graph == "on")
        terms = [{name: float(value) for name, value in step.items()} for step in trainer.metrics.steps]
        results.append((terms, {name: p.detach().cpu().numpy() for name, p in trainer.student.named_parameters()}))
    (launched, launched_weights), (recorded, recorded_weights) = results
    rel = 1e-5 if precision == "fp32" else 2e-2
    for step, (expected, terms) in enumerate(zip(launched, recorded, strict=True)):
        assert terms == pytest.approx(expected, rel=rel, abs=rel), step
    if precision == "fp32":
        assert largest_difference(launched_weights, recorded_weights) < 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="waits are seen on a GPU only")
@pytest.mark.parametrize("graph", ["off", "on"])
@pytest.mark.parametrize("options", COMBINATIONS.values(), ids=COMBINATIONS)
def test_no_step_waits_for_the_gpu(options, graph, tmp_path):
    run = tiny_run(tmp_path, options=options, parallel={"precision": "bf16", "graph": graph, "compile": "off"})
    trainer = build_trainer(run, loader=OnGpu(run), metrics=MetricsInMemory())
    trainer.batches.loader = Prepared(trainer.batches.loader, WARM_UP + 5)
    for _ in range(WARM_UP + 1):
        trainer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            trainer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
