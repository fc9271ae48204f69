"""The benchmark measures what it says: gate first, every provider, complete rows, pictures from rows only."""

from __future__ import annotations

import csv

import pytest
import torch

from patchlight_kernels import registry

bench_ops = pytest.importorskip("bench.ops", reason="run from the repository root")
from bench import peers, report  # noqa: E402
from bench.timing import interleaved, peak_extra_bytes  # noqa: E402


@pytest.fixture
def tiny(monkeypatch):
    """One small case with eager peers only: compiling is the benchmark's business."""
    spec = registry.spec("neighbor_topk")
    monkeypatch.setattr(peers, "PEERS", {})
    monkeypatch.setitem(bench_ops.PEERS, "neighbor_topk", {"official eager": peers.neighbor_topk_official})
    monkeypatch.setattr(bench_ops, "CACHE_BYTES", {"cpu": 0, "cuda": 0})
    return spec


def test_rows_are_complete_and_drawn(tiny, tmp_path):
    rows = bench_ops.one_case(tiny, tiny.tests[1], torch.float32, "cpu", seconds=0.01)
    assert {row["provider"] for row in rows} >= {"official eager", "patchlight cpp"}
    assert all(row["status"] == "ok" for row in rows)
    path = tmp_path / "ops.csv"
    bench_ops.write(rows, path)
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
    rows = bench_ops.one_case(tiny, tiny.tests[1], torch.float32, "cpu", seconds=0.01)
    row = next(row for row in rows if row["provider"] == "wrong")
    assert row["status"] == "wrong result, not timed"
    assert "median_ms" not in row


def test_peers_agree_with_the_reference():
    """The peers are honest: for every window that they can do, they find what the reference finds."""
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
            assert bench_ops.error(spec, arguments, peer(**arguments)) < 1e-5, f"{peer.__name__} {case}"


def test_timing_is_interleaved_and_memory_is_seen():
    calls = []
    timings = interleaved({"a": [lambda: calls.append("a")], "b": [lambda: calls.append("b")]}, "cpu", seconds=0.0)
    assert calls[2:12] == ["a", "b"] * 5
    assert timings["a"].p20 <= timings["a"].median <= timings["a"].p80
    extra = peak_extra_bytes(lambda: torch.ones(16, 2**20), "cpu")
    if extra is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert 48e6 < extra < 96e6, "64 MiB were held at once"


def test_loaders_are_measured_each_in_a_process_of_its_own(tmp_path):
    bench_loader = pytest.importorskip("bench.loader")
    names = (bench_loader.PEER, "patchlight torchvision")
    suite = bench_loader.LoaderSuite(
        images=8, batch=4, cores=1, seconds=0.3, rounds=1, modes=("files",), providers=names
    )
    rows = bench_loader.run(suite)
    assert [row["provider"] for row in rows] == list(names)
    assert all(row["status"] == "ok" for row in rows), "the twin's pixels have the peer's mean and spread"
    bench_ops.write(rows, tmp_path / "loader.csv", bench_loader.COLUMNS)
    for row in csv.DictReader((tmp_path / "loader.csv").open()):
        assert float(row["crops_per_s"]) == pytest.approx(10 * float(row["images_per_s"]), rel=1e-3)
        for column in ("cpu_ms_per_image", "cores", "hardware", "torch", "commit", "date"):
            assert row[column], column
    odd = bench_loader.Measured(1.0, 1.0, 0.0, None, mean=0.5, spread=1.0)
    good = bench_loader.Measured(1.0, 1.0, 0.0, None, mean=0.0, spread=1.0)
    found = {"odd": [odd], "one": [good], "two": [good]}
    assert "mean of its pixels is 0.50, the others' 0.00" in bench_loader.judged([odd], found)
    assert bench_loader.judged([good], found) == "ok"


def test_the_readme_shows_the_committed_numbers():
    """`python -m bench readme` was run after the last change of bench/results."""
    assert report.headlines(report.RESULTS) in report.README.read_text()
