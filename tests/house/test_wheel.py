"""A wheel and a source distribution: complete, compiled, and used in environments that do not see the repository."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from house.test_build import HAS_COMPILER, copy_sources
from parity import ROOT
from PIL import Image

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")

OFFLINE = ("--no-deps", "--no-index", "--disable-pip-version-check")
OBJECTS = Path("build/objects/cpp")
LIBRARY = "patchlight_kernels/lib/libpatchlight_cpu.so"
TRAINING_ONLY = ("timm", "nvidia.dali", "tyro", "xxhash", "safetensors", "torchvision")
TRAIN = ("-m", "patchlight.command", "train")  # and a recipe
EVERY_OP = f"""
import sys
sys.modules.update(dict.fromkeys({(*TRAINING_ONLY, "rich")!r}))  # importing one of them fails
import patchlight, patchlight_kernels, torch
print(patchlight.__file__, patchlight_kernels.__file__)
from patchlight_kernels import force, registry
for spec in registry.specs():
    arguments = spec.inputs(spec.tests[0], torch.float32, "cpu")
    chosen = spec.op.choose(*spec.bind(arguments)).name
    spec.public(**arguments)
    print(spec.name, chosen)
"""
LOAD_INTO_TIMM = """
import sys, timm, torch
sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
rest = {"num_classes": 0, "class_token": False, "global_pool": ""}  # as SelfPatch has it
model = timm.create_model("vit_tiny_patch16_224", **sizes, **rest, checkpoint_path=sys.argv[1])
print(tuple(model.eval()(torch.zeros(1, 3, 48, 48)).shape))
"""


@dataclass(frozen=True)
class Place:
    """An environment of its own, with what pip installed into it and what pip said."""

    folder: Path
    said: str

    @property
    def packages(self) -> Path:
        return next((self.folder / "lib").glob("python*/site-packages"))

    def command(self, *arguments: str) -> tuple[list[str], dict[str, str]]:
        return [str(self.folder / "bin/python"), *arguments], without_the_repository()

    def python(self, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
        command, ours = self.command(*arguments)
        return run(command, cwd, {**ours, **environment})


def files_in(folder: Path) -> dict[str, bytes]:
    """Everything of the two packages in this folder."""
    paths = [path for name in ("patchlight", "patchlight_kernels") for path in (folder / name).rglob("*.*")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.is_file() and p.suffix != ".pyc"}


def without_the_repository() -> dict[str, str]:
    """The environment's variables, but for those by which a Python would find this checkout or build for a GPU."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PATCHLIGHT_LIBRARIES")}
    return kept | {"PATCHLIGHT_CUDA": "0", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}


