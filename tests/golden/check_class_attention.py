"""SelfPatch's recorded class attention, one block and one whole head, in every implementation of the op."""

import copy

from harness import CHECKS, Case, check
from parity import HAS_GPU, running

OURS = ("selfpatch_ca_block_short", "selfpatch_head_loc_true_6x6_dim24_k4")


@check(*OURS)
def in_every_implementation(case: Case) -> None:
    """The same comparison as for the other files of the kind (the longest shorter prefix), once per implementation."""
    compare = CHECKS[max((name for name in CHECKS if case.name.startswith(name) and name not in OURS), key=len)]
    cuda = () if "head" in case.name else ("cuda",)  # a whole head takes the CUDA kernels ten seconds on CPU threads
    for name in ("reference", "cpp", *cuda) + (() if HAS_GPU else ("triton",)):
        with running("cpu", name):
            compare(copy.deepcopy(case))  # a comparison leaves gradients behind
