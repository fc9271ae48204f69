"""What the GPU will get, without one: Triton kernels compiled for sm_80, 90, 100, and the CUDA library's resource usage."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from ops.aot import ARCHS, spills_in_hot_loops
from parity import ROOT

from patchlight_kernels import extension, registry

PARKED = 16  # bytes: some versions of ptxas set a few values aside that innermost loops do not need
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
PATIENCE = pytest.mark.timeout(1800)  # what a compiler needs on a busy machine says nothing about the code


@pytest.fixture(scope="session")
def triton_compiler():
    """A process that compiles what it is asked for, as in this one Triton interprets."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        [sys.executable, Path(__file__).parent / "aot.py"],
        env=environment | {"TRITON_DEFAULT_FP_FUSION": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.stdin.close()
    process.wait()


@PATIENCE
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", registry.names())
def test_triton_kernels_compile_without_spills(name, arch, triton_compiler):
    print(name, arch, file=triton_compiler.stdin, flush=True)
    rows = []
    while (line := triton_compiler.stdout.readline()) != "\n":
        assert line, "the compiling process ended in the middle of its answer; its error is above"
        rows.append(json.loads(line))
    assert rows
    for row in rows:
        what = f"{row['kernel']} {row['case']} sm_{row['arch']} [{row['config']}]"
        assert row["arch"] == arch, what
        assert row["stack"] <= PARKED, f"{what}: {row['stack']} bytes of stack at {row['registers']} registers"
        assert row["spills_in_hot_loops"] == 0, f"{what}: an innermost loop moves registers to memory and back"
        assert row["shared"] <= SHARED_LIMIT[arch], f"{what}: {row['shared']} bytes of shared memory"


NESTED_LOOPS = """
        /*0000*/                   STL [R1], R2 ;            /* 0x0000000201007387 */
        /*0010*/                   MOV R3, R4 ;              /* 0x0000000400037202 */
        /*0020*/                   {outer} ;                 /* 0x0000000000007918 */
        /*0030*/                   FFMA R5, R5, R6, R7 ;     /* 0x0000000605057223 */
        /*0040*/              @!P1 BRA 0x30 ;                /* 0xfffffff000009947 */
        /*0050*/                   {inner} ;                 /* 0x0000000000007918 */
        /*0060*/               @P0 BRA 0x30 ;                /* 0xffffffd000000947 */
        /*0070*/                   BRA.U !UP0, 0x10 ;        /* 0xffffffb008007547 */
        /*0080*/                   BRA 0x80;                 /* 0xfffffffc00fc7947 */
"""


@pytest.mark.parametrize(
    ("outer", "inner", "spills"), [("NOP", "NOP", 0), ("LDL R8, [R1]", "NOP", 0), ("NOP", "LDL.LU R8, [R1]", 1)]
)
def test_spills_are_told_from_values_set_aside(outer, inner, spills):
    """The inner loop has two branches back; what lies between its begin and the last of them counts."""
    assert spills_in_hot_loops(NESTED_LOOPS.format(outer=outer, inner=inner)) == spills


def compile_cuda(*arguments: str) -> list[str]:
    """The CUDA sources compiled for every wanted architecture, as for a wheel, but only what changed: the object files."""
    if not (shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")):
        pytest.skip("no nvcc on this machine")
    if os.environ.get("PATCHLIGHT_CUDA") == "0":
        pytest.skip("PATCHLIGHT_CUDA=0")
    command = [sys.executable, "setup.py", "-q", "cuda_all", *arguments]
    environment = {**os.environ, "PATCHLIGHT_CUDA_ARCHS": "all"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return [line for line in result.stdout.splitlines() if line.endswith(".o")]


@PATIENCE
@pytest.mark.parametrize("name", registry.names())
def test_cuda_sources_compile_without_spills(name):
    """No kernel of the op keeps registers in memory, on any architecture."""
    (compiled,) = compile_cuda("--op", name)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "-res-usage", compiled], capture_output=True, text=True, check=True).stdout
    assert {int(arch) for arch in re.findall(r"sm_(\d+)", text)} == set(ARCHS), text[:500]
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", text)
    assert kernels, text[:500]
    for function, registers, stack in kernels:
        assert int(stack) == 0, f"{function}: {stack} bytes of stack at {registers} registers"


@PATIENCE
def test_the_cuda_library_links_and_loads(tmp_path):
    """Beside the C++ library, which declares its functions; in a process of its own."""
    if torch.version.cuda is None:
        pytest.skip("this torch was built without CUDA")
    compile_cuda("--output", str(tmp_path / extension.NAMES["cuda"]))
    shutil.copy(extension.FOLDER / extension.NAMES["cpp"], tmp_path)
    code = "from patchlight_kernels import extension, registry\n"
    code += "print([extension.missing_function('cuda', f'{name}_fwd') for name in registry.names()])"
    environment = {**os.environ, "PATCHLIGHT_LIBRARIES": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == str([None] * len(registry.names())), result.stdout + result.stderr
