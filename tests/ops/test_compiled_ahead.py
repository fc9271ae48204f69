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
import triton
from ops.aot import spills_in_hot_loops
from parity import ROOT

from patchlight_kernels import extension, registry

PARKED = 16  # bytes: some versions of ptxas set a few values aside that innermost loops do not need
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.mark.parametrize("name", registry.names())
def test_triton_kernels_compile_without_spills(name):
    """In a process of its own, as Triton is either interpreting or compiling."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {
        "TRITON_DEFAULT_FP_FUSION": "1"
    }
    result = subprocess.run(
        [sys.executable, Path(__file__).parent / "aot.py", name], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {row["arch"] for row in rows} == {80, 90, 100}
    for row in rows:
        what = f"{row['kernel']} {row['case']} {row['dtype']} sm_{row['arch']} [{row['config']}]"
        assert row["stack"] <= PARKED, f"{what}: {row['stack']} bytes of stack at {row['registers']} registers"
        assert row["spills_in_hot_loops"] == 0, f"{what}: an innermost loop moves registers to memory and back"
        assert row["shared"] <= SHARED_LIMIT[row["arch"]], f"{what}: {row['shared']} bytes of shared memory"


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


@pytest.mark.timeout(600)
def test_cuda_sources_compile_without_spills():
    """nvcc builds the library (only what changed), and no kernel of it keeps registers in memory."""
    if not (shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")):
        pytest.skip("no nvcc on this machine")
    if os.environ.get("PATCHLIGHT_CUDA") == "0":
        pytest.skip("PATCHLIGHT_CUDA=0")
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, capture_output=True, text=True
    )
    assert "CUDA library ready" in result.stdout, result.stdout + result.stderr
    library = extension.FOLDER / extension.NAMES["cuda"]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "-res-usage", library], capture_output=True, text=True, check=True).stdout
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", text)
    assert kernels, text[:500]
    for function, registers, stack in kernels:
        assert int(stack) == 0, f"{function}: {stack} bytes of stack at {registers} registers"
