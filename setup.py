"""Packages from ssl/ and kernels/, and the compiled libraries from csrc/.

The C++ library is always built. The CUDA library is built if nvcc is found, for the GPUs of this machine (in a wheel: for all
wanted architectures). Neither uses Python's or torch's unstable symbols, so one build serves every Python and every torch >=
2.11. If a build fails, a message says so and the pure-Python install works; pip hides the message, so the first operation that
needed the library says it again (`patchlight_kernels/extension.py`).

    python setup.py build_ext --inplace              # what this machine needs, only what changed
    PATCHLIGHT_CUDA_ARCHS=all python setup.py ...    # every wanted architecture, with a GPU or without
    PATCHLIGHT_CUDA_ARCHS=90a python setup.py ...    # one architecture
    PATCHLIGHT_CUDA=0 python setup.py ...            # no CUDA library

For tests: `python setup.py cpu_level --level 1|3|4 --output FILE` builds the C++ library for one x86-64 level alone,
`python setup.py cpu_device --output FILE [--sanitizer thread|address]` the CUDA sources for a CPU, and
`python setup.py cuda_all [--op NAME] [--output FILE]` the CUDA library of a wheel, or what it is linked from.
"""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if sys.platform != "linux":
    raise SystemExit(
        f"patchlight: needs Linux, got {sys.platform}; on Windows use WSL 2, elsewhere a container with Linux."
    )

import fcntl

from setuptools import Command, Extension, find_namespace_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
LIB = Path("patchlight_kernels", "lib")
PYTHON_PATH = "patchlight works without it: the pure-Python and Triton implementations run instead."
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11
# No finite-math: NaN has a defined result everywhere. Reassociation lets the compiler vectorize sums.
MATH = ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"]
WANTED_ARCHS = ("80", "90a", "100")


def torch_folder() -> Path:
    """Where torch is installed. pip's isolated build cannot import it, but its Python still knows the environment's folders."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    folders += [Path(sysconfig.get_path(kind), "torch") for kind in ("platlib", "purelib")]
    for folder in folders:
        if (folder / "include").is_dir():
            return folder
    raise RuntimeError(
        f"no torch found in {folders[-1].parent}; install torch, then patchlight with --no-build-isolation"
    )


def torch_flags() -> tuple[list[str], list[str]]:
    """Include flags and link flags of the installed torch, which is not imported."""
    include = torch_folder() / "include"
    return [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"], [f"-L{include.parent / 'lib'}"]


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


def cuda_archs(nvcc_path: str, all_wanted: bool) -> list[str]:
    """What to compile for: the chosen architectures, else all wanted ones that nvcc knows, or those of the GPUs here."""
    chosen = os.environ.get("PATCHLIGHT_CUDA_ARCHS")
    if chosen and chosen != "all":
        return chosen.replace(",", ";").split(";")
    if not chosen and not all_wanted:
        return gpu_archs()
    known = subprocess.run([nvcc_path, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in WANTED_ARCHS if f"compute_{arch.rstrip('a')}" in known]


def gpu_archs() -> list[str]:
    """The architectures of the GPUs that are here, from 8.0 on: ["80"], ["90a"], ..."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        output = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    found = sorted({tuple(int(part) for part in line.split(".")) for line in output.split() if "." in line})
    return [f"{major}{minor}" + "a" * (major == 9) for major, minor in found if major >= 8]