def run(command: list[str], cwd: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    environment = without_the_repository() if environment is None else environment
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def everything_said(result: subprocess.CompletedProcess) -> str:
    return result.stdout + result.stderr


def installed_setuptools(folder: Path) -> Path:
    """The installed setuptools as a wheel, which an isolated build installs without an index."""
    setuptools = importlib.metadata.distribution("setuptools")
    path = folder / f"setuptools-{setuptools.version}-py3-none-any.whl"
    made_by_pip = ("INSTALLER", "REQUESTED", "direct_url.json")
    with zipfile.ZipFile(path, "w") as archive:
        for file in setuptools.files or []:
            if ".." not in file.parts and file.suffix != ".pyc" and file.name not in made_by_pip:
                archive.write(file.locate(), str(file))
    return path


def checkout(folder: Path) -> Path:
    """A copy of the repository with the objects that its build made, of which only old ones are compiled again."""
    folder.mkdir()
    copy_sources(folder)
    for name in ("MANIFEST.in", "CHANGELOG.md", "CITATION.cff", "Makefile", "train.py", "hubconf.py"):
        shutil.copy2(ROOT / name, folder / name)
    shutil.copytree(ROOT / "docs", folder / "docs")
    copy_objects(ROOT, folder)
    return folder


def leave_behind(source: Path) -> None:
    """What earlier builds may have left: a file that the packages no longer have, a library for some GPU."""
    earlier = source / f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for file in (earlier / "patchlight/gone.py", source / "kernels/patchlight_kernels/lib/libpatchlight_cuda.so"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def copy_objects(source: Path, folder: Path) -> None:
    """With their times, so that setup.py still sees which are older than their sources."""
    if (source / OBJECTS).is_dir():
        shutil.copytree(source / OBJECTS, folder / OBJECTS, ignore=shutil.ignore_patterns("*.lock", "*.partial"))


def empty_environment(folder: Path, *wanted: str) -> Place:
    """A virtual environment with what pip installs offline, and afterwards the sight of torch, timm and others."""
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder.parent)
    pip = [sys.executable, "-m", "pip", "install", *OFFLINE, "--ignore-installed", "--prefix", str(folder), "-v"]
    place = Place(folder, everything_said(run([*pip, *wanted], folder.parent)))
    found = [importlib.util.find_spec(name) for name in ("torch", "timm", "rich", "xxhash", "PIL")]
    others = sorted({str(Path(spec.origin).parents[1]) for spec in found if spec and spec.origin})
    (place.packages / "others.pth").write_text("\n".join(others))  # their own .pth files are not read
    return place


@dataclass(frozen=True)
class Built:
    """What is built once for all tests of this file."""

    folder: Path

    @property
    def wheel(self) -> Path:
        return next((self.folder / "wheels").glob("patchlight-*.whl"))

    @property
    def sdist(self) -> Path:
        return next((self.folder / "sdists").glob("patchlight-*.tar.gz"))

    def place(self, kind: str) -> Place:
        folder = self.folder / kind
        return Place(folder, (folder / "said.txt").read_text())


def build(folder: Path) -> None:
    """An isolated build of a wheel; a source distribution, which is compiled in place; both are installed."""
    source = checkout(folder / "checkout")
    leave_behind(source)
    parts = folder / "setuptools"
    parts.mkdir()
    installed_setuptools(parts)
    pip = [sys.executable, "-m", "pip", "wheel", *OFFLINE, "--find-links", str(parts), "-w", str(folder / "wheels")]
    wheel = run([*pip, "-v", str(source)], folder)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder / 'sdists')!r})"
    run([sys.executable, "-c", code], source)
    with tarfile.open(Built(folder).sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    copy_objects(source, unpacked)
    (unpacked / OBJECTS / "library.cpp.o").unlink(missing_ok=True)  # at least this one is compiled from the archive
    installed = {
        "wheel": empty_environment(folder / "wheel", str(Built(folder).wheel)),
        "sdist": empty_environment(folder / "sdist", "--no-build-isolation", str(unpacked)),
    }
    said = {"wheel": everything_said(wheel), "sdist": installed["sdist"].said}
    for kind, text in said.items():
        (folder / kind / "said.txt").write_text(text)


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Built:
    """Processes that test side by side share one build."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "wheel-and-sdist"
    with one_at_a_time(folder.with_suffix(".lock")):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            build(folder)
            (folder / "done").touch()
    return Built(folder)


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(params=["wheel", "sdist"])
def place(request, built) -> Place:
    return built.place(request.param)


def test_an_install_has_every_file_and_the_library(place):
    """Those of folders without an __init__.py too, and those that are not Python; nothing of earlier builds."""
    installed, ours = files_in(place.packages), files_in(ROOT / "ssl") | files_in(ROOT / "kernels")
    assert installed.keys() == {name for name in ours if not name.endswith(".so")} | {LIBRARY}
    assert not [name for name in installed.keys() - {LIBRARY} if installed[name] != ours[name]]
    assert {
        "patchlight_kernels/measured.csv",
        "patchlight/py.typed",
        "patchlight/evaluation/papers/sere.toml",
        "patchlight/tables/small.toml",
    } <= ours.keys()


def test_the_archive_of_sources_has_what_is_compiled_and_nothing_that_was(built):
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert sources | {"setup.py", "pyproject.toml", "LICENSE", "train.py", "docs/support.md"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc")) or name.startswith("tests")]


def test_an_install_compiles_with_the_torch_of_the_environment(place):
    """The wheel's build is isolated: it cannot import torch."""
    assert "patchlight: C++ library ready: libpatchlight_cpu.so" in place.said
    assert "patchlight: no CUDA library: PATCHLIGHT_CUDA=0; Triton kernels serve GPUs." in place.said


def test_the_archive_is_compiled(built):
    assert "library.cpp" in built.place("sdist").said


def test_every_op_runs_without_what_only_training_needs(place, tmp_path):
    """rich serves the doctor alone. Python finds what is installed, not the repository."""
    first, *lines = place.python("-c", EVERY_OP, cwd=tmp_path).stdout.splitlines()
    assert all(Path(file).is_relative_to(place.packages) for file in first.split())
    ops = {path.parent.name for path in (ROOT / "kernels").rglob("op.py")}
    assert dict(line.split() for line in lines) == dict.fromkeys(ops, "cpp")


def test_the_kernels_need_few_packages(built):
    """The others come with patchlight[train]."""
    (metadata,) = built.place("wheel").packages.glob("patchlight-*.dist-info/METADATA")
    needed = [line for line in metadata.read_text().splitlines() if line.startswith("Requires-Dist:")]
    names = {re.match(r"Requires-Dist: ([\w-]+)", line)[1] for line in needed if "extra ==" not in line}
    assert names == {"torch", "triton", "numpy", "rich"}


def test_without_its_library_an_install_says_how_to_get_it(built, tmp_path):
    """Once, at the first operation on the CPU; a `make` would not find a Makefile there."""
    code = "import torch, patchlight_kernels as k\nfor _ in range(2): k.neighbor_topk(torch.randn(1, 9, 4), (3, 3), 2)"
    said = built.place("wheel").python("-c", code, cwd=tmp_path, PATCHLIGHT_LIBRARIES=str(tmp_path)).stderr
    assert said.count("operations on the CPU run in PyTorch, slower: libpatchlight_cpu.so is not built") == 1
    assert "`pip install -v --no-build-isolation --no-deps --force-reinstall SOURCES`" in said
    assert "make" not in said


def test_a_build_that_finds_no_torch_says_so(built, tmp_path):
    """Nothing is compiled then, and the install is whole otherwise."""
    source, python = checkout(tmp_path / "checkout"), tmp_path / "empty/bin/python"
    run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "empty")], tmp_path)
    with zipfile.ZipFile(next((built.folder / "setuptools").glob("*.whl"))) as archive:
        archive.extractall(tmp_path / "setuptools")
    environment = {**without_the_repository(), "PYTHONPATH": str(tmp_path / "setuptools")}
    said = run([str(python), "setup.py", "-q", "build_ext", "--inplace"], source, environment).stderr
    assert "no torch found in" in said
    assert "install torch, then patchlight with --no-build-isolation" in said
    assert "the C++ library could not be built (reason above). patchlight works without it" in said


