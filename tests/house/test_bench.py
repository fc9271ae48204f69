"""The benchmark measures what it claims: results are checked first, every provider, complete rows, plots from rows only."""

from __future__ import annotations

import csv
from dataclasses import replace
from unittest import mock

import pytest
import torch

from patchlight_kernels import (
    class_attention,
    neighbor_topk,
    prototype_ce,
    query_attention,
    registry,
    self_relation,
)
from patchlight_kernels.dispatch import Op

bench_ops = pytest.importorskip("bench.ops", reason="run from the repository root")
from bench import gaps, methods, peers, report, step, tables, update  # noqa: E402
from bench.flops import OP_FORMULAS, flops_of  # noqa: E402
from bench.official_step import OfficialStep  # noqa: E402
from bench.rows import write_rows  # noqa: E402
from bench.timing import peak_extra_bytes, time_interleaved  # noqa: E402


@pytest.fixture
def tiny(monkeypatch):
    """One small case with eager peers only: compiling takes long, and the benchmark does it."""
    spec = registry.spec("neighbor_topk")
    monkeypatch.setattr(peers, "PEERS", {})
    monkeypatch.setitem(bench_ops.PEERS, "neighbor_topk", {"official eager": peers.neighbor_topk_official})
    monkeypatch.setattr(bench_ops, "CACHE_BYTES", {"cpu": 0, "cuda": 0})
    return spec


def test_rows_are_complete_and_drawn(tiny, tmp_path):
    rows = bench_ops.measure_case(tiny, tiny.tests[1], torch.float32, "cpu", seconds=0.01)
    assert {row["provider"] for row in rows} >= {"official eager", "patchlight cpp"}
    assert all(row["status"] == "ok" for row in rows)
    path = tmp_path / "ops.csv"
    write_rows(rows, path)
    written = list(csv.DictReader(path.open()))
    for row in written:
        for column in ("median_ms", "floor_ms", "hardware", "torch", "commit", "date", "error"):
            assert row[column], column
    report.draw(path, tmp_path)
    assert (tmp_path / "neighbor_topk.png").stat().st_size > 10_000
    assert "official eager" in (tmp_path / "ops.md").read_text()


def test_a_wrong_result_is_not_timed(tiny, monkeypatch):
    def wrong(**arguments):
        index, score = peers.neighbor_topk_official(**arguments)
        return index, score + 0.1

    monkeypatch.setitem(bench_ops.PEERS, "neighbor_topk", {"wrong": wrong})
    rows = bench_ops.measure_case(tiny, tiny.tests[1], torch.float32, "cpu", seconds=0.01)
    row = next(row for row in rows if row["provider"] == "wrong")
    assert row["status"] == "wrong result, not timed"
    assert "median_ms" not in row


def test_peers_agree_with_the_reference():
    """For every window that the peers support, they find what the reference finds."""
    spec = registry.spec("neighbor_topk")
    for case in spec.tests:
        arguments = spec.inputs(case, torch.float32, "cpu")
        s = case.sizes
        full = s["radius"] is None or min(s["grid"]) >= 2 * s["radius"] + 1
        if s["border"] == "clip" or not full or s["images"] * s["channels"] == 0:
            continue
        for peer in (peers.neighbor_topk_official, peers.neighbor_topk_dense):
            if s["radius"] is None and peer is peers.neighbor_topk_official:
                continue
            assert bench_ops.largest_error(spec, arguments, peer(**arguments)) < 1e-5, f"{peer.__name__} {case}"


def test_timing_is_interleaved_and_memory_is_measured():
    calls = []
    timings = time_interleaved({"a": [lambda: calls.append("a")], "b": [lambda: calls.append("b")]}, "cpu", seconds=0.0)
    assert calls[2:12] == ["a", "b"] * 5
    assert timings["a"].p20 <= timings["a"].median <= timings["a"].p80
    extra = peak_extra_bytes(lambda: torch.ones(16, 2**20), "cpu")
    if extra is None:
        pytest.skip("this system does not record the peak memory of a process")
    assert 48e6 < extra < 96e6, "64 MiB were held at once"


