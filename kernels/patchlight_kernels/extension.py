"""Loads the compiled libraries once; says in one sentence what is missing and how to build it.

`$PATCHLIGHT_LIBRARIES` names another folder to load them from.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(os.environ.get("PATCHLIGHT_LIBRARIES") or Path(__file__).parent / "lib")
NAMES = {"cpp": "libpatchlight_cpu.so", "cuda": "libpatchlight_cuda.so"}
IN_CHECKOUT = (Path(__file__).parents[2] / "csrc").is_dir()
REMEDY = (
    "build it with `make build` (or `python setup.py build_ext --inplace`)"
    if IN_CHECKOUT
    else "install patchlight from its sources, with torch and g++ there: "
    "`pip install -v --no-build-isolation --no-deps --force-reinstall SOURCES`"
)


@cache
def missing(kind: str) -> str | None:
    """None if the library 'cpp' or 'cuda' is loaded, else the reason why not."""
    path = FOLDER / NAMES[kind]
    if kind == "cuda" and (reason := missing("cpp")):
        return reason  # the CPU library declares the functions of both
    if kind == "cuda" and torch.version.cuda is None:
        return "this torch was built without CUDA; install a CUDA build of torch"
    if not path.exists():
        return f"{path.name} is not built; {REMEDY}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load ({error}); re{REMEDY}"
    return None


@cache
def tell_slower(reason: str) -> None:
    """Says once that the CPU has to do without the C++ library: pip hides what a build says of it."""
    warnings.warn(f"patchlight_kernels: operations on the CPU run in PyTorch, slower: {reason}.")


def missing_function(kind: str, function: str) -> str | None:
    """None if the library `kind` has `function`, else the reason why not."""
    if reason := missing(kind):
        return reason
    if not hasattr(torch.ops.patchlight_native, function):
        return f"{NAMES[kind]} is older than this package and has no {function}; re{REMEDY}"
    return None


def native(function: str) -> Callable:
    """The C++ function; PyTorch's dispatcher picks its CPU or CUDA body by the tensors' device."""
    return getattr(torch.ops.patchlight_native, function).default


def native_call(function: str) -> Callable:
    """Calls the C++ function, found at each call: the library may not be built."""

    def call(*args):
        return native(function)(*args)

    return call