def compile_all(command: list[str], sources: list[Path], folder: Path) -> list[str]:
    """Compiles what is older than its source or any header, in parallel, a line for each; returns the object files."""
    folder.mkdir(parents=True, exist_ok=True)
    newest_header = max(path.stat().st_mtime for path in [*CSRC.rglob("*.h"), ROOT / "setup.py"])
    targets = [folder / f"{source.relative_to(CSRC).as_posix().replace('/', '_')}.o" for source in sources]

    def is_old(source: Path, target: Path) -> bool:
        return not target.exists() or target.stat().st_mtime < max(newest_header, source.stat().st_mtime)

    todo = [pair for pair in zip(sources, targets, strict=True) if is_old(*pair)]
    lock, done = threading.Lock(), 0

    def compile_one(pair: tuple[Path, Path]) -> None:
        nonlocal done
        source, target = pair
        began = time.perf_counter()
        with locked(target):
            if is_old(source, target):  # and not made by another process meanwhile
                call([*command, "-c", str(source), "-o", f"{target}.partial"])
                os.replace(f"{target}.partial", target)
        with lock:
            done += 1
            seconds = time.perf_counter() - began
            print(f"patchlight: compiled {done} of {len(todo)}: {source.name}, {seconds:.0f} s", flush=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, todo))
    return [str(target) for target in targets]


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """One process at a time makes the file."""
    with open(f"{target}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def link(command: list[str], target: Path) -> None:
    """Links a library, which gets its name when it is complete: other processes may be using the old one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    call([*command, "-o", str(partial)])
    os.replace(partial, target)


def call(command: list[str]) -> None:
    """Runs the command; an error has its output."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")


def build_cpp(target: Path, work: Path, level: int | None = None) -> None:
    """The C++ library, which chooses its x86-64 level when it is loaded, or for one `level` alone.

    It is linked without the math flags: those at link time would flush denormals process-wide.
    """
    include, libraries = torch_flags()
    one_level = [f"-DPATCHLIGHT_CPU_LEVEL={level}"] if level else []
    compile_ = [compiler(), "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", *MATH]
    compile_ += [*one_level, STABLE_ABI, *include]
    sources = [CSRC / "library.cpp", *sorted(CSRC.rglob("*_cpu.cpp"))]
    objects = compile_all(compile_, sources, work / f"cpp{level or ''}")
    link([compiler(), "-shared", *objects, *libraries, "-ltorch_cpu", "-lc10"], target)


def quoted(flags: list[str]) -> list[str]:
    """-I and -L for nvcc, which splits a path at its commas unless it is quoted."""
    return [f'{flag[:2]}"{flag[2:]}"' for flag in flags]


