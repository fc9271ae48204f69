"""Bad input gets one sentence: the rule, what was got instead, and the remedy."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LARGEST = 2**53  # of any number in an option: whole numbers beyond it are not exact in fp64


def sentence(rule: str, got: object, remedy: str) -> str:
    """The one form of every complaint, in one line: what cannot be printed, as in names from files, is escaped."""
    text = f"{rule}, got {got}; {remedy}."
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def check(holds: bool, rule: str, got: object, remedy: str) -> None:
    """A ValueError unless the rule holds."""
    if not holds:
        raise ValueError(sentence(rule, got, remedy))


def check_new_folder(name: str, folder: Path) -> None:
    """A ValueError if the folder holds anything, or is a file."""
    unused = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    got = f"{folder}, which holds files" if folder.is_dir() else f"{folder}, which is a file"
    check(unused, f"{name} must be new or empty", got, "choose another")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """A ValueError unless the value is among the choices."""
    check(value in choices, f"{name} must be one of {', '.join(choices)}", repr(value), "pick one of them")


def check_least(name: str, value: float, least: float, remedy: str) -> None:
    """A ValueError if the value is below the least one."""
    check(value >= least, f"{name} must be at least {least:g}", value, remedy)


def check_positive(name: str, value: float, remedy: str) -> None:
    """A ValueError unless the value is above zero."""
    check(value > 0, f"{name} must be positive", value, remedy)


def check_numbers(options: DataclassInstance, **ranges: str) -> None:
    """A ValueError unless the fields of these names, where there are such, are numbers in these ranges, like "(0, 1]".

    Fields of type int must be whole numbers; None is right for those that may be None.
    """
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in ranges and not (value is None and "None" in str(field.type)):
            whole = re.search(r"\bint\b", str(field.type)) is not None
            name, remedy = f"{type(options).__name__}.{field.name}", f"the default is {field.default}"
            check_number(name, value, ranges[field.name], remedy, whole)


def check_number(name: str, value: object, allowed: str, remedy: str, whole: bool = False) -> None:
    """A ValueError unless the value is a number in a range such as "[0, 1)"; inf stands for LARGEST, nan is in no range."""
    low, high = (float(bound) for bound in allowed[1:-1].split(", "))
    inside = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    inside = inside and (max(low, -LARGEST) < value or (value == low and allowed[0] == "["))  # type: ignore[operator]
    inside = inside and (value < min(high, LARGEST) or (value == high and allowed[-1] == "]"))  # type: ignore[operator]
    kind = "a whole number" if whole else "a number"
    check(bool(inside), f"{name} must be {kind} in {allowed.replace('inf', '2^53')}", repr(value), remedy)


def check_tuple(name: str, values: object, count: int, allowed: str, ascending: bool = False) -> None:
    """A ValueError unless these are so many numbers in a range, as in `check_number`."""
    what = "ascending numbers" if ascending else "numbers"
    rule, remedy = f"{name} must be {count} {what}", "correct them"
    if not isinstance(values, tuple | list) or len(values) != count:
        raise ValueError(sentence(rule, repr(values), remedy))
    for number, value in enumerate(values):
        check_number(f"{name}[{number}]", value, allowed, remedy)
    check(not ascending or sorted(values) == list(values), rule, values, remedy)
