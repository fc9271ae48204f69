"""SelfPatch's neighbor tables, similarities and selections, in every implementation that runs here."""

import torch
from harness import Case, check
from parity import HAS_GPU, cuda_kernels_on_cpu

from patchlight_kernels import force, neighbor_topk
from patchlight_kernels.ops.neighbor_topk.reference import neighborhood


@check("selfpatch_local_index")
def tables(case: Case) -> None:
    assert case.under("output.neighbours.")
    for key, table in case.under("output.neighbours.").items():
        size, _, window = key.partition(".window")
        height, width = (int(side) for side in size.split("x"))
        radius = int(window or case.config["window"]) // 2
        assert torch.equal(neighborhood(height, width, radius, True), table.long()), key


@check("selfpatch_topk")
def selections(case: Case) -> None:
    for grid_name, x in case.under("input.patches.").items():
        grid = tuple(int(size) for size in grid_name.split("x"))
        for name in ("reference", "cpp") + (() if HAS_GPU else ("triton",)):
            with force(name):
                compare(case, grid_name, grid, x)
        with cuda_kernels_on_cpu(), force("cuda"):
            compare(case, grid_name, grid, x)
        if HAS_GPU:
            for name in ("triton", "cuda"):
                with force(name):
                    compare(case, grid_name, grid, x.cuda())


def compare(case: Case, grid_name: str, grid: tuple[int, int], x: torch.Tensor) -> None:
    """The recorded gaps between similarities are wide, so the same patches are selected."""
    radius = case.config.get("window", 3) // 2  # the released value, if none is recorded
    for key, expected in case.under(f"output.topk_patch_index.{grid_name}.").items():
        index, score = (t.cpu() for t in neighbor_topk(x, grid, int(key[1:]), radius=radius, return_scores=True))
        assert torch.equal(index.sort(-1).values, expected.int().sort(-1).values), f"{grid_name} {key}"
        best = case[f"output.similarity.{grid_name}"].sort(dim=-1, descending=True).values[..., : int(key[1:])]
        assert (score - best).abs().max() <= 1e-5 * best.abs().max(), f"{grid_name} {key}"
