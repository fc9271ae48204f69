"""Compiles every Triton kernel of an op for GPUs that are not here, and prints what each needs as JSON lines.

Run in a process without TRITON_INTERPRET: `python tests/ops/aot.py neighbor_topk`. The op runs forward and backward as on
a GPU, but each launch is recorded instead of run; so the signatures are those that a GPU would see.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import Autotuner, JITFunction

from patchlight_kernels import force, hardware, registry
from patchlight_kernels.registry import Case, OpSpec

ARCHS = (80, 90, 100)
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.int64: "*i64",
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


def specialization(jit: JITFunction, bound: dict) -> list:
    """What of the arguments reaches the machine code: constants, and of other integers what Triton looks at."""
    constants = {p.name for p in jit.params if p.is_constexpr}
    seen = lambda value: (value == 1, value % 16 == 0, abs(value) < 2**31) if isinstance(value, int) else type(value)
    return [value if name in constants else seen(value) for name, value in bound.items()]


def compile_launch(jit: JITFunction, bound: dict, config: triton.Config, arch: int) -> dict:
    """Machine code for one configuration, and its registers, stack and shared memory."""
    constexpr = {p.name for p in jit.params if p.is_constexpr}
    values = {**{name: value for name, value in bound.items() if name in constexpr}, **config.kwargs}
    signature, divisible = {}, {}
    for position, name in enumerate(jit.arg_names):
        value = bound.get(name)
        if name in values or value is None:
            signature[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name], divisible[(position,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            signature[name], values[name] = "constexpr", 1
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                divisible[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=jit, signature=signature, constexprs=values, attrs=divisible)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = resource_usage(compiled.asm["cubin"])
    stack = usage["STACK"]  # spills show here, not under LOCAL
    return {
        "kernel": jit.__name__,
        "arch": arch,
        "config": str(config),
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


def main(name: str) -> None:
    spec = registry.spec(name)
    seen = set()
    with (
        mock.patch.object(hardware, "triton_interpreted", lambda: False),
        mock.patch.object(hardware, "no_triton", lambda tensor: None),
    ):
        for case in spec.benches:
            for dtype in (torch.float32, torch.bfloat16):
                launches = launches_of(spec, case, dtype)
                assert launches, f"{case}: the launcher launched nothing"
                for jit, bound, configs in launches:
                    first = (
                        jit.__name__,
                        dtype,
                    ) not in seen  # every configuration once, the default one for every size
                    seen.add((jit.__name__, dtype))
                    for config in configs if first else configs[:1]:
                        key = (
                            jit.__name__,
                            dtype,
                            str(config),
                            *specialization(jit, bound),
                        )
                        if key in seen:
                            continue
                        seen.add(key)
                        for arch in ARCHS:
                            row = compile_launch(jit, bound, config, arch)
                            print(json.dumps({"case": str(case), "dtype": str(dtype), **row}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
