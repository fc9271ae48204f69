"""A sharded tensor and the piece of it that this process holds."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's piece of a tensor: the tensor itself where nothing is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(piece: Tensor, whole: Tensor) -> Tensor:
    """A local piece as a tensor sharded like `whole`, the inverse of `local`."""
    if not isinstance(whole, DTensor):
        return piece
    return DTensor.from_local(
        piece, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
