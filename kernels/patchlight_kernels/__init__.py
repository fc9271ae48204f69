"""Fast operations for patch-level self-supervised learning. Each is usable alone; see `ops/<name>/README.md`."""

from .dispatch import explain, force, force_from_environment
from .ops.class_attention.op import class_attention
from .ops.neighbor_topk.op import neighbor_topk
from .ops.prototype_ce.op import prototype_ce
from .ops.query_attention.op import query_attention

force_from_environment()

__all__ = ["class_attention", "explain", "force", "neighbor_topk", "prototype_ce", "query_attention"]
