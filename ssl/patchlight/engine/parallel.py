"""Processes and how a branch is spread over them: checkpointing, then compilation, then FSDP2, always in this order."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..backbones.interface import Backbone
from ..backbones.vit import VisionTransformer
from ..checks import sentence
from ..heads.projection import ProjectionHead
from ..heads.prototypes import Prototypes
from ..objectives.ranks import SumOverRanks
from ..process import end_with_launcher
from ..run import Parallel

if TYPE_CHECKING:
    from ..objectives.weighted import WeightedObjectives
    from .branches import Branch


@dataclass(frozen=True)
class Mesh:
    """The rank of this process, and the collectives that the engine needs; only `any` and `gather` wait for the device."""

    device: torch.device
    rank: int = 0
    world: int = 1
    grid: DeviceMesh | None = None  # "replicate" x "shard"; None on one process
    shards: dist.ProcessGroup | None = None  # the processes that hold the pieces of one replica, if there are several

    def sum_over_shards(self, values: Tensor) -> Tensor:
        """The sum over the processes that hold the pieces of one replica."""
        if self.shards is not None:
            dist.all_reduce(values, group=self.shards)
        return values

    def max_over_all(self, values: Tensor) -> Tensor:
        """The largest value any process has."""
        if self.world > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def mean_over_all(self, values: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(values)
        return values / self.world

    def any(self, here: bool) -> bool:
        """Whether `here` is true on any process. Waits for the device: use it at log lines only."""
        if self.world == 1:
            return here
        return bool(self.max_over_all(torch.tensor(float(here), device=self.device)).item())

    def gather(self, here: list[str]) -> list[list[str]]:
        """What each process has, by rank."""
        found: list[list[str]] = [here] * self.world
        if self.world > 1:
            dist.all_gather_object(found, here)
        return found

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextmanager
def processes(parallel: Parallel) -> Iterator[Mesh]:
    """Joins the processes that torchrun started (or stays alone) and leaves them cleanly."""
    end_with_launcher()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    world = int(os.environ.get("WORLD_SIZE", 1))
    replicate = max(1, world // parallel.shard) if parallel.replicate is None else parallel.replicate
    if replicate * parallel.shard != world:
        raise ValueError(
            f"Parallel: replicate x shard must equal the number of processes, got {replicate} x {parallel.shard} for "
            f"{world}; start torchrun --nproc-per-node {replicate * parallel.shard}, or change shard."
        )
    if cuda:
        torch.cuda.set_device(device)
    if parallel.deterministic:
        use_deterministic_algorithms()
    if world == 1:
        yield Mesh(device)
        return
    # Asynchronous checkpoints use gloo while the training uses NCCL.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    grid = init_device_mesh(device.type, (replicate, parallel.shard), mesh_dim_names=("replicate", "shard"))
    shards = grid["shard"].get_group() if parallel.shard > 1 else None
    try:
        yield Mesh(device, dist.get_rank(), world, grid, shards)
        # A gloo thread that needs the interpreter while it shuts down aborts the process: wait for all ranks first.
        # Not after an error: the others may be waiting elsewhere, and torchrun ends them.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def use_deterministic_algorithms() -> None:
    """Equal runs give bit-identical results, or an error names the operation that cannot."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def parallelize(branch: Branch, parallel: Parallel, mesh: Mesh, trained: bool, compiled: bool) -> None:
    """Prepares a branch in place for its processes. trained=False is the teacher, which never runs backward.

    Replicas hold the whole branch (`gradients.GradientMean` averages their gradients); only shards need FSDP2.
    """
    branch.to(mesh.device)
    if mesh.world > 1:
        synchronize_batch_norm(branch, mesh)
    if parallel.residual == "16bit":
        set_residual_16bit(branch.backbone)
    # Fewer launches on a GPU. FSDP2's units and a CPU, where a copy costs more than a launch, take each size by itself.
    branch.sizes_together = mesh.device.type == "cuda" and parallel.shard == 1
    if parallel.checkpoint_activations and trained:
        for block in branch.backbone.blocks:
            checkpoint_activations(block)
    if compiled:
        compile_parts(branch, whole=parallel.shard == 1, one_process=mesh.world == 1)
    if mesh.grid is not None:
        check_equal_start(branch, mesh)
        if parallel.shard > 1:
            shard(branch, mesh.grid, trained)


def choose_compiled(parallel: Parallel, recorded: bool) -> tuple[bool, str]:
    """Whether the branches are compiled, and why. recorded: whether steps are a CUDA graph."""
    if parallel.compile != "auto":
        return parallel.compile == "on", f'Parallel.compile="{parallel.compile}"'
    if recorded:
        return True, "fewer and larger kernels for the CUDA graph"
    return False, "only where steps are a CUDA graph"


