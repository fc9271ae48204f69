"""Functions of a user's own files, named as `my_file.py:name`: recipes, and data sets."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .checks import check, sentence


def names_function(text: str) -> bool:
    """Whether a text names a function of a file."""
    return ".py:" in text


def function_of(text: str, what: str) -> Callable[[], Any]:
    """The function that a text names. The file is executed. what: what the function returns, for messages."""
    path, name = text.rsplit(":", 1)
    return function_of_file(Path(path), name, what)


def function_of_file(path: Path, name: str, what: str) -> Callable[[], Any]:
    """The function of a file that has this name. The file is executed, so it may register objectives of its own."""
    # A name that hides no installed module: a file datasets.py may import the package datasets.
    module_name = "file_" + re.sub(r"\W", "_", path.stem)
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(sentence(f"A {what}'s file must exist", path, "check the path"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    functions = [
        n for n, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module_name
    ]
    remedy = f"name one of its functions: {', '.join(functions) or 'there are none'}"
    check(name in functions, f"{path} must have the {what} that is named", name or "nothing", remedy)
    return getattr(module, name)


def call_alone(name: str, function: Callable[[], Any], what: str) -> Any:
    """What a function returns; an error if it needs arguments."""
    needed = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    check(not needed, f"The {what} {name} must work without arguments", ", ".join(needed), "give each a default")
    return function()
