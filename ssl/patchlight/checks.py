"""Bad input gets one sentence: the rule, what was got instead, and the remedy."""

from __future__ import annotations

from collections.abc import Collection


def sentence(rule: str, got: object, remedy: str) -> str:
    """The one form of every complaint."""
    return f"{rule}, got {got}; {remedy}."


def check(holds: bool, rule: str, got: object, remedy: str) -> None:
    """A ValueError unless the rule holds."""
    if not holds:
        raise ValueError(sentence(rule, got, remedy))


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """A ValueError unless the value is among the choices."""
    check(value in choices, f"{name} must be one of {', '.join(choices)}", repr(value), "pick one of them")


def check_least(name: str, value: float, least: float, remedy: str) -> None:
    """A ValueError if the value is below the least one."""
    check(value >= least, f"{name} must be at least {least:g}", value, remedy)


def check_positive(name: str, value: float, remedy: str) -> None:
    """A ValueError unless the value is above zero."""
    check(value > 0, f"{name} must be positive", value, remedy)