def compile_parts(branch: Branch, whole: bool, one_process: bool) -> None:
    """Compiles a branch's forward and its heads in place, so that the names of parameters stay.

    whole=False: the units of FSDP2 instead of the branch, as FSDP2's hooks cannot be compiled. What has a BatchNorm is
    compiled on one process only: on several, the BatchNorm communicates.
    """
    # Blocks share their code, but rates of drop path, crop sizes and grad modes differ.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    parts = (
        [[branch.backbone, branch.summary]] if whole else [[part] for part in (*branch.backbone.blocks, branch.summary)]
    )
    parts += [[part] for part in (*branch.heads.values(), *branch.predictors.values())]
    for part in parts:
        has_batch_norm = any(isinstance(module, _BatchNorm) for root in part for module in root.modules())
        if one_process or not has_batch_norm:
            # Each crop size has kernels of its own.
            (part[0] if len(part) == 1 else branch).compile(dynamic=False)


def compile_objectives(objectives: WeightedObjectives, student: Branch, parallel: Parallel, mesh: Mesh) -> None:
    """Compiles cues and losses with the heads in them, if these can be compiled: they are no units of FSDP2, and no BatchNorm
    communicates."""
    heads = [*student.heads.values(), *student.predictors.values()]
    communicates = mesh.world > 1 and any(isinstance(part, _BatchNorm) for head in heads for part in head.modules())
    if parallel.shard == 1 and not communicates:
        objectives.compile(dynamic=False)
        objectives.cue = torch.compile(objectives.cue, dynamic=False)  # type: ignore[method-assign]


def check_equal_start(branch: Branch, mesh: Mesh) -> None:
    """Raises unless all ranks have made the same weights, of which each keeps only its shard."""
    checksum = torch.stack(torch._foreach_norm([p.detach() for p in branch.parameters()])).sum()
    if mesh.any(bool(checksum != mesh.max_over_all(checksum.clone()))):
        raise ValueError(
            "Processes must start from equal weights, got different ones; give all the same seed, settings and torch."
        )


def set_residual_16bit(backbone: Backbone) -> None:
    """Keeps a vision transformer's tokens between its blocks in 16 bits under autocast."""
    if not isinstance(backbone, VisionTransformer):
        rule = 'Parallel.residual="16bit" needs a vision transformer'
        raise ValueError(sentence(rule, type(backbone).__name__, "leave it at fp32"))
    backbone.residual_16bit = True


def checkpoint_activations(block: nn.Module) -> None:
    """Keeps only the input of a block for backward, which computes the rest again."""
    forward = block.forward
    block.forward = lambda *args: checkpoint(forward, *args, use_reentrant=False)


def synchronize_batch_norm(branch: Branch, mesh: Mesh) -> None:
    """BatchNorm statistics over all ranks, as the released multi-GPU runs have them; torch can do that on GPUs only."""
    if mesh.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(branch)
        return
    for module in branch.modules():
        if isinstance(module, _BatchNorm):
            module.forward = partial(normalize_over_ranks, module)  # type: ignore[method-assign] # in place: names stay


def normalize_over_ranks(norm: _BatchNorm, x: Tensor) -> Tensor:
    """BatchNorm of x [rows, channels, ...] with the statistics of all ranks' rows, in fp32 or better."""
    if not norm.training:
        return type(norm).forward(norm, x)
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    rows, of_channels = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
    count = exact.new_full((1,), x.numel() / x.shape[1])
    total, count = SumOverRanks.apply(torch.cat([exact.sum(rows), count])).split((x.shape[1], 1))
    mean = total / count
    centered = exact - mean.view(of_channels)
    variance = SumOverRanks.apply(centered.square().sum(rows)) / count
    with torch.no_grad():
        batches, running_mean, running_var = norm.num_batches_tracked, norm.running_mean, norm.running_var
        assert (
            batches is not None and running_mean is not None and running_var is not None and norm.momentum is not None
        )
        batches += 1
        running_mean.lerp_(mean.to(running_mean.dtype), norm.momentum)
        running_var.lerp_((variance * count / (count - 1)).to(running_var.dtype), norm.momentum)
    y = centered * (variance + norm.eps).rsqrt().view(of_channels)
    if norm.affine:
        y = y * norm.weight.view(of_channels) + norm.bias.view(of_channels)
    return y.to(x.dtype)


def shard(branch: Branch, grid: DeviceMesh, trained: bool) -> None:
    """FSDP2 over a replicate x shard mesh.

    A unit is a module that is called directly: a block, head or predictor, and Prototypes, whose whole weight exists only
    within their own methods. The teacher's root and heads free their gathered parameters after forward: FSDP2 would keep
    them for a backward that never comes, and the moving average would not find the shards.
    """
    # Features are views of tokens; FSDP2 warns about writing into them, which no code does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for block in branch.backbone.blocks:
        fully_shard(block, mesh=grid)
    for top in [*branch.heads.values(), *branch.predictors.values()]:
        for module in reversed(list(top.modules())):  # children before parents
            if module is top or isinstance(module, Prototypes | ProjectionHead):
                fully_shard(module, mesh=grid, reshard_after_forward=not trained)
            if isinstance(module, Prototypes):
                register_fsdp_forward_method(module, "directions")
                register_fsdp_forward_method(module, "logits")
    fully_shard(branch, mesh=grid, reshard_after_forward=not trained)
