"""Packages from ssl/ and kernels/, and the compiled libraries from csrc/.

A C++ library is built always, a CUDA library when nvcc is found. Neither holds Python or unstable torch symbols, so one
build serves every Python and every torch >= 2.11. A build that fails leaves a working pure-Python install and says so.

    python setup.py build_ext --inplace              # both libraries, only what changed
    PATCHLIGHT_CUDA_ARCHS=90a python setup.py ...    # one architecture
    PATCHLIGHT_CUDA=0 python setup.py ...            # no CUDA library

`python setup.py cpu_device --output FILE [--sanitizer thread|address]` builds the CUDA sources for CPU threads (tests).
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
LIB = Path("patchlight_kernels", "lib")
PYTHON_PATH = "patchlight works without it: the pure-Python and Triton implementations run instead."
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11
# No finite-math: NaN has a defined result everywhere. Reassociation is what lets reductions vectorise.
MATH = ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"]
WANTED_ARCHS = ("80", "90a", "100")


def torch_flags() -> tuple[list[str], list[str]]:
    """Include flags and link flags of the installed torch."""
    from torch.utils.cpp_extension import include_paths, library_paths

    return [f"-I{p}" for p in include_paths()], [f"-L{p}" for p in library_paths()]


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if not found:
        raise RuntimeError("no C++ compiler found; install g++ or set CXX")
    return found


def nvcc() -> str | None:
    """The CUDA compiler, or None when there is none or it is not wanted."""
    if os.environ.get("PATCHLIGHT_CUDA") == "0":
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


def cuda_archs(nvcc_path: str) -> list[str]:
    """The wanted architectures that this toolkit knows."""
    if chosen := os.environ.get("PATCHLIGHT_CUDA_ARCHS"):
        return chosen.replace(",", ";").split(";")
    known = subprocess.run([nvcc_path, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in WANTED_ARCHS if f"compute_{arch.rstrip('a')}" in known]


def compile_all(command: list[str], sources: list[Path], folder: Path) -> list[str]:
    """Compiles what is older than its source or any header, in parallel; returns the object files."""
    folder.mkdir(parents=True, exist_ok=True)
    newest_header = max(path.stat().st_mtime for path in [*CSRC.rglob("*.h"), ROOT / "setup.py"])

    def one(source: Path) -> str:
        target = folder / f"{source.relative_to(CSRC).as_posix().replace('/', '_')}.o"
        if not target.exists() or target.stat().st_mtime < max(newest_header, source.stat().st_mtime):
            call([*command, "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, sources))


def call(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")


def build_cpp(target: Path, work: Path) -> None:
    """The C++ library. It is linked without the math flags: those at link time would flush denormals process-wide."""
    include, link = torch_flags()
    compile_ = [compiler(), "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", *MATH, STABLE_ABI, *include]
    objects = compile_all(compile_, [CSRC / "library.cpp", *sorted(CSRC.rglob("*_cpu.cpp"))], work / "cpp")
    call([compiler(), "-shared", *objects, *link, "-ltorch_cpu", "-lc10", "-o", str(target)])


def build_cuda(target: Path, work: Path) -> None:
    """The CUDA library: machine code for each architecture, and PTX of the newest for what comes later."""
    path = nvcc()
    include, link = torch_flags()
    archs = cuda_archs(path)
    newest = archs[-1].rstrip("a")
    gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    gencode.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    compile_ = [path, "-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
    compile_ += [f"-ccbin={compiler()}", "--threads", "0", *gencode, STABLE_ABI, *include]
    objects = compile_all(compile_, sorted(CSRC.rglob("*_cuda.cu")), work / "cuda")
    call(
        [
            path,
            f"-ccbin={compiler()}",
            "-shared",
            "-cudart",
            "static",
            *objects,
            *link,
            "-ltorch_cpu",
            "-ltorch",
            "-lc10",
            "-o",
            str(target),
        ]
    )


def build_cpu_device(target: Path, work: Path, sanitizer: str | None) -> None:
    """The CUDA sources as a library of CPU threads, in a torch namespace of its own: tests without a GPU."""
    include, link = torch_flags()
    names = ["-DPATCHLIGHT_CPU_DEVICE", "-DPATCHLIGHT_NAMESPACE=patchlight_cpu_device"]
    checks = [f"-fsanitize={sanitizer}", "-g", "-fno-omit-frame-pointer"] if sanitizer else []
    # g++ 12 miscompiles arrays of small structs in loops that nvcc unrolls (at -O1, in its induction variable pass).
    flags = ["-std=c++20", "-O1", "-fno-ivopts", "-fPIC", "-pthread"]
    compile_ = [compiler(), *flags, *names, *checks, STABLE_ABI, *include]
    objects = compile_all(
        [*compile_, "-x", "c++"],
        [CSRC / "library.cpp", *sorted(CSRC.rglob("*_cuda.cu"))],
        work / f"cpu_device_{sanitizer}",
    )
    call([compiler(), "-shared", "-pthread", *checks, *objects, *link, "-ltorch_cpu", "-lc10", "-o", str(target)])


class BuildLibraries(build_ext):
    """Builds into kernels/patchlight_kernels/lib (in place, editable) or into the wheel."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        folder = (ROOT / "kernels" if in_place else Path(self.build_lib)) / LIB
        folder.mkdir(parents=True, exist_ok=True)
        work = ROOT / "build" / "objects"
        self._try("C++", build_cpp, folder / "libpatchlight_cpu.so", work)
        if nvcc():
            self._try("CUDA", build_cuda, folder / "libpatchlight_cuda.so", work)
        else:
            print(
                "patchlight: no nvcc found, so the CUDA library is not built; the Triton kernels serve GPUs.",
                flush=True,
            )

    def _try(self, kind: str, build, target: Path, work: Path) -> None:
        try:
            build(target, work)
        except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as error:
            target.unlink(missing_ok=True)  # an old library beside new Python would be worse than none
            print(
                f"{error}\npatchlight: the {kind} library could not be built (reason above). {PYTHON_PATH}",
                file=sys.stderr,
                flush=True,
            )
        else:
            print(f"patchlight: {kind} library ready: {target.name}", flush=True)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / LIB).glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class CpuDevice(Command):
    """Builds the CUDA kernels for CPU threads."""

    description = "build the CUDA sources for CPU threads, for tests without a GPU"
    user_options = [("output=", "o", "the library to write"), ("sanitizer=", "s", "thread or address")]  # noqa: RUF012

    def initialize_options(self) -> None:
        self.output, self.sanitizer = None, None

    def finalize_options(self) -> None:
        if not self.output or self.sanitizer not in (None, "thread", "address"):
            raise SystemExit("cpu_device: needs --output FILE, and --sanitizer may be thread or address")

    def run(self) -> None:
        build_cpu_device(Path(self.output), ROOT / "build" / "objects", self.sanitizer)


class AnyPython(bdist_wheel):
    """The libraries have no Python ABI: one wheel per platform."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[
        *find_packages("ssl", include=["patchlight*"]),
        *find_packages("kernels", include=["patchlight_kernels*"]),
    ],
    package_dir={"patchlight": "ssl/patchlight", "patchlight_kernels": "kernels/patchlight_kernels"},
    ext_modules=[Extension("patchlight_kernels.lib.native", sources=[])],  # only so that setuptools calls build_ext
    cmdclass={"build_ext": BuildLibraries, "cpu_device": CpuDevice, "bdist_wheel": AnyPython},
)
