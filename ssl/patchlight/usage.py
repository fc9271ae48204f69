"""How command lines are read: flags for every setting of a function or of a frozen dataclass, help, and what is wrong in words
that were typed."""

from __future__ import annotations

import errno
import inspect
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from .checks import check, sentence
from .values import BOOLS, NONE_WORDS, described, from_words, item_of, nearest, shown, words_of

WRONG_USAGE, FAILED = 2, 1  # exit codes: the command line or a file of settings is wrong; what was started failed
POSITIONAL, FLAT = "positional", "flat"  # marks in Annotated: a word without a flag; a group whose flags have no prefix
HELP, HELP_ALL = ("-h", "--help"), "--help-all"


@dataclass(frozen=True)
class Choice:
    """A mark in Annotated: a word chooses the class of a group, whose flags have no prefix."""

    classes: Mapping[str, type]
    default: Callable[[type, Sequence[str]], Any] | None = None
    """The group that flags change, for the chosen class and all words typed; by default the class without arguments."""


@dataclass(frozen=True)
class Start:
    """A mark in Annotated: the group that flags change depends on all words typed, as on those after another flag."""

    default: Callable[[Sequence[str]], Any]


@dataclass(frozen=True)
class Commands:
    """A command whose own first word is one of several commands."""

    about: str
    functions: Mapping[str, Callable]


@dataclass(frozen=True)
class Nothing:
    """A group without settings, until a word chooses its class."""


class Ended(SystemExit):
    """The end of a command, after its sentence was printed."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Setting:
    """Something that a command line can set."""

    path: tuple[str, ...]
    kind: Any
    default: Any
    flag: str
    owner: type | None = None
    """The class that has it; None for a parameter."""
    positional: bool = False
    optional_group: bool = False
    """A tuple of groups: all that can be said of it as a whole is that there are none."""


def word_after(flag: str, words: Sequence[str], otherwise: str = "") -> str:
    """What was typed after a flag, before any flag is read."""
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == flag:
            return value if equals else next(iter(words[number + 1 :]), otherwise)
    return otherwise


def as_flag(path: Sequence[str]) -> str:
    return "--" + ".".join(part.replace("_", "-") for part in path)


def settings_of(kind: type, default: Any, path: tuple[str, ...] = (), flag: tuple[str, ...] = ()) -> list[Setting]:
    """The settings of a dataclass; default: an instance, or MISSING."""
    kind = kind if default is MISSING else type(default)
    kinds, found = get_type_hints(kind, include_extras=True), []
    for field in fields(kind):
        names = (*path, field.name), (*flag, field.name)
        found += _settings_of_value(kinds[field.name], _default_of(field, default), *names, kind)
    return found


def _settings_of_value(
    kind: Any, default: Any, path: tuple[str, ...], flag: tuple[str, ...], owner: type | None = None
) -> list[Setting]:
    kind, marks = _unmarked(kind)
    if FLAT in marks:
        flag = ()
    if is_dataclass(kind):
        return settings_of(kind, default, path, flag)  # type: ignore[arg-type]  # a class
    item = item_of(kind)
    if item is not None and is_dataclass(item):
        found = [Setting(path, kind, default, as_flag(flag), owner, optional_group=True)]
        for number, group in enumerate(default):
            found += settings_of(item, group, (*path, str(number)), (*flag, str(number)))  # type: ignore[arg-type]
        return found
    return [Setting(path, kind, default, as_flag(flag), owner, positional=POSITIONAL in marks)]


def _default_of(field: Any, group: Any) -> Any:
    if group is not MISSING:
        return getattr(group, field.name)
    return field.default if field.default_factory is MISSING else field.default_factory()


def _unmarked(kind: Any) -> tuple[Any, tuple]:
    """A type without its marks, and the marks."""
    return (get_args(kind)[0], get_args(kind)[1:]) if get_origin(kind) is Annotated else (kind, ())


@cache
def texts_of(kind: type) -> dict[str, str]:
    """What a class says about each of its fields: below the field, beside it, or in the class's own text."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if not is_dataclass(owner):
            continue
        found |= texts_in(inspect.getdoc(owner) or "")
        source = inspect.getsource(owner)
        found |= dict(re.findall(r"^    (\w+): .*?  # (?!noqa|type:)(.+)$", source, re.MULTILINE))
        found |= dict(re.findall(r'^    (\w+): .*\n    """((?:[^"]|"(?!""))+)"""', source, re.MULTILINE))
    return {name: " ".join(text.split()) for name, text in found.items()}


