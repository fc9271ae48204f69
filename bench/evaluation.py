"""Times k-NN and label propagation against the naive and the released form, on random features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from patchlight.evaluation.davis.propagation import PropagationProtocol, propagate_frame
from patchlight.evaluation.probes.knn import NearestNeighbors

from .console import print_op_rows
from .rows import Row, case_columns, write_rows
from .timing import check_error, measure_calls

TOLERANCE = 1e-5
KNN_CHUNK = 512  # queries per product of the naive form


def measure_evaluation(
    out: Path = Path("bench/out/evaluation.csv"), small: bool = False, threads: int = 2, seconds: float = 30.0
) -> None:
    """Time k-NN at 10k x 100k (k=200) and one DAVIS frame at 480p, patch 8. A wrong result is not timed.

    Args:
        out: the CSV to write.
        small: a small size, to try the command.
        threads: CPU threads of all providers.
        seconds: per provider.
    """
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[Row] = []
    for op, case, calls, error in (_knn(device, small), _davis(device, small)):
        check_error(op, error, TOLERANCE)
        shared = case_columns(op, case, "fp32", device, "forward") | {"status": "ok", "error": error}
        measured = measure_calls({name: [call] for name, call in calls.items()}, device, seconds)
        rows += [shared | {"provider": name} | columns for name, columns in measured.items()]
    write_rows(rows, out)
    print_op_rows(rows)
    print(f"rows: {out}")


def _knn(device: str, small: bool) -> tuple[str, str, dict[str, Callable], float]:
    queries, bank, width, k = (500, 5_000, 64, 20) if small else (10_000, 100_000, 384, 200)
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(1000, width, generator=generator)
    labels = torch.randint(0, 1000, (bank,), generator=generator)
    draw = lambda classes: centers[classes] + 2 * torch.randn(len(classes), width, generator=generator)
    features, query_features = draw(labels), draw(torch.randint(0, 1000, (queries,), generator=generator))
    features, query_features, labels = features.to(device), query_features.to(device), labels.to(device)

    def naive() -> Tensor:
        rows, columns = F.normalize(query_features, dim=1), F.normalize(features, dim=1).T
        best = [(part @ columns).topk(k, dim=1) for part in rows.split(KNN_CHUNK)]
        torch.cat([labels[b.indices] for b in best])
        return torch.cat([b.values for b in best])

    def ours() -> Tensor:
        nearest = NearestNeighbors(query_features, k)
        nearest.add(features, labels)
        return nearest.result().similarity

    error = (naive() - ours()).abs().max().item()
    return "knn", f"{queries} x {bank} x {width}, k={k}", {"naive matmul + topk": naive, "patchlight": ours}, error


def _davis(device: str, small: bool) -> tuple[str, str, dict[str, Callable], float]:
    height, width, channels = (20, 30, 64) if small else (60, 104, 384)
    protocol, classes = PropagationProtocol(), 4
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(height, width, channels, generator=generator)
    frame = lambda: F.normalize(base + torch.randn(base.shape, generator=generator), dim=-1).to(device)
    labels = lambda: torch.randn(height, width, classes, generator=generator).softmax(-1).to(device)
    context, target = [(frame(), labels()) for _ in range(protocol.context_frames + 1)], frame()
    rows, columns = torch.arange(height), torch.arange(width)
    assert protocol.radius is not None
    near_rows = (rows[:, None] - rows).abs() <= protocol.radius
    near_columns = (columns[:, None] - columns).abs() <= protocol.radius
    near = (near_rows[:, None, :, None] & near_columns[None, :, None, :]).flatten(0, 1).flatten(1).float().to(device)

    def official() -> Tensor:
        """All scores at once: exponentials, the neighborhood's mask, top-k over the sources, sums."""
        sources = torch.stack([f.flatten(0, 1).T for f, _ in context])
        scores = torch.exp(torch.bmm(target.flatten(0, 1).expand(len(context), -1, -1), sources) / protocol.temperature)
        scores *= near
        scores = scores.transpose(2, 1).flatten(0, 1)
        scores[scores < scores.topk(protocol.neighbors, dim=0).values[-1:]] = 0
        scores /= scores.sum(0, keepdim=True)
        return (torch.cat([m.flatten(0, 1) for _, m in context]).T @ scores).T

    ours = lambda: propagate_frame(target, context, protocol).flatten(0, 1)
    error = (official() - ours()).abs().max().item()
    case = f"{height} x {width} x {channels}, {len(context)} context frames"
    return "label_propagation", case, {"official eager": official, "patchlight": ours}, error
