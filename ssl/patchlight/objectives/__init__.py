"""The methods, and their registry by the class of their options.

`register` adds a method from any other file; docs/new_method.md explains it.
"""

from __future__ import annotations

from ..checks import check
from .dino import DinoOptions
from .ibot import IbotOptions
from .interface import ObjectiveOptions
from .moby import MobyOptions
from .moco_v3 import MocoV3Options
from .pqcl import PqclOptions
from .selfpatch import SelfPatchOptions
from .selfpatch_contrast import SelfPatchContrastOptions
from .sere import SereOptions

OBJECTIVES: dict[str, type[ObjectiveOptions]] = {}  # by the name of the options' class, which run.json writes


def register(options: type[ObjectiveOptions]) -> type[ObjectiveOptions]:
    """Adds an objective to the registry by its options. Also a decorator. A class that is defined again, as in a notebook,
    replaces itself."""
    name = options.__name__
    module = OBJECTIVES.get(name, options).__module__
    got = f"{name} of {options.__module__} beside that of {module}"
    check(module == options.__module__, "Options must have a name of their own", got, "rename the class")
    OBJECTIVES[name] = options
    return options


for _options in (
    DinoOptions,
    IbotOptions,
    MocoV3Options,
    MobyOptions,
    SelfPatchOptions,
    SelfPatchContrastOptions,
    PqclOptions,
    SereOptions,
):
    register(_options)