def texts_in(doc: str) -> dict[str, str]:
    """name: text, for each argument that a docstring explains."""
    found = re.findall(r"^( *)((?:\w+, )*\w+): (.+(?:\n\1 +.+)*)", doc, re.MULTILINE)
    return {name: " ".join(text.split()) for _, names, text in found for name in names.split(", ")}


class Group:
    """Settings with their defaults, and how values are made from them: a function's parameters, or one dataclass."""

    def __init__(self, kinds: Mapping[str, Any], defaults: Mapping[str, Any], texts: Mapping[str, str]) -> None:
        self.kinds, self.defaults, self.texts = dict(kinds), defaults, texts
        self.settings = [
            setting
            for name, kind in self.kinds.items()
            for setting in _settings_of_value(kind, defaults[name], (name,), (name,))
        ]

    @classmethod
    def of_function(cls, function: Callable, words: Sequence[str]) -> Group:
        """words: of the command line, among which one may choose a class."""
        kinds, texts = get_type_hints(function, include_extras=True), texts_in(inspect.getdoc(function) or "")
        kinds.pop("return", None)
        parameters = inspect.signature(function).parameters
        defaults = {name: MISSING if p.default is p.empty else p.default for name, p in parameters.items()}
        for name, kind in kinds.items():
            for mark in _unmarked(kind)[1]:
                if isinstance(mark, Start):
                    defaults[name] = mark.default(words)
            choice = next((mark for mark in _unmarked(kind)[1] if isinstance(mark, Choice)), None)
            if choice is not None:
                chosen = [word for word in words if word in choice.classes]
                if chosen and choice.default:
                    defaults[name] = choice.default(choice.classes[chosen[0]], words)
                kinds[name] = Annotated[choice.classes[chosen[0]] if chosen else Nothing, FLAT, choice]
        return cls(kinds, defaults, texts)

    @classmethod
    def of_instance(cls, instance: Any) -> Group:
        kind: type = type(instance)
        kinds = get_type_hints(kind)
        return cls(kinds, {name: getattr(instance, name) for name in kinds}, texts_of(kind))

    def text_of(self, setting: Setting) -> str:
        """What the function or the class that has a setting says about it."""
        texts = self.texts if setting.owner is None else texts_of(setting.owner)
        return self.in_typed_words(texts.get(setting.path[-1], ""))

    def make(self, given: Mapping[tuple[str, ...], Any], typed: Mapping[tuple[str, ...], str]) -> dict[str, Any]:
        """The values, by name. typed: what was typed for each given path, for messages."""
        for setting in self.settings:
            name = setting.path[-1].upper() if setting.positional else setting.flag
            missing = setting.default is MISSING and setting.path not in given
            check(not missing, f"{name} must be given", "nothing", f"it is {described(setting.kind)}; see --help")
        return {name: _make(_unmarked(kind)[0], self.defaults[name], (name,), given, typed)
                for name, kind in self.kinds.items()}  # fmt: skip

    def in_typed_words(self, text: str) -> str:
        """A message with the names of fields as they are typed: `Schedule.epochs` becomes `--schedule.epochs`, and so does
        `steps_per_epoch`, or `loader="dali"`, where only one class has a field of that name."""
        flags: dict[str, list[Setting]] = {}
        for setting in self.settings:
            flags.setdefault(setting.path[-1], []).append(setting)
            for owner in setting.owner.__mro__ if setting.owner else ():
                flags.setdefault(f"{owner.__name__}.{setting.path[-1]}", []).append(setting)
        unique = {name: found[0] for name, found in flags.items() if len(found) == 1}

        def typed(match: re.Match) -> str:
            name, value = match["name"] or match["word"], match["value"]
            setting = unique[name]
            if value is None or (setting.kind is bool and value == "True"):
                return setting.flag
            bare = value.strip("\"'") or value
            return _negative(setting.flag) if value == "False" else f"{setting.flag} {bare}"

        words = [name for name in unique if "." not in name]
        names = _any_of([name for name in unique if "." in name or "_" in name])
        value = r"(?:=(?P<value>\"[^\"]*\"|'[^']*'|[\w.+/-]*\w))?"
        pattern = rf"(?<![\w.\-/\"'])(?:(?P<name>{names})|(?P<word>{_any_of(words)})(?==[\"']))(?!\w){value}"
        return re.sub(pattern, typed, text)


