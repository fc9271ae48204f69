"""The values of settings: read from the plain data of a file, or from the words of a command line, by their types."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .checks import check, sentence

NONE_WORDS, BOOLS = ("none", "None"), {"true": True, "false": False, "True": True, "False": False}


def similar(word: str, known: Iterable[str]) -> list[str]:
    """The names that look like a word, at most three."""
    return get_close_matches(word, list(known), n=3, cutoff=0.6)


def nearest(word: str, known: Iterable[str], otherwise: str) -> str:
    """A remedy for a name that does not exist: the names that look like it."""
    found = similar(word, known)
    return f"perhaps {' or '.join(found)} is meant" if found else otherwise


def is_optional(kind: Any) -> bool:
    """Whether None is among the values of a type."""
    return get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind)


def without_none(kind: Any) -> Any:
    """The type beside None of an optional one, or the type itself."""
    return next(part for part in get_args(kind) if part is not type(None)) if is_optional(kind) else kind


def item_of(kind: Any) -> Any:
    """The type of the items of a tuple of any length; None for all other types."""
    arguments = get_args(kind)
    return arguments[0] if get_origin(kind) is tuple and len(arguments) == 2 and arguments[1] is ... else None


def words_of(kind: Any) -> int | None:
    """How many words a value takes on a command line; None: any number."""
    kind = without_none(kind)
    if item_of(kind) is not None or get_origin(kind) is dict:
        return None
    if get_origin(kind) is tuple:
        return sum(words_of(part) or 1 for part in get_args(kind))
    return 1


def described(kind: Any) -> str:
    """A type in words, for a rule."""
    if is_optional(kind):
        return f"{described(without_none(kind))}, or none"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if item_of(kind) is not None:
        return f"any number of values, each {described(item_of(kind))}"
    if get_origin(kind) is tuple:
        return f"{len(get_args(kind))} values, each {described(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return f"names, each with {described(get_args(kind)[1])}"
    simple = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
    return simple.get(kind, "a group of settings")


def shown(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, dict):
        return " ".join(f"{key} {shown(item)}" for key, item in value.items())
    if isinstance(value, tuple | list):
        return " ".join(map(shown, value))
    if value is None or value == "":
        return "none" if value is None else "''"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def from_words(kind: Any, words: Sequence[str], name: str, example: str) -> Any:
    """The value that words stand for; an error that names the setting as it was typed."""
    try:
        return _from_words(kind, list(words))
    except ValueError:
        remedy = f"for example {name} {example}" if example not in ("", "''", "none") else "see --help-all"
        got = " ".join(map(repr, words)) or "nothing"
        raise ValueError(sentence(f"{name} must be {described(kind)}", got, remedy)) from None


def _from_words(kind: Any, words: list[str]) -> Any:
    if is_optional(kind):
        return None if len(words) == 1 and words[0] in NONE_WORDS else _from_words(without_none(kind), words)
    item, count = item_of(kind), words_of(kind)
    if item is not None:
        return () if words in ([word] for word in NONE_WORDS) else tuple(_pieces(item, words))
    if get_origin(kind) is dict:
        if len(words) % 2:
            raise ValueError
        values = get_args(kind)[1]
        return {key: _from_words(values, [word]) for key, word in zip(words[::2], words[1::2], strict=True)}
    if len(words) != count:
        raise ValueError
    if get_origin(kind) is tuple:
        return tuple(_from_words(part, [word]) for part, word in zip(get_args(kind), words, strict=True))
    return _from_word(kind, words[0])


def _pieces(item: Any, words: list[str]) -> list[Any]:
    size = words_of(item) or 1
    return [_from_words(item, words[start : start + size]) for start in range(0, len(words), size)]


def _from_word(kind: Any, word: str) -> Any:
    if kind is bool or get_origin(kind) is Literal:
        choices = BOOLS if kind is bool else {str(choice): choice for choice in get_args(kind)}
        if word not in choices:
            raise ValueError
        return choices[word]
    return kind(word)


class Reader:
    """Makes typed values from what JSON and YAML have. Keys that it does not know are errors; those that a file lacks
    and that have a default are collected in `defaults`."""

    def __init__(self, source: str, class_of: Callable[[type, dict, str], type]) -> None:
        """source: what is read, for messages. class_of: the class to build for a class that has several, removing from
        the values what names it."""
        self.source, self.class_of = source, class_of
        self.defaults: list[str] = []

    def read(self, kind: Any, value: Any, path: str = "") -> Any:
        """The value as the type says; an error names its path."""
        if is_optional(kind):
            return None if value is None else self.read(without_none(kind), value, path)
        if is_dataclass(kind):
            return self._read_class(kind, value, path)  # type: ignore[arg-type]  # a class, not an instance
        if get_origin(kind) is tuple:
            self._check(isinstance(value, list | tuple), kind, value, path)
            item, parts = item_of(kind), get_args(kind)
            self._check(item is not None or len(value) == len(parts), kind, value, path)
            kinds = [item] * len(value) if item is not None else parts
            return tuple(self.read(k, v, f"{path}.{i}") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
        if get_origin(kind) is dict:
            self._check(isinstance(value, dict), kind, value, path)
            return {str(key): self.read(get_args(kind)[1], item, f"{path}.{key}") for key, item in value.items()}
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if kind is Path and isinstance(value, str):
            return Path(value)
        self._check(type(value) is kind, kind, value, path)
        return value

    def _read_class(self, kind: type, value: Any, path: str) -> Any:
        self._check(isinstance(value, dict), kind, value, path)
        values, dot = dict(value), f"{path}." if path else ""
        kind = self.class_of(kind, values, f"{self.source}: {path}")
        known, kinds = {field.name: field for field in fields(kind)}, get_type_hints(kind)
        for name in values:
            remedy = nearest(str(name), list(known), f"it may have {', '.join(known)}")
            check(name in known, f"{self.source}: {path or 'it'} must have known settings", f"{dot}{name}", remedy)
        lacking = [name for name in known if name not in values]
        for name in lacking:
            has_default = known[name].default is not MISSING or known[name].default_factory is not MISSING
            check(
                has_default, f"{self.source}: {dot}{name} must be there", "nothing", f"it is {described(kinds[name])}"
            )
        self.defaults += [f"{dot}{name}" for name in lacking]
        return kind(**{name: self.read(kinds[name], item, f"{dot}{name}") for name, item in values.items()})

    def _check(self, holds: bool, kind: Any, value: Any, path: str) -> None:
        rule = f"{self.source}: {path or 'it'} must be {described(kind)}"
        check(holds, rule, repr(value), "write it as a run's run.json does")
