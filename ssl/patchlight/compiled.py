"""What torch.compile may keep as a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def constant_when_compiled(function: F) -> F:
    """What torch.compiler.assume_constant_result does, without its import of the compiler, which takes a second or more."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