def test_loaders_are_measured_each_in_a_process_of_its_own(tmp_path):
    bench_loader = pytest.importorskip("bench.loader")
    names = (bench_loader.PEER, "patchlight torchvision")
    suite = bench_loader.LoaderSuite(
        images=32, batch=16, cores=1, seconds=0.3, rounds=1, modes=("files",), providers=names
    )
    rows = bench_loader.measure(suite)
    assert [row["provider"] for row in rows] == list(names)
    assert all(row["status"] == "ok" for row in rows), "our pixels have the peer's mean and spread"
    path = tmp_path / "loader_cpu.csv"
    write_rows(rows, path, bench_loader.COLUMNS)
    assert f"({rows[1]['images_per_s'] / rows[0]['images_per_s']:.1f}x)" in tables.tables(tmp_path, tables.main_rows)
    for row in csv.DictReader(path.open()):
        assert float(row["crops_per_s"]) == pytest.approx(10 * float(row["images_per_s"]), rel=1e-3)
        for column in ("cpu_ms_per_image", "cores", "hardware", "torch", "commit", "date"):
            assert row[column], column
    odd = bench_loader.Measurement(1.0, 1.0, 0.0, None, mean=0.5, spread=1.0)
    good = bench_loader.Measurement(1.0, 1.0, 0.0, None, mean=0.0, spread=1.0)
    all_measurements = [odd, good, good]
    assert "mean of its pixels is 0.50, the others' 0.00" in bench_loader.check_pixels([odd], all_measurements)
    assert bench_loader.check_pixels([good], all_measurements) == "ok"


TINY = methods.StepSize("vit_tiny", 2, 64, 48, 2, 48, 40, (4, 3), {"width": 32, "depth": 2, "heads": 2})


@pytest.mark.parametrize("method", methods.METHODS.values(), ids=methods.METHODS)
def test_the_official_step_is_ours(method):
    """Two steps on the same weights, crops and masks; the second loss comes after centers, weights and teacher have moved."""
    trainer = methods.build_trainer(method.run(TINY))
    official = methods.build_official(method.official, trainer)
    for _ in range(2):
        official.mask = methods.next_mask(trainer)
        wanted = official.step(next(trainer.loader))
        trainer.step()
        assert methods.last_loss(trainer) == pytest.approx(wanted, rel=step.TOLERANCE)


def test_a_step_is_measured_beside_its_host(tmp_path):
    rows = step.measure(methods.METHODS["sere"], TINY, seconds=0.0)
    step.print_step_rows(rows)
    *timed, ratio = rows
    assert [row["provider"] for row in timed] == ["official eager", "patchlight", "host alone"]
    ours, host = timed[1:]
    assert ratio["time_ratio"] == ours["median_ms"] / host["median_ms"]
    assert ratio["flop_ratio"] == ours["gflop"] / host["gflop"] > 1
    path = tmp_path / "step_cpu.csv"
    write_rows(rows, path, step.COLUMNS)
    for row in csv.DictReader(path.open()):
        for column in (
            ("time_ratio", "flop_ratio") if row["status"] == "ratio" else ("median_ms", "images_per_s", "gflop")
        ):
            assert float(row[column]) > 0, f"{row['provider']} {column}"
        assert row["hardware"] and row["commit"] and row["date"]
    lines = tables.tables(tmp_path, list).splitlines()
    assert f"{ratio['time_ratio']:.2f}x : {ratio['flop_ratio']:.2f}x" in lines[-1]
    report.draw(path, tmp_path)
    assert "host alone" in (tmp_path / "step_cpu.md").read_text()


def test_a_step_with_another_loss_is_not_timed(monkeypatch):
    right = OfficialStep.step
    monkeypatch.setattr(OfficialStep, "step", lambda self, views: 1.001 * right(self, views))
    with pytest.raises(SystemExit, match="nothing is timed"):
        step.measure(methods.METHODS["dino"], TINY, seconds=0.0)


def test_updates_are_timed_on_equal_parameters(monkeypatch):
    one_block = replace(TINY, model_sizes=TINY.model_sizes | {"depth": 1})  # the compiler takes a second per tensor
    rows = update.measure(methods.METHODS["dino"], one_block, seconds=0.0)
    assert [row["provider"] for row in rows] == [methods.OFFICIAL, update.FOREACH, update.COMPILED, methods.OURS]
    assert all(row["error"] <= update.TOLERANCE and row["median_ms"] > 0 for row in rows)
    monkeypatch.setattr(OfficialStep, "update", lambda self: None)
    monkeypatch.setattr(update, "CompiledUpdate", update.ForeachUpdate)
    with pytest.raises(SystemExit, match="nothing is timed"):
        update.measure(methods.METHODS["dino"], one_block, seconds=0.0)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).requires_grad_()


def _class_attention():
    index = torch.tensor([[[0, 1, 2]] * 5], dtype=torch.int32)
    return class_attention(*(_random(1, n, 2, 3) for n in (5, 5, 5, 4, 4)), index)


