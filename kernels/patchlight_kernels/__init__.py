"""Fast operations for patch-level self-supervised learning. Each is usable alone; `ops/<name>/README.md` describes it."""

from .dispatch import explain, force, force_from_environment
from .ops.adamw.op import adamw
from .ops.block_masks.op import block_masks
from .ops.class_attention.op import class_attention
from .ops.neighbor_topk.op import neighbor_topk
from .ops.photometric.op import photometric
from .ops.photometric.table import JITTER_ORDERS, PHOTOMETRIC_COLUMNS
from .ops.prototype_ce.op import prototype_ce
from .ops.query_attention.op import query_attention
from .ops.self_relation.op import self_relation
from .ops.square_sums.op import square_sums

__version__ = "0.1.0"  # of both packages: pyproject.toml and patchlight read it here

force_from_environment()

__all__ = [
    "JITTER_ORDERS",
    "PHOTOMETRIC_COLUMNS",
    "__version__",
    "adamw",
    "block_masks",
    "class_attention",
    "explain",
    "force",
    "neighbor_topk",
    "photometric",
    "prototype_ce",
    "query_attention",
    "self_relation",
    "square_sums",
]
