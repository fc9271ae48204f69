"""A recorder for the CPU that does what a CUDA graph does: it repeats operations on the same tensors, without Python."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What waits for the device on a GPU, which a CUDA graph cannot record.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique")


class Tape(TorchDispatchMode):
    """Records operations with their arguments. A second run writes its results where the first run put them.

    So every tensor that was made during the recording stays, and numbers are those of the recording.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(name in str(function) for name in WAITS):
            raise RuntimeError(f"{function} waits for the device")
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors_of((args, kwargs))}
        result = function(*args, **kwargs)
        made = [t for t in tensors_of(result) if t.untyped_storage().data_ptr() not in given]
        changes = made or function._schema.is_mutable or function.namespace == "c10d"
        if changes and function.namespace != "profiler":
            self.operations.append((function, args, kwargs, made))
        return result

    def run(self) -> None:
        for function, args, kwargs, made in self.operations:
            result = function(*args, **kwargs)
            if function.namespace == "c10d":
                result[-1].wait()
            given = {tensor.untyped_storage().data_ptr() for tensor in tensors_of((args, kwargs))}
            again = [t for t in tensors_of(result) if t.untyped_storage().data_ptr() not in given]
            for old, new in zip(made, again, strict=True):
                old.copy_(new)


class TapeRecorder:
    """`graph.Recorder` on a tape. Recording runs the operations too, so the first replay does nothing."""

    def __init__(self) -> None:
        self.launches = self.replays = 0
        self.tape: Tape | None = None

    def launch(self, call: Callable):
        self.launches += 1
        return call()

    def record(self, call: Callable):
        assert self.tape is None, "recorded twice"
        self.tape = Tape()
        with self.tape:
            return call()

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        if self.replays > 1:
            self.tape.run()


def tensors_of(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class OperationStream(TorchDispatchMode):
    """The operations that run, with all arguments that are not tensors, and the shapes of those that are."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace != "profiler":
            self.operations.append(f"{function} {describe(args)} {describe(kwargs or {})}")
        return function(*args, **(kwargs or {}))


def describe(value) -> str:
    """A value as text; of a tensor its dtype and shape, and of one without dimensions made on the host, its number."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, dict):
        return str({name: describe(item) for name, item in value.items()})
    if isinstance(value, list | tuple):
        return str([describe(item) for item in value])
    return repr(value)
