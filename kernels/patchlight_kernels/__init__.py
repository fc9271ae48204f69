"""Fast operations for patch-level self-supervised learning. Each is usable alone; see `ops/<name>/README.md`."""

from .dispatch import explain, force, force_from_environment
from .ops.neighbor_topk.op import neighbor_topk

force_from_environment()

__all__ = ["explain", "force", "neighbor_topk"]
