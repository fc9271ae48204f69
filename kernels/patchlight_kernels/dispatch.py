"""Chooses which implementation of an op runs. The choice depends on the arguments only; it can be explained and forced.

One `Op` holds everything about an operation: its PyTorch custom ops (`patchlight::<name>_fwd`, `_bwd`), its
implementations in order of preference, and the function that checks public arguments. The order that is written in the op is a
prediction. On a GPU, an implementation that was the faster of two when measured (`measured.py`) goes before the other.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from . import hardware, measured
from .arguments import message
from .measured import Place, Win

IMPLEMENTATIONS = ("cuda", "cpp", "triton", "torch", "reference")

_library = torch.library.Library("patchlight", "FRAGMENT")
_ops: dict[str, Op] = {}
_forced: dict[str, str] = {}  # op name or "*" -> implementation name; process-wide, as backward runs on other threads


def _no_backward(*args) -> None:
    raise NotImplementedError("this op has no backward")


@dataclass(frozen=True, slots=True)
class Impl:
    """One way to compute an op. `unsupported` takes the forward's checked arguments: None, or the reason in words.

    `bwd` is chosen by the same arguments as `fwd`, perhaps of another implementation: what forwards save has one meaning.
    """

    name: str
    fwd: Callable
    unsupported: Callable[..., str | None]
    bwd: Callable = _no_backward


def _one_size(*args) -> str:
    return "any"


class Op:
    """A named operation and its implementations, preferred first.

    `bind` checks the public arguments and returns those that every implementation and `unsupported` take.
    `size(*args)` names the size class of those, as the table of measurements has it.
    """

    def __init__(
        self, name: str, bind: Callable[..., tuple], impls: tuple[Impl, ...], size: Callable[..., str] = _one_size
    ) -> None:
        names = [impl.name for impl in impls]
        if names[-1] != "reference" or not set(names) <= set(IMPLEMENTATIONS):
            rule = f"implementations must come from {IMPLEMENTATIONS} and end in 'reference'"
            raise ValueError(message(name, rule, names, "add the reference last"))
        self.name, self.bind, self.impls, self.size = name, bind, impls, size
        backward = any(impl.bwd is not _no_backward for impl in impls)
        self.directions = ("forward", "backward") if backward else ("forward",)
        self._orders: dict[Place, tuple[Impl, ...]] = {}
        _ops[name] = self

    def define(self, direction: str, schema: str, run: Callable, fake: Callable) -> Callable:
        """Registers `patchlight::<name>_<direction>`: `run` computes it, `fake` gives torch.compile its shapes and dtypes."""
        qualified = f"{self.name}_{direction}"
        _library.define(qualified + schema)
        _library.impl(qualified, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"patchlight::{qualified}", fake, lib=_library)
        return getattr(torch.ops.patchlight, qualified).default

    def differentiate(self, setup_context: Callable, backward: Callable) -> None:
        """Gives `patchlight::<name>_fwd` its gradient; `backward` should call the op's `_bwd`, one graph node."""
        qualified = f"patchlight::{self.name}_fwd"
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)

    def reasons(self, *args) -> list[tuple[Impl, str | None]]:
        """Every implementation with the reason why it cannot run here, or None."""
        return [(impl, impl.unsupported(*args)) for impl in self.impls]

    def place(self, direction: str, args: tuple) -> Place | None:
        """Where the table of measurements has these arguments; None on a CPU, for which there is none."""
        first = args[0][0] if isinstance(args[0], list) else args[0]
        architecture = hardware.architecture(first)
        if architecture is None:
            return None
        dtype = next((arg for arg in args if isinstance(arg, torch.dtype)), first.dtype)
        return Place(self.name, direction, self.size(*args), dtype, architecture)

    def order(self, direction: str, args: tuple) -> tuple[Impl, ...]:
        """The implementations, preferred first."""
        place = self.place(direction, args)
        if place is None:
            return self.impls
        if place not in self._orders:
            found = measured.find(place)
            self._orders[place] = self._with_winner_first(found[0] if found else None)
        return self._orders[place]

    def _with_winner_first(self, win: Win | None) -> tuple[Impl, ...]:
        """The predicted order, but that the form that won goes before the next one; others were not in that race."""
        names = [impl.name for impl in self.impls]
        if win and names.index(win.winner) > names.index(win.runner_up):
            names.remove(win.winner)
            names.insert(names.index(win.runner_up), win.winner)
        return tuple(sorted(self.impls, key=lambda impl: names.index(impl.name)))

    def choose(self, *args, direction: str = "forward") -> Impl:
        """The implementation that runs: the forced one or an error, else the first that can."""
        forced = _forced.get(self.name) or _forced.get("*")
        if forced is None:
            return next(impl for impl in self.order(direction, args) if impl.unsupported(*args) is None)
        for impl in self.impls:
            if impl.name == forced:
                reason = impl.unsupported(*args)
                if reason is None:
                    return impl
                raise RuntimeError(
                    f"{self.name}: {forced!r} is forced but cannot run: {reason}; force another, or none."
                )
        names = [impl.name for impl in self.impls]
        raise RuntimeError(
            message(self.name, f"the forced implementation must be one of {names}", repr(forced), "force one of those")
        )

    def forward(self, *args):
        """Runs the forward of the chosen implementation."""
        return self.choose(*args).fwd(*args)

    def why(self, direction: str, chosen: str, args: tuple) -> str:
        """Why the implementation of that name runs: forced, measured, or by prediction; empty on a CPU."""
        if _forced.get(self.name) or _forced.get("*"):
            return "forced"
        place = self.place(direction, args)
        if place is None:
            return ""
        found = measured.find(place)
        if found is None:
            size = "" if place.size == _one_size() else f", {place.size}"
            dtype = str(place.dtype).removeprefix("torch.")
            return f"order by prediction: not measured on {place.architecture} ({dtype}{size})"
        win, of_row = found
        if win.winner == chosen:
            return win.sentence(of_row)
        if win.runner_up == chosen:
            return f"{win.winner}, measured as faster, cannot run"
        return f"order by prediction: not yet measured beside {win.winner}'s {win.sentence(of_row)}"

    def explain(self, *args) -> str:
        """Which implementation runs and why, and a line for each with the reason why it does not."""
        try:
            chosen = {direction: self.choose(*args, direction=direction).name for direction in self.directions}
        except RuntimeError as error:
            chosen, heads = {}, [f"{self.name}: nothing runs: {error}"]
        else:
            told = {}
            for direction, name in chosen.items():
                why = self.why(direction, name, args)
                told[direction] = f"{name} runs" + (" (forced)" if why == "forced" else f": {why}" if why else "")
            heads = [f"{self.name}: {told['forward']}"]
            if told["forward"] != told.get("backward", told["forward"]):
                heads.append(f"{self.name} backward: {told['backward']}")
        lines = list(heads)
        for impl, reason in self.reasons(*args):
            lines.append(f"  {impl.name:<10} {self.state(impl.name, chosen, reason)}")
        return "\n".join(lines)

    def state(self, name: str, chosen: dict[str, str], reason: str | None) -> str:
        """What an implementation does: "runs", alone or in the directions in which it was chosen, or why not."""
        directions = [direction for direction, of_direction in chosen.items() if of_direction == name]
        if not directions:
            return reason or "could run"
        return "runs" if len(directions) == len(chosen) else f"runs {' and '.join(directions)}"


