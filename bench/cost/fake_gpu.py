"""A GPU that is not there: tensors on device "cuda" with shapes and no values, and code that runs as it would on a GPU.

Tensors on the CPU stay real, so what the host computes is computed. A number that the host reads from the device is 0 here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack
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
        kwargs = dict(kwargs or {})
        if kwargs.get("pin_memory"):  # needs a driver
            kwargs["pin_memory"] = False
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


class FakeStream:
    """A stream or an event: nothing waits here."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    wait_event = wait_stream
    wait = record_event = record

    def synchronize(self) -> None:
        pass


MODES: list[Any] = []  # those that were active before `without_modes`


@contextlib.contextmanager
def without_modes(backward: bool = False) -> Iterator[None]:
    """For PyTorch's compiler, which traces nothing while a mode of ours is active; a backward may make tensors of its own."""
    before = [*MODES]
    MODES[:] = _get_current_dispatch_mode_stack() or before
    try:
        with _disable_current_modes(), FakeGpu.fakes if backward else contextlib.nullcontext():
            yield
    finally:
        MODES[:] = before


@contextlib.contextmanager
def with_modes() -> Iterator[None]:
    """Within `without_modes`: what runs here is counted again."""
    with contextlib.ExitStack() as stack:
        for mode in MODES:
            stack.enter_context(mode)
        yield


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
            (torch.cuda, "Stream", FakeStream),
            (torch.cuda, "Event", FakeStream),
            (torch.cuda, "current_stream", FakeStream),
            (torch.cuda, "stream", lambda *_: contextlib.nullcontext()),
            (torch.cuda, "synchronize", lambda *_: None),
            (torch.Tensor, "pin_memory", lambda x, *_: x),
            (torch.cuda, "get_device_properties", lambda *_: HOPPER),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (adam, "_device_dtype_check_for_fused", lambda *_, **__: None),
            (F, "scaled_dot_product_attention", attention),
            (torch.Tensor, "backward", backward),
            (torch.autograd, "grad", gradients),
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
    """Gradients of all leaves, as `Tensor.backward` leaves them."""
    given = torch.ones_like(root) if gradient is None else gradient
    with torch.no_grad():
        for (node, _slot), found in propagate([(root, given)]).items():
            if hasattr(node, "variable"):
                leaf = node.variable
                leaf.grad = found.detach() if leaf.grad is None else leaf.grad + found


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor | None], **_: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs, as `torch.autograd.grad` returns them while PyTorch's compiler traces a backward."""
    places = [place_of(x) for x in inputs]
    roots = [(output, given) for output, given in zip(outputs, grad_outputs, strict=True) if given is not None]
    with torch.no_grad():
        found = propagate(roots, places)
    return tuple(found.get(place) for place in places)


Place = tuple[Node, int]  # a node of the graph, and the number of its output


def place_of(x: Tensor) -> Place:
    """Where the gradient of a tensor arrives: for a leaf, the node that would keep it."""
    if x.grad_fn is not None:
        return x.grad_fn, x.output_nr
    with torch.enable_grad():
        behind = x.view_as(x).grad_fn
    assert behind is not None and behind.next_functions[0][0] is not None
    return behind.next_functions[0][0], 0


def propagate(roots: Sequence[tuple[Tensor, Tensor]], keep: Sequence[Place] | None = None) -> dict[Place, Tensor]:
    """What arrives at `keep`, or else at all leaves; node by node as PyTorch's engine does, which refuses a missing device."""
    found: dict[Place, Tensor] = {}
    received: dict[Node, dict[int, Tensor]] = {}
    for root, given in roots:
        add_to(received.setdefault(place_of(root)[0], {}), place_of(root)[1], given)
    waiting = count_uses(list(received))
    kept = {(node, 0) for node in waiting if hasattr(node, "variable")} if keep is None else set(keep)
    needed = before(kept, list(waiting))
    ready = [node for node in received if not waiting[node]]
    while ready:
        ready.sort(key=lambda node: node._sequence_nr())
        node = ready.pop()
        slots = received.pop(node, {})
        found.update({(node, slot): x for slot, x in slots.items() if (node, slot) in kept})
        outputs = run_node(node, slots) if node in needed else ()
        for position, (following, slot) in enumerate(node.next_functions):
            if following is None:
                continue
            output = outputs[position] if outputs else None
            if output is not None:
                add_to(received.setdefault(following, {}), slot, fitted(output, following._input_metadata[slot]))
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)
    return found


def add_to(slots: dict[int, Tensor], slot: int, gradient: Tensor) -> None:
    slots[slot] = slots[slot] + gradient if slot in slots else gradient


def count_uses(roots: Sequence[Node]) -> dict[Node, int]:
    """How many gradients each node behind the roots waits for."""
    uses = dict.fromkeys(roots, 0)
    stack = list(roots)
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is None:
                continue
            if following not in uses:
                uses[following] = 0
                stack.append(following)
            uses[following] += 1
    return uses


def before(kept: set[Place], nodes: Sequence[Node]) -> set[Node]:
    """The nodes that lead to a place that is kept."""
    users: dict[Node, list[Node]] = {}
    for node in nodes:
        for following, _ in node.next_functions:
            if following is not None:
                users.setdefault(following, []).append(node)
    found: set[Node] = set()
    stack = [node for node, _ in kept]
    while stack:
        for user in users.get(stack.pop(), []):
            if user not in found:
                found.add(user)
                stack.append(user)
    return found


def run_node(node: Node, received: dict[int, Tensor]) -> tuple:
    """The gradients of a node's inputs."""
    if not received:
        return ()
    given = [received.get(number) for number in range(len(node._input_metadata))]
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # defined in Python
        with (
            without_modes(backward=True)
            if type(node).__name__ == "CompiledFunctionBackward"
            else contextlib.nullcontext()
        ):
            outputs = node.apply(*given)
    else:
        outputs = node(*given)  # type: ignore[operator]  # the stub leaves it out
    return outputs if isinstance(outputs, tuple) else (outputs,)


def fitted(gradient: Tensor, wanted: Any) -> Tensor:
    """The gradient in the shape and dtype of what it belongs to, as the engine makes it: summed where that was broadcast."""
    if gradient.shape != wanted.shape:
        gradient = gradient.sum_to_size(wanted.shape)
    return gradient if gradient.dtype == wanted.dtype else gradient.to(wanted.dtype)
