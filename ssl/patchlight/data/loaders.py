"""Chooses and builds a loader. Loaders are imported where needed: that takes seconds, and DALI is optional."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from ..checks import sentence
from .interface import Loader, SourceLoader
from .policy import CropPolicy
from .stored import Source
from .streams import ImageStream

LOADERS = ("auto", "dali", "torchvision", "procedural")  # as Data.loader names them


@dataclass(frozen=True, slots=True)
class LoaderChoice:
    """A loader's name, and why it was chosen, for reports."""

    name: str
    why: str


def choose_loader(wanted: str, device: torch.device, own: bool = False) -> LoaderChoice:
    """The wanted loader, or with "auto" the faster loader for the device. own: for a data set of the user's own."""
    if own and wanted == "dali":
        rule = "The dali loader reads files in threads, which a data set of your own may not allow"
        raise ValueError(sentence(rule, 'Data.loader="dali"', 'use loader="auto" or loader="torchvision"'))
    if own and wanted == "auto":
        return LoaderChoice("torchvision", "a data set of your own is read by Python, not by NVIDIA DALI")
    if wanted == "dali" and not dali_is_there():
        remedy = 'pip install nvidia-dali-cuda130, or use loader="torchvision"'
        raise ModuleNotFoundError(sentence('Data.loader="dali" needs NVIDIA DALI', "a Python without it", remedy))
    if wanted != "auto":
        return LoaderChoice(wanted, "set by Data.loader")
    if device.type != "cuda":
        return LoaderChoice("torchvision", "no GPU: on a CPU it takes less time than DALI (python -m bench loader)")
    if not dali_is_there():
        return LoaderChoice("torchvision", "NVIDIA DALI is not installed: decoding and crops stay on the CPU")
    return LoaderChoice("dali", f"decodes and cuts on {device}")


def dali_is_there() -> bool:
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


def build_loader(
    name: str, source: Source, policy: CropPolicy, batch: int, *, photometric: str = "op", **options
) -> SourceLoader:
    """The loader of that name; options are those of `interface.Loader`. photometric="dali" is for the DALI loader only."""
    if name == "dali":
        from .dali_loader import DaliLoader

        return DaliLoader(source, policy, batch, photometric=photometric, **options)
    from .torchvision_loader import TorchvisionLoader

    return TorchvisionLoader(source, policy, batch, **options)


def build_stream_loader(stream: ImageStream, policy: CropPolicy, batch: int, **options) -> Loader:
    """The loader of an iterable; options are those of `stream_loader.StreamLoader`."""
    from .stream_loader import StreamLoader

    return StreamLoader(stream, policy, batch, **options)