def _any_of(names: Sequence[str]) -> str:
    """A pattern for one of the names; the longest that fits."""
    return "|".join(sorted(map(re.escape, names), key=len, reverse=True)) or "(?!)"


def _make(kind: Any, default: Any, path: tuple[str, ...], given: Mapping, typed: Mapping) -> Any:
    """The value at a path: the default with what was given."""
    if path in given:
        return given[path]
    below = [p for p in given if p[: len(path)] == path]
    if default is not MISSING and not below:
        return default
    if isinstance(default, dict):
        return default | {p[-1]: given[p] for p in below}
    item = item_of(kind)
    if item is not None:
        return tuple(_make(item, group, (*path, str(number)), given, typed) for number, group in enumerate(default))
    return _make_group(kind if default is MISSING else type(default), default, path, given, typed)


def _make_group(kind: type, default: Any, path: tuple[str, ...], given: Mapping, typed: Mapping) -> Any:
    kinds = get_type_hints(kind)
    values = {
        f.name: _make(kinds[f.name], _default_of(f, default), (*path, f.name), given, typed) for f in fields(kind)
    }
    try:
        return kind(**values)
    except ValueError as error:
        blank: Any = object.__new__(kind)  # as it would print itself, which nobody typed
        for name, value in values.items():
            object.__setattr__(blank, name, value)
        words = ", ".join(text for p, text in typed.items() if p[: len(path)] == path)
        text = str(error).replace(repr(blank), words)
        if any(part.isdecimal() for part in path):  # one of several groups of this class
            text = re.sub(rf"\b{kind.__name__}\.(\w+)", lambda found: as_flag((*path, found[1])), text)
        raise ValueError(re.sub(rf"^{kind.__name__}:", f"{as_flag(path)}:", text)) from None


def _negative(flag: str) -> str:
    """--a.b becomes --a.no-b."""
    head, dot, last = flag[2:].rpartition(".")
    return f"--{head}{dot}no-{last}"


