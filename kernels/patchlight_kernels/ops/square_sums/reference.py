"""The specification of square_sums in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...arguments import accumulator


def square_sums_fwd(tensors: list[Tensor]) -> Tensor:
    """[P] the sum of squares of each tensor, in fp32 or better."""
    dtype = accumulator(tensors[0].dtype)
    return torch.stack([tensor.to(dtype).square().sum() for tensor in tensors])
