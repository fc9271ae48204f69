"""A GPU that is not there: tensors on device "cuda" with shapes and no values, and code that runs as it would on a GPU.

Tensors on the CPU stay real, so what the host computes is computed. A number that the host reads from the device is 0 here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .our_ops import gpu_has_everything

GPU = torch.device("cuda", 0)
HOPPER = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141 << 30, warp_size=32,
    shared_memory_per_block_optin=227 << 10, shared_memory_per_block=48 << 10, L2_cache_size=60 << 20,
    shared_memory_per_multiprocessor=228 << 10, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
    gcnArchName="",
)  # fmt: skip


class FakeGpu(TorchDispatchMode):
    """Operations that touch the device run on fake tensors, all others for real."""

    fakes = FakeTensorMode(allow_non_fake_inputs=True)  # one for the process: code may keep tensors between two runs

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "prim":  # asks a tensor for its device
            return function(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        device = kwargs.get("device")
        on_gpu = (device is not None and torch.device(device).type == "cuda") or any(
            isinstance(leaf, FakeTensor) for leaf in leaves
        )
        if not on_gpu:
            return function(*args, **kwargs)
        if function is torch.ops.aten._local_scalar_dense.default:
            return {torch.bool: False}.get(args[0].dtype, 0.0 if args[0].dtype.is_floating_point else 0)
        with self.fakes:
            return function(*args, **kwargs)


@contextlib.contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Within the block there is a GPU, number 0; autocast, attention and fused optimizers do on it what a real one does."""
    amp = import_module("torch.cuda.amp.common")
    adam = import_module("torch.optim.adam")
    mode = FakeGpu()
    with contextlib.ExitStack() as stack:
        for where, name, stand_in in (
            (amp, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "get_device_properties", lambda *_: HOPPER),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (adam, "_device_dtype_check_for_fused", lambda *_, **__: None),
            (F, "scaled_dot_product_attention", attention),
            (torch.Tensor, "backward", backward),
            (torch, "tensor", functools.partial(tensor, torch.tensor)),
            (torch.Tensor, "new_tensor", new_tensor),
            (torch, "as_tensor", functools.partial(tensor, torch.as_tensor)),
            *gpu_has_everything(),
        ):
            stack.enter_context(mock.patch.object(where, name, stand_in, create=True))
        yield stack.enter_context(mode)


def tensor(make: Callable, data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
    """A tensor from numbers of the host: made there, then copied to its device."""
    made = make(data, **kwargs)
    return made if device is None else made.to(device)


def new_tensor(like: Tensor, data: Any, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
    return torch.tensor(data, dtype=dtype or like.dtype, device=device or like.device)


def attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: None = None, dropout_p: float = 0.0, is_causal: bool = False, **_: Any
) -> Tensor:
    """The attention that PyTorch chooses on Hopper: cuDNN's in 16 bits, else the one that saves memory."""
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.dtype == torch.float32:
        call = torch.ops.aten._scaled_dot_product_efficient_attention
        return call(q, k, v, attn_mask, trained, dropout_p, is_causal)[0]
    call = torch.ops.aten._scaled_dot_product_cudnn_attention
    return call(q, k, v, attn_mask, trained, dropout_p, is_causal, False)[0]


def backward(root: Tensor, gradient: Tensor | None = None, **_: Any) -> None:
    """Gradients of all leaves, node by node in the order of PyTorch's engine, which refuses a device that is not there."""
    assert root.grad_fn is not None
    waiting = count_uses(root.grad_fn)
    received: dict[Node, dict[int, Tensor]] = {
        root.grad_fn: {0: torch.ones_like(root) if gradient is None else gradient}
    }
    ready = [root.grad_fn]
    with torch.no_grad():
        while ready:
            ready.sort(key=lambda node: node._sequence_nr())
            node = ready.pop()
            outputs = run_node(node, received.pop(node, {}))
            for position, (following, slot) in enumerate(node.next_functions):
                if following is None:
                    continue
                output = outputs[position] if outputs else None
                if output is not None:
                    output = fitted(output, following._input_metadata[slot])
                    slots = received.setdefault(following, {})
                    slots[slot] = slots[slot] + output if slot in slots else output
                waiting[following] -= 1
                if not waiting[following]:
                    ready.append(following)


def count_uses(root: Node) -> dict[Node, int]:
    """How many gradients each node behind the root waits for."""
    uses: dict[Node, int] = {root: 0}
    stack = [root]
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is None:
                continue
            if following not in uses:
                uses[following] = 0
                stack.append(following)
            uses[following] += 1
    return uses


def run_node(node: Node, gradients: dict[int, Tensor]) -> tuple:
    """The gradients of a node's inputs; a leaf keeps its gradient."""
    if not gradients:
        return ()
    if hasattr(node, "variable"):
        leaf = node.variable
        leaf.grad = gradients[0].detach() if leaf.grad is None else leaf.grad + gradients[0]
        return ()
    given = [gradients.get(number) for number in range(len(node._input_metadata))]
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # defined in Python
        outputs = node.apply(*given)
    else:
        outputs = node(*given)  # type: ignore[operator]  # the stub leaves it out
    return outputs if isinstance(outputs, tuple) else (outputs,)


def fitted(gradient: Tensor, wanted: Any) -> Tensor:
    """The gradient in the shape and dtype of what it belongs to, as the engine makes it: summed where that was broadcast."""
    if gradient.shape != wanted.shape:
        gradient = gradient.sum_to_size(wanted.shape)
    return gradient if gradient.dtype == wanted.dtype else gradient.to(wanted.dtype)