class Words:
    """A command line beside the settings that it may name."""

    def __init__(self, group: Group, words: Sequence[str], others: Sequence[str] = ()) -> None:
        """others: flags that belong to no setting, which are proposed where one is mistyped."""
        self.group, self.words, self.others = group, list(words), others
        self.by_flag = {s.flag: s for s in group.settings if not s.positional}
        self.positional = [s for s in group.settings if s.positional]
        self.given: dict[tuple[str, ...], Any] = {}
        self.typed: dict[tuple[str, ...], str] = {}
        self.loose: list[str] = []

    def read(self) -> None:
        """Fills `given`, `typed` and `loose`, the words that belong to no flag."""
        while self.words:
            word = self.words.pop(0)
            if _is_flag(word):
                self._read_flag(word)
            else:
                self.loose.append(word)
        for setting in self.positional:
            if self.loose:
                words = self.loose[:1] if words_of(setting.kind) is not None else list(self.loose)
                del self.loose[: len(words)]
                self._set(setting, setting.path, words, f"{setting.path[-1].upper()}", " ".join(words))

    def _read_flag(self, word: str) -> None:
        name, equals, inline = word.partition("=")
        name, dash = name if name.startswith("--") else f"-{name}", name.replace("_", "-")
        if dash in self.by_flag:
            setting = self.by_flag[dash]
            following = [inline] if equals else self._following(setting)
            self._set(setting, setting.path, following, name, " ".join([name, *following]))
            return
        for flag, setting in self.by_flag.items():
            if setting.kind is bool and dash in (_negative(flag), f"--no-{flag[2:]}"):
                check(not equals, f"{name} takes no value", repr(inline), f"leave the value out, or use {flag}")
                self.given[setting.path], self.typed[setting.path] = False, name
                return
            if get_origin(setting.kind) is dict and dash.startswith(f"{flag}."):
                following = [inline] if equals else self._following(replace(setting, kind=get_args(setting.kind)[1]))
                key = name[len(flag) + 1 :]
                same = (known for known in setting.default or () if known.replace("_", "-") == key.replace("_", "-"))
                one = replace(setting, kind=get_args(setting.kind)[1], default=1)
                self._set(one, (*setting.path, next(same, key)), following, name, " ".join([name, *following]))
                return
        remedy = nearest(dash, [*self.by_flag, *self.others], "--help-all lists all settings")
        raise ValueError(sentence("A setting must exist", name, remedy))

    def _following(self, setting: Setting) -> list[str]:
        """The words after a flag that are its value."""
        count = words_of(setting.kind)
        if setting.kind is bool:
            taken = self.words[:1] if self.words and not _is_flag(self.words[0]) and not self.positional else []
        else:
            end = next((i for i, word in enumerate(self.words) if _is_flag(word)), len(self.words))
            single = self.words[:1] in ([word] for word in NONE_WORDS)
            taken = self.words[: end if count is None else min(end, 1 if single else count)]
        del self.words[: len(taken)]
        return taken

    def _set(self, setting: Setting, path: tuple[str, ...], words: list[str], name: str, typed: str) -> None:
        example = "" if setting.default is MISSING else shown(setting.default)
        if setting.kind is bool and not words:
            value: Any = True
        elif setting.kind is bool:
            rule, remedy = f"{name} must be true or false", f"{name} alone is true, {_negative(setting.flag)} is false"
            check(words[0] in BOOLS, rule, repr(words[0]), remedy)
            value = BOOLS[words[0]]
        elif setting.optional_group:
            remedy = f"{name} none leaves them out; {name}.0 has the settings of the first"
            check(words == ["none"], f"{name} as a whole can only be none", " ".join(words) or "nothing", remedy)
            value = ()
        else:
            value = from_words(setting.kind, words, name, example)
        self.given[path], self.typed[path] = value, typed


def _is_flag(word: str) -> bool:
    return bool(re.match(r"--?[A-Za-z]", word)) and word != "-inf"


def values_of(function: Callable, words: Sequence[str], prog: str) -> dict[str, Any]:
    """The values that `call` would call a function with. A ValueError if a word belongs to none."""
    return _values(Group.of_function(function, words), words, prog)


def _values(group: Group, words: Sequence[str], prog: str) -> dict[str, Any]:
    read = Words(group, words)
    read.read()
    _take_choice(group, read)
    check(not read.loose, "Every word must belong to a setting", " ".join(read.loose), f"see {prog} --help")
    return group.make(read.given, read.typed)


def call(function: Callable, words: Sequence[str], prog: str) -> None:
    """Calls a function with the values of a command line: `-h` prints its help."""
    with errors_in_words(prog, WRONG_USAGE):
        group = Group.of_function(function, words)
    if any(word in (*HELP, HELP_ALL) for word in words):
        print(help_text(group, prog, inspect.getdoc(function) or ""))
        return
    with errors_in_words(prog, WRONG_USAGE, group):
        values = _values(group, words, prog)
    with errors_in_words(prog, FAILED, group):
        function(**values)


def call_one_of(functions: Mapping[str, Callable | Commands], words: Sequence[str], prog: str) -> None:
    """Calls the function that the first word names; `-h` lists them."""
    if words and words[0] in (*HELP, HELP_ALL):
        docs = {n: f.about if isinstance(f, Commands) else inspect.getdoc(f) or "" for n, f in functions.items()}
        print(list_text(prog, "COMMAND", docs))
        return
    with errors_in_words(prog, WRONG_USAGE):
        check_first_word(words, "command", list(functions), prog)
    chosen, prog = functions[words[0]], f"{prog} {words[0]}"
    if isinstance(chosen, Commands):
        call_one_of(chosen.functions, words[1:], prog)
    else:
        call(chosen, words[1:], prog)


def check_first_word(words: Sequence[str], what: str, names: Sequence[str], prog: str) -> None:
    """An error unless the first word is one of the names."""
    first = words[0] if words else "nothing"
    rule, remedy = f"The first word must be a {what}", nearest(first, names, f"{prog} --help lists them")
    check(first in names, rule, first, remedy)


