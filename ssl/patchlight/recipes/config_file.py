"""The settings of a run in a file: what a run writes (run.json), or the same in YAML."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..checks import check, sentence
from ..run import Run, run_reader
from ..values import similar

ENDINGS = (".json", ".yaml", ".yml")
_NAMED = 3  # settings at their defaults that a message names


def read_config(path: Path) -> tuple[Run, str]:
    """The run that a file describes, and a sentence about settings that it lacks; empty if it has all."""
    if path.is_dir() and (path / "run.json").is_file():
        path = path / "run.json"
    remedy = f"perhaps {like[0]} is meant" if (like := _files_like(path)) else "check the path"
    check(path.is_file(), "A file of settings must exist", path, remedy)
    check(path.suffix in ENDINGS, "A file of settings must be JSON or YAML", path, f"name it *{', *'.join(ENDINGS)}")
    try:
        plain = _parsed(path)
    except (ValueError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise ValueError(sentence(f"{path} must be {path.suffix[1:].upper()}", text, "correct it there")) from None
    reader = run_reader(str(path))
    run = reader.read(Run, plain)
    lacking, more = reader.defaults[:_NAMED], len(reader.defaults) - _NAMED
    if not lacking:
        return run, ""
    names = ", ".join(lacking) + (f" and {more} more" if more > 0 else "")
    return run, f"{path} lacks {names}: each has its default."


def _files_like(path: Path) -> list[Path]:
    """Files beside a missing one whose names look like its name."""
    names = [p.name for p in path.parent.iterdir() if p.suffix in ENDINGS] if path.parent.is_dir() else []
    return [path.with_name(name) for name in similar(path.name, names)]


def _parsed(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text, object_pairs_hook=_without_doubles)
    try:
        import yaml
    except ModuleNotFoundError:
        rule, remedy = "A YAML file needs the package pyyaml", "pip install pyyaml, or write JSON"
        raise ModuleNotFoundError(sentence(rule, "a Python without it", remedy)) from None

    class Loader(yaml.SafeLoader):
        """YAML, with 1e-6 as a number too, and each key once."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            return _without_doubles([(self.construct_object(k, deep=True), self.construct_object(v, deep=True))
                                     for k, v in node.value])  # fmt: skip

    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))
    Loader.add_constructor("tag:yaml.org,2002:map", lambda loader, node: loader.construct_mapping(node))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _without_doubles(pairs: list[tuple]) -> dict:
    keys = [key for key, _ in pairs]
    double = next((key for key in keys if keys.count(key) > 1), None)
    if double is not None:
        raise ValueError(f"the key {double!r} twice")
    return dict(pairs)
