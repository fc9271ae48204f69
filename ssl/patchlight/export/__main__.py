"""`python -m patchlight.export COMMAND --checkpoint ...`: writes a trained teacher for use without patchlight."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..usage import call_one_of
from . import TOLERANCE

# Modules are imported in the commands: help needs none of them.


def hub(
    checkpoint: Path, folder: Path, push: str = "", private: bool = False, license: str = "", picture: bool = True
) -> None:
    """A folder for timm and the Hugging Face Hub: weights, config.json, and a model card with what the run recorded.

    Loads with timm.create_model("local-dir:FOLDER", pretrained=True), which is checked. Without --push nothing is sent
    anywhere. Paths of this machine are left out of all files.

    Args:
        checkpoint: a run's folder, or one step of its checkpoints.
        folder: where the files go: a new or empty folder, or that of an earlier export.
        push: also upload the folder to this repository of the Hub, user/name, which is made if there is none.
        private: make that repository a private one.
        license: the Hub's identifier of the license of the weights, such as apache-2.0; by default the card states none.
        picture: show the run's latest picture of attention or crops in the card, which holds images that the run has read.
    """
    from .hub_folder import export_hub

    export_hub(checkpoint, folder, push, private, license, picture)


def onnx(
    checkpoint: str,
    file: Path,
    size: int | None = None,
    opset: int | None = None,
    tolerance: float = TOLERANCE,
    heads: int | None = None,
) -> None:
    """An ONNX file of backbone and summary for batches of any number, checked with onnxruntime against PyTorch.

    Args:
        checkpoint: a run's folder, a .safetensors or .pth file, an exported folder, or the name of a timm model.
        file: the file to write, which ends in .onnx.
        size: side of the images in pixels; by default that of the run's global crops, or 224 for a file that states none.
        opset: version of ONNX's operators; by default that of torch's exporter.
        tolerance: how many times the rounding of PyTorch itself (fp32 against fp64) the file may differ.
        heads: attention heads, where the checkpoint does not state them: by default 64 channels each.
    """
    from .onnx_file import export_onnx

    export_onnx(checkpoint, file, size, opset, tolerance, heads)


def torch(
    checkpoint: str, file: Path, size: int | None = None, tolerance: float = TOLERANCE, heads: int | None = None
) -> None:
    """A .pt2 file of torch.export for batches of any number, which needs torch alone; loaded again and checked.

    Args:
        checkpoint: a run's folder, a .safetensors or .pth file, an exported folder, or the name of a timm model.
        file: the file to write, which ends in .pt2.
        size: side of the images in pixels; by default that of the run's global crops, or 224 for a file that states none.
        tolerance: how many times the rounding of PyTorch itself (fp32 against fp64) the file may differ.
        heads: attention heads, where the checkpoint does not state them: by default 64 channels each.
    """
    from .torch_file import export_torch

    export_torch(checkpoint, file, size, tolerance, heads)


COMMANDS: dict[str, Callable[..., None]] = {command.__name__: command for command in (hub, onnx, torch)}


def main(arguments: Sequence[str] | None = None, prog: str = "python -m patchlight.export") -> None:
    call_one_of(COMMANDS, sys.argv[1:] if arguments is None else arguments, prog)


if __name__ == "__main__":
    main()
