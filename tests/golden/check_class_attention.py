"""SelfPatch's recorded class attention, a block and a whole head, in every implementation of the op."""

import copy

from harness import CHECKS, Case, check
from parity import HAS_GPU, running

CASES = ("selfpatch_ca_block_short", "selfpatch_head_loc_true_6x6_dim24_k4")


@check(*CASES)
def in_every_implementation(case: Case) -> None:
    """The comparison of the other files of this kind (their prefix is shorter), once per implementation."""
    compare = CHECKS[max((name for name in CHECKS if case.name.startswith(name) and name not in CASES), key=len)]
    cuda = () if "head" in case.name else ("cuda",)  # for a whole head, ten seconds on CPU threads
    for name in ("reference", "cpp", *cuda) + (() if HAS_GPU else ("triton",)):
        with running("cpu", name):
            compare(copy.deepcopy(case))  # a comparison leaves gradients behind
