"""Patch-level self-supervised pretraining of vision models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchlight_kernels import __version__

    from . import objectives, recipes
    from .backbones.architectures import build_backbone
    from .backbones.wrapped import wrap_backbone
    from .data.multi_crop import MultiCrop
    from .engine.assembly import train
    from .evaluation.checkpoints import open_checkpoint as load_teacher
    from .pretraining import Pretraining
    from .run import Data, Model, Objectives, Optim, Output, Parallel, Run, Schedule

_PLACES = {  # module and name; without a name, the module itself
    **{
        name: ("run", name)
        for name in ("Run", "Model", "Objectives", "Data", "Optim", "Schedule", "Parallel", "Output")
    },
    "Pretraining": ("pretraining", "Pretraining"),
    "MultiCrop": ("data.multi_crop", "MultiCrop"),
    "build_backbone": ("backbones.architectures", "build_backbone"),
    "wrap_backbone": ("backbones.wrapped", "wrap_backbone"),
    "train": ("engine.assembly", "train"),
    "load_teacher": ("evaluation.checkpoints", "open_checkpoint"),
    "recipes": ("recipes", ""),
    "objectives": ("objectives", ""),
}
__all__ = [
    "Data",
    "Model",
    "MultiCrop",
    "Objectives",
    "Optim",
    "Output",
    "Parallel",
    "Pretraining",
    "Run",
    "Schedule",
    "__version__",
    "build_backbone",
    "load_teacher",
    "objectives",
    "recipes",
    "train",
    "wrap_backbone",
]


def __getattr__(name: str) -> Any:
    """Imports what is asked for: torch takes seconds, and parts of patchlight do without."""
    if name == "__version__":
        return import_module("patchlight_kernels").__version__
    if name not in _PLACES:
        raise AttributeError(f"module 'patchlight' has no attribute {name!r}")
    place, attribute = _PLACES[name]
    module = import_module(f"patchlight.{place}")
    return getattr(module, attribute) if attribute else module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