def cuda_objects(work: Path, archs: list[str], op: str = "*") -> list[str]:
    """Objects of every op: machine code for each architecture, and PTX of the newest for later GPUs."""
    path = nvcc()
    include, _ = torch_flags()
    newest = archs[-1].rstrip("a")
    gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    gencode.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    compile_ = [path, "-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
    compile_ += [f"-ccbin={compiler()}", "--threads", "0", *gencode, STABLE_ABI, *quoted(include)]
    return compile_all(compile_, sorted(CSRC.rglob(f"{op}_cuda.cu")), work / f"cuda_{'_'.join(archs)}")


def build_cuda(target: Path, work: Path, archs: list[str]) -> None:
    """The CUDA library. Its functions are declared by the C++ library."""
    _, libraries = torch_flags()
    objects = cuda_objects(work, archs)
    static = [nvcc(), f"-ccbin={compiler()}", "-shared", "-cudart", "static"]
    link([*static, *objects, *quoted(libraries), "-ltorch_cpu", "-ltorch", "-lc10"], target)


def build_cpu_device(target: Path, work: Path, sanitizer: str | None) -> None:
    """The CUDA sources as a library for a CPU, in a torch namespace of its own: tests without a GPU."""
    include, libraries = torch_flags()
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
    link([compiler(), "-shared", "-pthread", *checks, *objects, *libraries, "-ltorch_cpu", "-lc10"], target)


class BuildLibraries(build_ext):
    """Builds into kernels/patchlight_kernels/lib (in place, editable) or into the wheel."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        folder = (ROOT / "kernels" if in_place else Path(self.build_lib)) / LIB
        folder.mkdir(parents=True, exist_ok=True)
        self._try("C++", folder / "libpatchlight_cpu.so", build_cpp)
        path, cuda = nvcc(), folder / "libpatchlight_cuda.so"
        archs = cuda_archs(path, all_wanted=not in_place) if path else []
        if archs:
            self._try("CUDA", cuda, build_cuda, archs)
            return
        if path:
            why = "no GPU found that it could be built for (PATCHLIGHT_CUDA_ARCHS=all builds it for every one)"
        else:
            why = "PATCHLIGHT_CUDA=0" if os.environ.get("PATCHLIGHT_CUDA") == "0" else "no nvcc found"
        print(f"patchlight: no CUDA library: {why}; Triton kernels serve GPUs.", flush=True)
        if cuda.exists() and cuda.stat().st_mtime < max(path.stat().st_mtime for path in CSRC.rglob("*.*")):
            cuda.unlink()
            print(f"patchlight: {cuda.name} was older than its sources and is deleted.", flush=True)

    def _try(self, kind: str, target: Path, build, *arguments) -> None:
        try:
            build(target, ROOT / "build" / "objects", *arguments)
        except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as error:
            target.unlink(missing_ok=True)  # an old library may not fit the new Python files
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
    """Builds the CUDA kernels for a CPU."""

    description = "build the CUDA sources for a CPU, for tests without a GPU"
    user_options = [("output=", "o", "the library to write"), ("sanitizer=", "s", "thread or address")]  # noqa: RUF012

    def initialize_options(self) -> None:
        self.output, self.sanitizer = None, None

    def finalize_options(self) -> None:
        if not self.output or self.sanitizer not in (None, "thread", "address"):
            raise SystemExit("cpu_device: needs --output FILE, and --sanitizer thread or address if any")

    def run(self) -> None:
        build_cpu_device(Path(self.output), ROOT / "build" / "objects", self.sanitizer)


class CpuLevel(Command):
    """Builds the C++ library for one x86-64 level alone, so that every level can be tested on a machine that has more."""

    description = "build the C++ library for one x86-64 level, for tests"
    user_options = [("output=", "o", "the library to write"), ("level=", "l", "1 (SSE2), 3 (AVX2) or 4 (AVX-512)")]  # noqa: RUF012

    def initialize_options(self) -> None:
        self.output, self.level = None, None

    def finalize_options(self) -> None:
        if not self.output or self.level not in ("1", "3", "4"):
            raise SystemExit("cpu_level: needs --output FILE, and --level 1, 3 or 4")

    def run(self) -> None:
        build_cpp(Path(self.output), ROOT / "build" / "objects", int(self.level))


class CudaAll(Command):
    """Compiles the CUDA sources, or those of one op, for all wanted architectures; links the library if --output is given."""

    description = "compile the CUDA sources for every wanted architecture, for tests"
    user_options = [("op=", None, "the op; all without it"), ("output=", "o", "the library to write, if any")]  # noqa: RUF012

    def initialize_options(self) -> None:
        self.op, self.output = "*", None

    def finalize_options(self) -> None:
        if nvcc() is None:
            raise SystemExit("cuda_all: needs nvcc, found none; set NVCC or CUDA_HOME, and not PATCHLIGHT_CUDA=0")

    def run(self) -> None:
        work, archs = ROOT / "build" / "objects", cuda_archs(nvcc(), all_wanted=True)
        for path in cuda_objects(work, archs, self.op):
            print(path)
        if self.output:
            build_cuda(Path(self.output), work, archs)


class AnyPython(bdist_wheel):
    """The libraries have no Python ABI: one wheel per platform. It has nothing that an earlier build left."""

    def run(self) -> None:
        for name in ("patchlight", "patchlight_kernels"):
            shutil.rmtree(Path(self.get_finalized_command("build").build_lib, name), ignore_errors=True)
        super().run()

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[
        name  # the folder of an op has no __init__.py
        for top in ("ssl", "kernels")
        for name in find_namespace_packages(top, include=["patchlight*"], exclude=["*.__pycache__", "*.lib"])
    ],
    package_dir={"patchlight": "ssl/patchlight", "patchlight_kernels": "kernels/patchlight_kernels"},
    ext_modules=[Extension("patchlight_kernels.lib.native", sources=[])],  # only so that setuptools calls build_ext
    cmdclass={
        "build_ext": BuildLibraries,
        "cpu_device": CpuDevice,
        "cpu_level": CpuLevel,
        "cuda_all": CudaAll,
        "bdist_wheel": AnyPython,
    },
)