COUNTED_BY_HAND = {
    "a linear layer": (lambda: torch.nn.functional.linear(_random(3, 5), _random(7, 5)), 2 * 3 * 5 * 7 * 3),
    "attention": (
        lambda: torch.nn.functional.scaled_dot_product_attention(*(_random(2, 3, 5, 4) for _ in range(3))),
        2 * 3 * (2 * 5 * 5 * 4) * (2 + 4),
    ),
    "raw tokens and queries": (
        lambda: query_attention(_random(1, 5, 3, 2, 4), 3),
        2 * (3 * 3 + 2 * 5) * (2 * 4) * (2 + 4),
    ),
    "states that read three patches and themselves": (_class_attention, 5 * (3 + 1) * 2 * (2 * 3) * (2 + 4)),
    "logits of two student views and one teacher's": (
        lambda: prototype_ce(
            _random(2, 3, 4), _random(5, 4), _random(1, 3, 4), _random(5, 4), 1.0, 1.0, torch.ones(1, 2)
        ),
        (2 * 3 * 5 * 4) * (2 + 1 + 2 * 2),
    ),
    "half of three relations of five rows, and two products": (
        lambda: self_relation(_random(2, 1, 1, 5, 4), _random(1, 1, 5, 4), 1.0, 1.0),
        (3 + 2 * 2) * (5 * 5 * 4),
    ),
    "half of the cosines of neighbors": (lambda: neighbor_topk(_random(1, 9, 4), (3, 3), 2), 9 * 4 * (8 + 2)),
}


@pytest.mark.parametrize(("call", "flops"), COUNTED_BY_HAND.values(), ids=COUNTED_BY_HAND)
def test_flops_counted_by_hand(call, flops):
    def both():
        out = call()
        if out.requires_grad:
            out.sum().backward()

    assert flops_of(both) == flops


def test_the_official_dino_needs_as_many_flops():
    """The rule counts what a method needs: without the logits in memory it is the same."""
    trainer = methods.build_trainer(methods.dino(TINY))
    official = methods.build_official(methods.METHODS["dino"].official, trainer)
    assert flops_of(trainer.step) == flops_of(lambda: official.step(next(trainer.loader)))


def test_every_op_that_trains_is_counted():
    for spec in registry.specs():
        if spec.differentiable:
            assert {f"{spec.name}_fwd", f"{spec.name}_bwd"} <= OP_FORMULAS.keys()


def test_a_forced_form_computes_the_backward_too():
    spec = registry.spec("class_attention")
    arguments = spec.inputs(spec.tests[0], torch.float32, "cpu")
    called = []
    choose = Op.choose

    def remembered(op, *args, direction="forward"):
        called.append((direction, choose(op, *args, direction=direction).name))
        return choose(op, *args, direction=direction)

    with mock.patch.object(Op, "choose", remembered):
        bench_ops.run_backward(spec, bench_ops.Forced(spec, "reference"), arguments)
    assert called == [("forward", "reference"), ("backward", "reference")]


def test_the_readme_has_the_committed_numbers():
    """`python -m bench readme` was run after the last change of bench/results."""
    main = tables.tables(tables.RESULTS, tables.main_rows, tables.RESULTS)
    assert main in tables.README.read_text()
    assert tables.all_tables(tables.RESULTS) == (tables.RESULTS / tables.TABLES).read_text()
    assert gaps.page() == (gaps.RESULTS / gaps.PAGE).read_text()
    assert gaps.UNKNOWN not in gaps.page(), "an operation on the page lacks its reason in gaps.toml"
    for path in gaps.sources(gaps.RESULTS):
        assert (gaps.RESULTS / gaps.picture(path)).is_file()


def test_a_gap_is_far_from_the_floor_or_behind_a_peer(tmp_path):
    row = {"case": "c", "dtype": "float32", "mode": "fwd", "status": "ok", "hardware": "a GPU", "floor_ms": 1.0}
    times = {"far": (4.0, 9.0), "near": (2.0, 3.0), "beaten": (1.5, 1.2)}
    rows = [
        row | {"op": op, "provider": provider, "median_ms": ms}
        for op, (ours, peer) in times.items()
        for provider, ms in (
            ("official eager", 20.0),
            ("compile(official)", peer),
            ("patchlight cuda", ours),
            ("reference", 0.1),
        )
    ]
    failed = row | {"op": "broken", "provider": "patchlight cuda", "median_ms": "", "status": "failed"}
    write_rows([*rows, failed], tmp_path / "ops_gpu.csv")
    (tmp_path / gaps.REASONS).write_text('[ops_gpu]\nfar = "its reason."\n')
    text = gaps.page(tmp_path)
    assert "2 of 3 cases:" in text
    assert "| `far` | c float32 fwd | cuda | 4 ms | 1 ms | 4.0x | compile(official) 2.25x |" in text
    assert "| `beaten` | c float32 fwd | cuda | 1.5 ms | 1 ms | 1.5x | **compile(official) 0.80x** |" in text
    assert "* `far`: its reason." in text and f"* `beaten`: {gaps.UNKNOWN}" in text
    gaps.publish(tmp_path)
    assert (tmp_path / "floor_ops_gpu.png").stat().st_size > 1000