def test_an_archive_of_sources_trains(built, tmp_path):
    said = built.place("sdist").python(*TRAIN, "debug", "--output.folder", "run", cwd=tmp_path).stdout
    assert "Report: run/report.html" in said


def photographs(folder: Path, count: int) -> None:
    """JPEG files of four classes, which differ by how rough they are."""
    for index in range(count):
        path = folder / f"class{index % 4}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((64, 64), 10 + 20 * (index % 4)).convert("RGB").save(path)


def interrupt_after_a_step(place: Place, arguments: list[str], cwd: Path) -> str:
    """Trains until the first line of numbers, presses Ctrl-C, and returns everything that was printed."""
    command, environment = place.command("-u", *TRAIN, *arguments)
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
    ) as process:
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("Epoch:") and process.poll() is None:
                process.send_signal(signal.SIGINT)
                break
        said += process.stdout.readlines()
    assert process.returncode == 0, "".join(said)
    return "".join(said)


def test_from_the_wheel_alone_train_stop_resume_evaluate_and_load_into_timm(built, tmp_path):
    place = built.place("wheel")
    photographs(tmp_path / "images/train", 200)
    photographs(tmp_path / "images/val", 40)
    data = ["--data.loader", "torchvision", "--data.path", "images/train", "--data.batch-per-rank", "8"]
    rest = ["--schedule.epochs", "2", "--output.folder", "run", "--output.log-every", "1"]
    said = interrupt_after_a_step(place, ["debug", *data, *rest], tmp_path)
    assert "Stopped by Ctrl-C after step " in said
    stopped = steps(tmp_path)
    assert 1 <= stopped[-1] < 50

    said = place.python(*TRAIN, "debug", *data, *rest, "--output.resume", cwd=tmp_path).stdout
    assert "Report: run/report.html" in said
    assert steps(tmp_path) == list(range(1, 51))

    knn = ["-m", "patchlight.evaluation", "knn", "--checkpoint", "run", "--data", "images", "--protocol.k", "5", "10"]
    place.python(*knn, "--reading.workers", "0", cwd=tmp_path)
    measured = json.loads((tmp_path / "run/evaluation/knn-images.json").read_text())["metrics"]
    assert set(measured) == {"k5", "k10"}
    assert all(0 <= value <= 100 for value in measured.values())

    teacher = max((tmp_path / "run/checkpoints").glob("*/teacher.safetensors"))
    assert place.python("-c", LOAD_INTO_TIMM, str(teacher), cwd=tmp_path).stdout.strip() == "(1, 36, 32)"


def steps(folder: Path) -> list[int]:
    """The steps that a run's log has."""
    return [json.loads(line)["step"] for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