def ops() -> dict[str, Op]:
    """Every op by name."""
    return dict(_ops)


def triton_call(package: str, function: str) -> Callable:
    """Calls `function` of the package's triton_kernels.py, imported at the first call: Triton may not be installed.

    Triton launches on the current GPU, so the one that has the arguments is made current.
    """

    def call(*args):
        run = getattr(importlib.import_module(f"{package}.triton_kernels"), function)
        device = _device_of(args)
        if device is None or device.type != "cuda":
            return run(*args)
        with torch.cuda.device(device):
            return run(*args)

    return call


def _device_of(args: Sequence) -> torch.device | None:
    """The device of the first argument that has one; lists of tensors are searched too."""
    for arg in args:
        device = _device_of(arg) if isinstance(arg, (list, tuple)) else getattr(arg, "device", None)
        if device is not None:
            return device
    return None


def explain(name: str, *args, **kwargs) -> str:
    """Says which implementation of op `name` these public arguments would run, and why not the others."""
    if name not in _ops:
        raise ValueError(message("explain", f"the op must be one of {sorted(_ops)}", repr(name), "choose one of them"))
    op = _ops[name]
    return op.explain(*op.bind(*args, **kwargs))


@contextlib.contextmanager
def force(everywhere: str | None = None, /, **by_op: str) -> Iterator[None]:
    """Within the block an op runs the named implementation, or raises: `force("triton")`, `force(neighbor_topk="cpp")`.

    The setting belongs to the process, so that it also holds for a backward on another thread.
    """
    requested = dict(by_op) if everywhere is None else {"*": everywhere, **by_op}
    _check_forced("force", requested)
    saved = dict(_forced)
    _forced.update(requested)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(saved)


def _check_forced(setting: str, requested: dict[str, str]) -> None:
    for name, impl in requested.items():
        if name != "*" and name not in _ops:
            rule = f"an op must be one of {sorted(_ops)}, or '*' for all"
            raise ValueError(message(setting, rule, repr(name), "choose one of them"))
        if impl not in IMPLEMENTATIONS:
            rule = f"the implementation of {name} must be one of {IMPLEMENTATIONS}"
            raise ValueError(message(setting, rule, repr(impl), "choose one of them"))


def force_from_environment() -> None:
    """Reads `PATCHLIGHT_IMPL="*=triton,prototype_ce=cuda"`; called once, when every op is registered."""
    text = os.environ.get("PATCHLIGHT_IMPL", "").strip()
    requested = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, impl = item.partition("=")
        if not equals:
            rule, remedy = "each setting must be op=implementation", "write e.g. '*=triton' or 'neighbor_topk=cpp'"
            raise ValueError(message("PATCHLIGHT_IMPL", rule, repr(item), remedy))
        requested[name.strip()] = impl.strip()
    _check_forced("PATCHLIGHT_IMPL", requested)
    _forced.update(requested)


def first_reason(*reasons: str | None) -> str | None:
    """The first reason, or None if there is none."""
    return next((reason for reason in reasons if reason), None)
