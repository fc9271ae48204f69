"""Compiles every Triton kernel of an op for GPUs that are not here, and prints what each needs as JSON lines.

A process without TRITON_INTERPRET, as Triton either interprets or compiles. `python tests/ops/aot.py neighbor_topk 90`, or,
for tests, a line "neighbor_topk 90" on its input for each answer, which ends with an empty line. The op runs forward and
backward as on a GPU, but each launch is recorded instead of run; so the signatures are those that a GPU would see. What a
kernel needs is kept in build/aot by its source, its signature and the versions of Triton and of this file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import Autotuner, JITFunction

from patchlight_kernels import force, hardware, registry
from patchlight_kernels.registry import Case, OpSpec

ARCHS = (80, 90, 100)
CACHE = Path(__file__).parent.parent.parent / "build/aot"
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.int64: "*i64",
    torch.float64: "*fp64",
    torch.bool: "*i1",
}


@contextlib.contextmanager
def recorded_launches():
    """Within the block, launching a kernel appends (kernel, bound arguments, configs) to the list."""
    launches = []

    def record(kernel, *args, grid, warmup, **kwargs):
        configs = kernel.configs if isinstance(kernel, Autotuner) else [triton.Config({})]
        jit = kernel.fn if isinstance(kernel, Autotuner) else kernel
        names = iter(jit.arg_names)
        bound = dict(zip(names, args, strict=False)) | kwargs
        launches.append((jit, bound, configs))

    with mock.patch.object(Autotuner, "run", record), mock.patch.object(JITFunction, "run", record):
        yield launches


class Kernel(NamedTuple):
    """All that reaches the machine code, but for the architecture."""

    jit: JITFunction
    signature: tuple[tuple[str, object], ...]  # a type for each argument, a tuple of them for a tuple
    constants: tuple[tuple[object, object], ...]
    divisible: tuple[tuple[int, ...], ...]  # places of the arguments that are multiples of 16
    config: triton.Config


def kernel_of(jit: JITFunction, bound: dict, config: triton.Config) -> Kernel:
    """What Triton would compile for these arguments."""
    constexpr = {p.name for p in jit.params if p.is_constexpr}
    values = {**{name: value for name, value in bound.items() if name in constexpr}, **config.kwargs}
    divisible = []

    def type_of(value, place):
        if isinstance(value, tuple):
            return tuple(type_of(item, (*place, i)) for i, item in enumerate(value))
        if isinstance(value, torch.Tensor):
            divisible.append(place)
            return POINTERS[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if value is None or value == 1:
            values[place] = value
            return "constexpr"
        if value % 16 == 0:
            divisible.append(place)
        return "i32" if abs(value) < 2**31 else "i64"

    types = [
        (name, "constexpr" if name in values else type_of(bound.get(name), (position,)))
        for position, name in enumerate(jit.arg_names)
    ]
    return Kernel(jit, tuple(types), tuple(values.items()), tuple(divisible), config)


def needs(kernel: Kernel, arch: int) -> dict:
    """`compile_kernel`, once for all runs of the tests."""
    versions = triton.__version__, hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    what = kernel.jit.cache_key, *kernel[1:4], str(kernel.config), arch, *versions
    path = CACHE / f"{hashlib.sha256(repr(what).encode()).hexdigest()}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(compile_kernel(kernel, arch)))
        partial.replace(path)
    return json.loads(path.read_text())


def compile_kernel(kernel: Kernel, arch: int) -> dict:
    """Machine code for one architecture, and its registers, stack and shared memory."""
    attributes = {place: [["tt.divisibility", 16]] for place in kernel.divisible}
    source = ASTSource(
        fn=kernel.jit, signature=dict(kernel.signature), constexprs=dict(kernel.constants), attrs=attributes
    )
    options = {"num_warps": kernel.config.num_warps, "num_stages": kernel.config.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = resource_usage(compiled.asm["cubin"])
    stack = usage["STACK"]  # spills show here, not under LOCAL
    return {
        "kernel": kernel.jit.__name__,
        "arch": arch,
        "config": str(kernel.config),
        "registers": usage["REG"],
        "stack": stack,
        "spills_in_hot_loops": spills_in_hot_loops(cuobjdump("-sass", compiled.asm["cubin"])) if stack else 0,
        "shared": compiled.metadata.shared,
        "tensor_cores": bool(re.search(r"mma\.sync|wgmma|tcgen05", compiled.asm["ptx"])),
    }


def resource_usage(cubin: bytes) -> dict[str, int]:
    text = cuobjdump("-res-usage", cubin)
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def spills_in_hot_loops(sass: str) -> int:
    """How many instructions move registers to or from memory within a loop that has no loop in it."""
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^;]+);", sass)
    code = [(int(address, 16), text) for address, text in code]
    jumps = [(address, re.match(r"BRA\S*\s+.*?(0x[0-9a-f]+)", text)) for address, text in code]
    loops = {int(jump[1], 16): address for address, jump in jumps if jump and int(jump[1], 16) < address}  # last jump
    hot = [(b, e) for b, e in loops.items() if not any(b < c and d < e for c, d in loops.items())]
    moves = [address for address, text in code if text.startswith(("STL", "LDL"))]
    assert moves, "a stack and no instruction that uses it: the machine code reads differently now"
    return sum(any(begin <= move <= end for begin, end in hot) for move in moves)


def cuobjdump(what: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


def launches_of(spec: OpSpec, case: Case, dtype: torch.dtype) -> list[tuple]:
    """What the op launches, forward and backward; nothing is computed."""
    arguments = spec.inputs(case, dtype, "cpu")
    leaves = {key: arguments[key].requires_grad_() for key in spec.differentiable}
    with recorded_launches() as launches, force("triton"):
        output = spec.public(**arguments)
        if leaves:
            parts = [p for p in (output if isinstance(output, tuple) else (output,)) if p.requires_grad]
            torch.autograd.grad(parts, list(leaves.values()), [torch.ones_like(p) for p in parts])
    return launches


def count_ones(case: Case) -> int:
    return sum(size == 1 and size is not True for size in case.sizes.values())


@cache
def kernels_of(name: str) -> dict[Kernel, str]:
    """Every kernel that the op's benchmark cases launch, and for whom: each with all its configurations for the first case
    that launches it, and with the default one for every other size. The last case has most sizes of 1: Triton compiles an
    argument that is 1 as a constant, which is another program."""
    spec, found, seen = registry.spec(name), {}, set()
    with (
        mock.patch.object(hardware, "triton_interpreted", lambda: False),
        mock.patch.object(hardware, "no_triton", lambda tensor: None),
    ):
        for case in (*spec.benches, *spec.compiled, max(spec.tests, key=count_ones)):
            for dtype in (torch.float32, torch.bfloat16):
                launches = launches_of(spec, case, dtype)
                assert launches, f"{case}: the launcher launched nothing"
                for jit, bound, configs in launches:
                    first = (jit.__name__, dtype) not in seen
                    seen.add((jit.__name__, dtype))
                    for config in configs if first else configs[:1]:
                        found.setdefault(kernel_of(jit, bound, config), f"{case} {str(dtype).removeprefix('torch.')}")
    return found


def answer(name: str, arch: int) -> Iterator[str]:
    """A JSON line for every kernel of the op."""
    for kernel, case in kernels_of(name).items():
        yield json.dumps({"case": case, **needs(kernel, arch)})


if __name__ == "__main__":
    questions = [" ".join(sys.argv[1:])] if sys.argv[1:] else sys.stdin
    for question in questions:
        name, arch = question.split()
        for line in answer(name, int(arch)):
            print(line)
        print(flush=True)
