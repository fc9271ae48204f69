"""Which implementation of an op runs: a pure function of its arguments that can be asked why, and can be forced.

One `Op` owns everything about an operation: its PyTorch custom ops (`patchlight::<name>_fwd`, `_bwd`), its
implementations in order of preference, and the function that turns public arguments into raw ones.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

IMPLEMENTATIONS = ("cuda", "cpp", "triton", "reference")

_library = torch.library.Library("patchlight", "FRAGMENT")
_ops: dict[str, Op] = {}
_forced: dict[str, str] = {}  # op name or "*" -> implementation name; process-wide, as backward runs on other threads


@dataclass(frozen=True, slots=True)
class Impl:
    """One way to compute an op. `unsupported` sees the forward's raw arguments: None, or the reason in words.

    `bwd` is chosen by the same arguments as `fwd`, so one implementation serves both directions.
    """

    name: str
    fwd: Callable
    unsupported: Callable[..., str | None]
    bwd: Callable | None = None


class Op:
    """A named operation and its implementations, preferred first.

    `bind` validates the public arguments and returns the raw ones, which every implementation and `unsupported` take.
    """

    def __init__(self, name: str, bind: Callable[..., tuple], impls: tuple[Impl, ...]) -> None:
        names = [impl.name for impl in impls]
        if names[-1] != "reference" or not set(names) <= set(IMPLEMENTATIONS):
            raise ValueError(
                f"{name}: implementations must come from {IMPLEMENTATIONS} and end in 'reference', got {names}"
            )
        self.name, self.bind, self.impls = name, bind, impls
        _ops[name] = self

    def define(self, direction: str, schema: str, run: Callable, fake: Callable) -> Callable:
        """Registers `patchlight::<name>_<direction>`: one graph node for the compiler, `run` for everybody else."""
        qualified = f"{self.name}_{direction}"
        _library.define(qualified + schema)
        _library.impl(qualified, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"patchlight::{qualified}", fake, lib=_library)
        return getattr(torch.ops.patchlight, qualified).default

    def differentiate(self, setup_context: Callable, backward: Callable) -> None:
        """Gives `patchlight::<name>_fwd` its gradient; `backward` should call the op's `_bwd`, so that it is one node too."""
        qualified = f"patchlight::{self.name}_fwd"
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)

    def ladder(self, *raw) -> list[tuple[Impl, str | None]]:
        """Every implementation with the reason that keeps it from running here, or None."""
        return [(impl, impl.unsupported(*raw)) for impl in self.impls]

    def choose(self, *raw) -> Impl:
        """The implementation that runs: the forced one or an error, else the first that can."""
        forced = _forced.get(self.name) or _forced.get("*")
        if forced is None:
            return next(impl for impl in self.impls if impl.unsupported(*raw) is None)
        for impl in self.impls:
            if impl.name == forced:
                reason = impl.unsupported(*raw)
                if reason is None:
                    return impl
                raise RuntimeError(
                    f"{self.name}: {forced!r} is forced but cannot run: {reason}. Lift the force, or meet it."
                )
        raise RuntimeError(
            f"{self.name}: {forced!r} is forced but this op has only {[impl.name for impl in self.impls]}. Force one of those."
        )

    def explain(self, *raw) -> str:
        """The ladder in words, one line per implementation."""
        try:
            chosen = self.choose(*raw).name
        except RuntimeError as error:
            chosen, head = None, f"{self.name}: nothing runs: {error}"
        else:
            forced = _forced.get(self.name) or _forced.get("*")
            head = f"{self.name}: {chosen} runs" + (" (forced)" if forced else "")
        lines = [head]
        for impl, reason in self.ladder(*raw):
            state = "runs" if impl.name == chosen else (reason or "could run")
            lines.append(f"  {impl.name:<10} {state}")
        return "\n".join(lines)


def ops() -> dict[str, Op]:
    """Every op by name."""
    return dict(_ops)


def explain(name: str, *args, **kwargs) -> str:
    """Says which implementation of op `name` these public arguments would run, and why not the others."""
    if name not in _ops:
        raise ValueError(f"explain: no op is called {name!r}; there are {sorted(_ops)}")
    op = _ops[name]
    return op.explain(*op.bind(*args, **kwargs))


@contextlib.contextmanager
def force(everywhere: str | None = None, /, **by_op: str) -> Iterator[None]:
    """Within the block an op runs the named implementation, or raises: `force("triton")`, `force(neighbor_topk="cpp")`.

    The setting belongs to the process, so that a backward on another thread obeys it too.
    """
    requested = dict(by_op) if everywhere is None else {"*": everywhere, **by_op}
    _check_forced(requested)
    saved = dict(_forced)
    _forced.update(requested)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(saved)


def _check_forced(requested: dict[str, str]) -> None:
    for name, impl in requested.items():
        if name != "*" and name not in _ops:
            raise ValueError(f"no op is called {name!r}; there are {sorted(_ops)}, or '*' for all")
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"{name}={impl}: no implementation is called {impl!r}; choose from {IMPLEMENTATIONS}")


def force_from_environment() -> None:
    """Reads `PATCHLIGHT_IMPL="*=triton,prototype_ce=cuda"`; called once, when every op is registered."""
    text = os.environ.get("PATCHLIGHT_IMPL", "").strip()
    requested = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, impl = item.partition("=")
        if not equals:
            raise ValueError(
                f"PATCHLIGHT_IMPL: {item!r} is not op=implementation; write e.g. '*=triton' or 'neighbor_topk=cpp'"
            )
        requested[name.strip()] = impl.strip()
    try:
        _check_forced(requested)
    except ValueError as error:
        raise ValueError(f"PATCHLIGHT_IMPL: {error}") from None
    _forced.update(requested)


def first_reason(*reasons: str | None) -> str | None:
    """The first obstacle, or None if there is none."""
    return next((reason for reason in reasons if reason), None)
