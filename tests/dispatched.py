"""The operations that code dispatches, in order: what would be launched on a GPU, at least once each."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

WITHOUT_A_KERNEL = (
    "aten::empty",
    "aten::new_empty",
    "aten::_unsafe_view",
    "aten::promote_types",
    "aten::scalar_tensor",
)


class Dispatched(TorchDispatchMode):
    """Within the block, `names` gets the name of every operation that is not a view and does not only reserve memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        only_view = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
        if not only_view and not name.startswith(WITHOUT_A_KERNEL):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    def casts(self) -> int:
        return sum(name.startswith("aten::_to_copy") for name in self.names)


def dispatched(function: Any, *args: Any) -> tuple[Any, Dispatched]:
    """What the function returns, and the operations that it dispatched."""
    with Dispatched() as counter:
        result = function(*args)
    return result, counter
