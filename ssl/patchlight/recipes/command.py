"""The command line: a recipe by name, or a function of a file (`my_recipes.py:my_run`); any of its fields by flag."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro

from ..checks import sentence
from ..engine.assembly import train
from ..engine.sentinels import TrainingError
from ..run import Run
from . import RECIPES


def parse(arguments: Sequence[str] | None = None) -> Run:
    """The run that the arguments describe; tyro prints help and errors."""
    given = [a for a in (sys.argv[1:] if arguments is None else arguments) if not _is_from_launcher(a)]
    recipes = dict(RECIPES)
    if given and ".py:" in given[0]:
        path, name = given[0].rsplit(":", 1)
        recipes[name] = recipe_of_file(Path(path), name)
        given[0] = name
    described = {name: (inspect.getdoc(recipe) or "", recipe()) for name, recipe in recipes.items()}
    return tyro.extras.overridable_config_cli(
        described, prog="train.py", args=given, config=(tyro.conf.AvoidSubcommands,), use_underscores=False
    )


def recipe_of_file(path: Path, name: str) -> Callable[[], Run]:
    """A recipe from a file outside the package. The file is executed, so it may register objectives of its own."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(sentence("A recipe's file must exist", path, "check the path"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    functions = [n for n, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == path.stem]
    if name not in functions:
        raise ValueError(sentence(f"{path} must have the recipe {name}", f"{functions}", "name one of its functions"))
    return getattr(module, name)


def _is_from_launcher(argument: str) -> bool:
    """--local-rank, in either spelling: old launchers add it; ranks come from the environment."""
    return argument.replace("_", "-").startswith("--local-rank")


def main() -> None:
    try:
        train(parse())
    except (ValueError, OSError, TrainingError) as error:
        if os.environ.get("PATCHLIGHT_TRACEBACK") == "1":
            raise
        raise SystemExit(f"patchlight: {error}") from None
