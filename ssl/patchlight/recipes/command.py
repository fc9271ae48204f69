"""The command line: a recipe by name, any of its fields by flag."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence

import tyro

from ..engine.sentinels import TrainingError
from ..engine.trainer import train
from ..run import Run
from . import RECIPES


def parse(arguments: Sequence[str] | None = None) -> Run:
    """The run that the arguments describe; tyro prints help and complaints."""
    recipes = {name: (inspect.getdoc(recipe), recipe()) for name, recipe in RECIPES.items()}
    arguments = [a for a in (sys.argv[1:] if arguments is None else arguments) if not _launcher(a)]
    return tyro.extras.overridable_config_cli(
        recipes, prog="train.py", args=arguments, config=(tyro.conf.AvoidSubcommands,), use_underscores=False
    )


def _launcher(argument: str) -> bool:
    """--local-rank, in either spelling: old launchers add it; ranks come from the environment."""
    return argument.replace("_", "-").startswith("--local-rank")


def main() -> None:
    try:
        train(parse())
    except (ValueError, FileNotFoundError, TrainingError) as error:
        if os.environ.get("PATCHLIGHT_TRACEBACK") == "1":
            raise
        raise SystemExit(f"patchlight: {error}") from None
