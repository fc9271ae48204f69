"""`python -m patchlight_kernels doctor`: versions, hardware, which implementation of each op would run, and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence

import torch
from rich.console import Console
from rich.table import Table

from . import __version__, extension, hardware, registry
from .dispatch import Op

PACKAGES = ("torch", "triton", "timm", "numpy", "nvidia-dali-cuda130", "torchvision", "safetensors")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def compiler(command: str) -> str:
    path = shutil.which(command)
    if not path:
        return "not found"
    lines = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.splitlines()
    return next((line.strip() for line in lines if "release" in line), lines[0].strip() if lines else path)


def facts() -> list[tuple[str, str]]:
    """Everything that a bug report should contain."""
    rows = [("patchlight", __version__), *((name, version(name)) for name in PACKAGES)]
    rows += [("python", platform.python_version()), ("system", platform.platform()), ("CPU", hardware.processor())]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            rows.append((f"GPU {index}", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"))
        rows.append(("CUDA of torch", str(torch.version.cuda)))
    else:
        built_for = f"torch was built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build of torch"
        rows.append(("GPU", f"none ({built_for})"))
    rows += [("C++ compiler", compiler(os.environ.get("CXX", "g++"))), ("nvcc", compiler("nvcc"))]
    rows += [
        ("C++ library", extension.missing("cpp") or "loaded"),
        ("CUDA library", extension.missing("cuda") or "loaded"),
    ]
    rows.append(("Triton interpreter", "on" if hardware.triton_interpreted() else "off"))
    rows.append(("PATCHLIGHT_IMPL", os.environ.get("PATCHLIGHT_IMPL", "not set")))
    return rows


def states(op: Op, args: tuple) -> Iterator[tuple[str, str]]:
    """What each implementation does with these arguments, and why."""
    try:
        chosen, problem = {direction: op.choose(*args, direction=direction).name for direction in op.directions}, None
    except RuntimeError as error:
        chosen, problem = {}, str(error)
    for impl, reason in op.reasons(*args):
        state = op.state(impl.name, chosen, reason)
        whys = [op.why(direction, name, args) for direction, name in chosen.items() if name == impl.name]
        told = "; ".join(dict.fromkeys(filter(None, whys)))  # one for both directions is told once
        yield impl.name, (f"[green]{state}[/green]" if whys else state) + (f": {told}" if told else "")
    if problem:
        yield "[red]none[/red]", problem


def doctor() -> None:
    console = Console(width=max(120, Console().width))
    table = Table(title="patchlight doctor", show_header=False)
    for name, value in facts():
        table.add_row(name, value)
    console.print(table)
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    choices = Table(
        "op", "on", "implementation", "state", title="which implementation of each op runs, preferred first"
    )
    warnings.simplefilter("ignore")  # of a missing library, which the table names
    for spec in registry.specs():
        case = spec.benches[0]
        for device in devices:
            dtype = torch.bfloat16 if device == "cuda" else torch.float32  # as `python -m bench ops` measures
            for name, state in states(spec.op, spec.bind(spec.inputs(case, dtype, device))):
                choices.add_row(spec.name, device, name, state)
            choices.add_section()
    console.print(choices)


def main(arguments: Sequence[str], prog: str = "patchlight doctor") -> None:
    """Prints everything; takes no arguments."""
    if list(arguments) in (["-h"], ["--help"]):
        print(f"usage: {prog}\n\n{__doc__.split(': ', 1)[1].capitalize()}")
        return
    if arguments:
        print(f"{prog}: {prog} takes no words, got {' '.join(arguments)}; leave them out.", file=sys.stderr)
        raise SystemExit(2)
    doctor()


if __name__ == "__main__":
    command = "python -m patchlight_kernels"
    if sys.argv[1:2] != ["doctor"]:
        got = " ".join(sys.argv[1:]) or "nothing"
        print(f"{command}: The command must be doctor, got {got}; write {command} doctor.", file=sys.stderr)
        raise SystemExit(2)
    main(sys.argv[2:], f"{command} doctor")
