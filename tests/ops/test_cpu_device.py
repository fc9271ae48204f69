"""CUDA kernels on a CPU: its matrix instructions are right, and the sanitizers find defects planted in a kernel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
from parity import ROOT

KERNEL = """
#include "device.h"
using namespace patchlight;
__global__ void reverse(int* out, int count) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = int(threadIdx.x);
  BARRIER;
  out[threadIdx.x] = shared[count - 1 - int(threadIdx.x) + OFF];
}
int main() {
  int out[64];
  cpu_device::launch(reverse, dim3{1, 1, 1}, 64, sizeof out, out, 64);
  for (int i = 0; i < 64; ++i) if (out[i] != 63 - i) return 1;
}
"""

MATRIX = """
#include <cstdio>
#include "mma.h"
using namespace patchlight;
template <class T> __global__ void product(const T* a, const T* b, float* d) {  // d[16, 8] = a[16, 16] b[8, 16]^T
  uint32_t left[4], right[4];
  const int lane = threadIdx.x % 32;
  load_matrices(left, a + lane % 16 * 16 + lane / 16 * 8);
  load_matrices(right, b + lane % 8 * 16 + lane / 8 % 2 * 8);
  float sum[4] = {};
  multiply_add<T>(sum, left, right[0], right[1]);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}
template <class T> __global__ void transposed_product(const T* a, const T* b, float* d) {  // d[16, 16] = a[16, 16] b[16, 16]
  uint32_t left[4], right[4];
  const int lane = threadIdx.x % 32;
  load_matrices(left, a + lane % 16 * 16 + lane / 16 * 8);
  load_transposed(right, b + (lane / 8 % 2 * 8 + lane % 8) * 16 + lane / 16 * 8);
  float sum[2][4] = {};
  for (int half = 0; half < 2; ++half) multiply_add<T>(sum[half], left, right[2 * half], right[2 * half + 1]);
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + i % 2] = sum[half][i];
}
template <class T> int check_transposed() {
  T a[256], b[256];
  float d[256];
  for (int i = 0; i < 256; ++i) a[i] = T(float(i % 7 - 3)), b[i] = T(float(i % 11 - 5));
  cpu_device::launch(transposed_product<T>, dim3{1, 1, 1}, 32, 0, a, b, d);
  for (int m = 0; m < 16; ++m) for (int n = 0; n < 16; ++n) {
    float expected = 0;
    for (int k = 0; k < 16; ++k) expected += float(a[m * 16 + k]) * float(b[k * 16 + n]);
    if (expected != d[m * 16 + n]) return 1;
  }
  return 0;
}
template <class T> int check() {
  T a[256], b[128];
  float d[128];
  for (int i = 0; i < 256; ++i) a[i] = T(float(i % 7 - 3));
  for (int i = 0; i < 128; ++i) b[i] = T(float(i % 5 - 2));
  cpu_device::launch(product<T>, dim3{1, 1, 1}, 32, 0, a, b, d);
  for (int m = 0; m < 16; ++m) for (int n = 0; n < 8; ++n) {
    float expected = 0;
    for (int k = 0; k < 16; ++k) expected += float(a[m * 16 + k]) * float(b[n * 16 + k]);
    if (expected != d[m * 8 + n]) return 1;
  }
  return 0;
}
int main() { return check<BFloat16>() + check<Half>() + check_transposed<BFloat16>() + check_transposed<Half>(); }
"""


def build_and_run(tmp_path, source: str, *flags: str) -> subprocess.CompletedProcess:
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler")
    sys.path.insert(0, str(ROOT))
    from torch.utils.cpp_extension import include_paths, library_paths

    (tmp_path / "program.cpp").write_text(source)
    includes = [f"-I{path}" for path in [ROOT / "csrc", *include_paths()]]
    # Not -Wl, which a comma in the path would split.
    links = [flag for path in library_paths() for flag in (f"-L{path}", "-Xlinker", "-rpath", "-Xlinker", path)]
    command = [
        compiler,
        "-std=c++20",
        "-O1",
        "-g",
        "-pthread",
        "-DPATCHLIGHT_CPU_DEVICE",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
    ]
    build = subprocess.run(
        [
            *command,
            *includes,
            *flags,
            str(tmp_path / "program.cpp"),
            *links,
            "-ltorch_cpu",
            "-lc10",
            "-o",
            str(tmp_path / "program"),
        ],
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    return subprocess.run(["setarch", "-R", str(tmp_path / "program")], capture_output=True, text=True)


def test_matrix_instructions(tmp_path):
    assert build_and_run(tmp_path, MATRIX).returncode == 0


@pytest.mark.parametrize(
    ("sanitizer", "barrier", "off", "report"),
    [
        ("thread", "__syncthreads()", 0, None),
        ("thread", "", 0, "data race"),
        ("address", "__syncthreads()", 0, None),
        ("address", "__syncthreads()", 4096, "heap-buffer-overflow"),
    ],
)
def test_sanitizers_find_planted_defects(tmp_path, sanitizer, barrier, off, report):
    result = build_and_run(tmp_path, KERNEL, f"-fsanitize={sanitizer}", f"-DBARRIER={barrier}", f"-DOFF={off}")
    if report is None:
        assert result.returncode == 0, result.stderr
    else:
        assert report in result.stderr


def test_asynchronous_copies_name_memory():
    """Else a compiler may move an access of shared memory across a copy, or across the wait for it; no CPU runs these lines."""
    text = (ROOT / "csrc/device.h").read_text()
    statements = re.findall(r"asm volatile\(\"cp\.async[^;]*;\"(.*?)\);\s", text, re.DOTALL)
    assert len(statements) == 3
    for statement in statements:
        assert '"memory"' in statement