def list_text(prog: str, what: str, docs: Mapping[str, str]) -> str:
    """The names of commands or recipes, with the first line of each one's text."""
    width = min(shutil.get_terminal_size().columns, 140)
    column = max(map(len, docs)) + 4
    lines = [f"usage: {prog} {what} [--setting value ...]", f"       {prog} {what} --help", ""]
    for name, doc in docs.items():
        first = doc.split("\n\n")[0].replace("\n", " ")
        lines.append(f"  {name:{column - 2}}{textwrap.shorten(first, max(width - column, 40), placeholder=' ...')}")
    return "\n".join(lines)


def _take_choice(group: Group, read: Words) -> None:
    """Removes the word that chose a class; an error if there is none."""
    for kind in group.kinds.values():
        choice = next((mark for mark in _unmarked(kind)[1] if isinstance(mark, Choice)), None)
        if choice is not None:
            chosen = [word for word in read.loose if word in choice.classes]
            got = " and ".join(chosen) or " ".join(read.loose) or "none"
            remedy = nearest(got, list(choice.classes), "add one word")
            check(len(chosen) == 1, f"One of {', '.join(choice.classes)} must be named", got, remedy)
            read.loose.remove(chosen[0])


@contextmanager
def errors_in_words(prog: str, code: int, group: Group | None = None, also: tuple[type, ...] = ()) -> Iterator[None]:
    """Ends the process with an exit code and one sentence for an error that is a sentence. All other errors are defects,
    and keep their traceback. also: classes whose text is always meant for people."""
    try:
        yield
    except Exception as error:
        text = str(error) if isinstance(error, also) else _sentence_of(error)
        if text is None or os.environ.get("PATCHLIGHT_TRACEBACK") == "1":
            raise
        text = f"{prog}: {group.in_typed_words(text) if group else text}"
        print(text, file=sys.stderr)
        raise Ended(text, code) from None


def _sentence_of(error: Exception) -> str | None:
    """The text of an error, if it is one of the project's sentences, the system's word on a file, or a package that is not
    installed; else None."""
    if re.fullmatch(r"(?s).+, got .*; .+\.", str(error)):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room there" if full else "check the path and its permissions"
        return sentence(f"{error.filename} must be usable", error.strerror.lower(), remedy)
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("patchlight"):
        package = error.name.partition(".")[0]
        remedy = "install it, or all that training needs with pip install 'patchlight[train]'"
        return sentence(f"The package {package} must be installed", "a Python without it", remedy)
    return None


def help_text(group: Group, prog: str, about: str, usual: Sequence[str] | None = None, more: str = "") -> str:
    """Help: what the command does, then a line or two per setting. usual: the flags to show; None: all."""
    width = min(shutil.get_terminal_size().columns, 120)
    about = re.split(r"\n\s*\nArgs:", about)[0]
    positional = "".join(f" {s.path[-1].upper()}" for s in group.settings if s.positional)
    for kind in group.kinds.values():
        positional += "".join(f" {'|'.join(m.classes)}" for m in _unmarked(kind)[1] if isinstance(m, Choice))
    lines = [f"usage: {prog}{positional} [--setting value ...]", "", about, ""]
    for setting in group.settings:
        if usual is None or setting.flag in usual:
            lines += _help_lines(setting, group.text_of(setting), width)
    return "\n".join([*lines, *(["", more] if more else [])])


def _help_lines(setting: Setting, text: str, width: int) -> list[str]:
    name = setting.path[-1].upper() if setting.positional else setting.flag
    if setting.optional_group:
        name, text = f"{name} none", text or "Leaves these groups out."
    default = "" if setting.default in (MISSING, "", {}) or setting.optional_group else f" [{shown(setting.default)}]"
    required = " (must be given)" if setting.default is MISSING else ""
    body = textwrap.wrap(f"{text}{default}{required}".strip(), max(width - 36, 40))
    if len(name) > 33:
        return [f"  {name}", *(f"{'':36}{line}" for line in body)]
    return [f"  {name:34}{body[0] if body else ''}", *(f"{'':36}{line}" for line in body[1:])]
