"""Every file of examples/ runs as its reader would run it, and what comes out of it is right."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from examples.notebook import NOTEBOOK, execute
from parity import ROOT
from PIL import Image

import patchlight
from patchlight.data.procedural import ProceduralSource
from patchlight.data.sources import open_source
from patchlight.evaluation.features import Reading, encode
from patchlight.evaluation.images import Unreadable
from patchlight.evaluation.probes.knn import knn_accuracy
from patchlight.evaluation.ranks import Ranks

EXAMPLES = ROOT / "examples"
OPERATIONS = {
    "neighbor_topk", "class_attention", "query_attention", "self_relation", "prototype_ce",
    "photometric", "block_masks", "square_sums", "adamw",
}  # fmt: skip
SHORT = shlex.split("""
    --model.sizes depth 2 width 32 heads 2 --model.patch-size 8 --model.image-size 32
    --data.crops.global-crops.0.size 32 --data.crops.global-crops.1.size 32 --data.crops.local-crops.0.size 24
    --data.crops.local-crops.0.count 2 --data.batch-per-rank 8 --data.workers 0 --parallel.accumulate 1
    --objectives.options.0.prototypes 32 --objectives.options.0.hidden 32 --objectives.options.0.bottleneck 16
    --objectives.options.1.prototypes 32 --objectives.options.1.hidden 32 --objectives.options.1.bottleneck 16
    --schedule.epochs 3 --optim.warmup-epochs 0 --output.save-every 5 --output.log-every 1 --output.evaluate-every 0
""")  # the recipe small_data, for seconds
EPOCHS, BATCH = 3, 8


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder whose name has a space."""
    folder = tmp_path / "my work"
    folder.mkdir()
    return folder


def environment() -> dict[str, str]:
    """As a user's, not as a test's: Triton is not interpreted."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}


def call(place: Path, command: list[str], **more: str) -> str:
    """What a command prints, which must succeed."""
    done = subprocess.run(command, cwd=place, env=environment() | more, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def run_example(place: Path, name: str, *arguments: str) -> str:
    return call(place, [sys.executable, str(EXAMPLES / name), *arguments])


def is_drawn(picture: Image.Image | Path) -> bool:
    """Whether a picture has more in it than one color."""
    pixels = np.asarray(Image.open(picture) if isinstance(picture, Path) else picture).astype(float)
    return pixels.std() > 10 and len(np.unique(pixels)) > 50


def losses(run: Path) -> dict[int, float]:
    """The losses in the log of a run by their steps. No step may have two lines."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["loss"] for line in lines}
    assert len(found) == len(lines)
    assert all(math.isfinite(loss) for loss in found.values())
    return found


def ops_alone(place: Path) -> None:
    printed = run_example(place, "ops_alone.py")
    found = dict(re.findall(r"^(\S+) +differs from PyTorch by (\S+)$", printed, re.MULTILINE))
    assert set(found) == OPERATIONS | {"force", "torch.compile"}
    assert all(float(difference) < 1e-4 for difference in found.values())
    assert "neighbor_topk: cpp runs" in printed or torch.cuda.is_available()


def evaluate_and_look(place: Path) -> None:
    """Its k-NN is that of the library, on the same images; the pictures are drawn."""
    printed = run_example(place, "evaluate_and_look.py", "--output", "a look", "--steps", "8")
    output = place / "a look"
    numbers = json.loads((output / "numbers.json").read_text())
    encoder, cpu = patchlight.load_teacher(str(output / "run")), Ranks(torch.device("cpu"))
    pairs: list[torch.Tensor] = []
    for part in ("train", "val"):
        source = open_source(output / "images" / part)
        features, ids = encode(encoder, source, cpu, Reading(64, workers=0), 48, 48, Unreadable())
        pairs += [features, torch.from_numpy(source.labels)[ids]]
    assert [len(part) for part in pairs] == [600, 600, 200, 200]
    for k, accuracy in knn_accuracy(*pairs, k=(5, 20)).items():
        assert numbers[f"k-NN, k={k}"] == pytest.approx(accuracy, abs=0.011), "two images may be on the border"
        assert f"{numbers[f'k-NN, k={k}']:.1%}" in printed
    assert numbers["chance"] == 0.1
    assert 0.15 < numbers["linear"] < 1, "random features tell shapes apart, but not all"
    for name, size in {"attention": 5 * 128 + 16, "components": 2 * 160 + 4, "nearest_patches": 5 * 148 - 4}.items():
        assert is_drawn(output / f"{name}.png")
        assert Image.open(output / f"{name}.png").height == size


def write_images(root: Path) -> None:
    """Ten classes in two parts, and a file that is no image."""
    for part, count, seed in (("train", 120, 0), ("val", 40, 1)):
        source = ProceduralSource(count, 48, seed)
        for number, label in enumerate(source.labels):
            folder = root / part / source.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source.read(number)).save(folder / f"{number}.png")
    (root / "train" / "disk" / "broken.png").write_bytes(b"not an image")


def train_on_folder(place: Path) -> None:
    """Ctrl-C ends it with a checkpoint; the same command goes on to the end and evaluates. The broken image is left out."""
    write_images(place / "my images")
    run, list_of_images = place / "out put/run", place / "out put/data/clean.txt"
    command = ["bash", str(EXAMPLES / "train_on_folder.sh"), "my images", "out put", *SHORT]
    with_python = environment() | {"PYTHON": sys.executable}
    with (place / "first.txt").open("w+") as output:
        outputs = {"stdout": output, "stderr": output, "start_new_session": True}
        ends = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests may run where Ctrl-C is ignored
        started = subprocess.Popen(command, cwd=place, env=with_python, preexec_fn=ends, **outputs)
        while started.poll() is None and not list(run.glob("checkpoints/step-*/manifest.json")):
            time.sleep(0.02)
        os.killpg(started.pid, signal.SIGINT)
        started.wait()
        output.seek(0)
        first = output.read()
    assert started.returncode == 130, first
    assert "Nothing was written: this was a dry run." in first
    assert "Run the same command again" in first
    assert "Report:" not in first.split("Run the same command again")[1]
    before = losses(run)
    lines = list_of_images.read_text().splitlines()
    assert len(lines) == 120
    assert not any("broken.png" in line for line in lines)
    assert "broken.png" in (place / "out put/data/bad_files.tsv").read_text()

    printed = call(place, command, PYTHON=sys.executable)
    assert "dry run" not in printed, "what was done is not done again"
    after = losses(run)
    assert list(after) == list(range(1, EPOCHS * 120 // BATCH + 1))
    assert before.items() <= after.items()
    encoder = patchlight.load_teacher(str(run))
    assert encoder.name.endswith(f"step-{max(after):08d}")
    (result,) = (run / "evaluation").glob("knn-*.json")
    assert 0 < json.loads(result.read_text())["metrics"]["k10"] <= 1
    pictures = sorted(path.stem for path in (run / "evaluation/attention").glob("*.png"))
    assert pictures == ["class-attention", "principal-components", "query-attention", "similarity"]
    assert all(is_drawn(run / "evaluation/attention" / f"{name}.png") for name in pictures)
    assert (place / "out put/hub/README.md").is_file()
    for line, kind in zip(printed.splitlines()[-3:], ("Report", "Pictures", "Teacher"), strict=True):
        assert (place / line.removeprefix(f"{kind}:").strip()).is_file(), line


def notebook(place: Path) -> None:
    """All cells run from the first to the last, in a run of 8 steps."""
    fresh = execute(NOTEBOOK, place, PATCHLIGHT_EXAMPLE_STEPS="8", OMP_NUM_THREADS="1")
    text = text_of(fresh)
    (run,) = place.glob("runs/notebook-*/demo")
    assert max(losses(run)) == 8
    untrained, trained = map(float, re.search(r"untrained (\S+) %, trained (\S+) %", text).groups())
    assert 10 < untrained < 40
    assert 10 < trained < 40
    assert float(re.search(r"largest difference: (\S+)", text)[1]) < 1e-4
    committed = nbformat.read(NOTEBOOK, as_version=4)
    kinds = lambda book: [len(pictures_of(cell)) for cell in book.cells]
    assert kinds(fresh) == kinds(committed)
    assert all(is_drawn(picture) for cell in fresh.cells for picture in pictures_of(cell))


def own_dataset(place: Path) -> None:
    """Two runs, of items by number and of an iterable; the first has labels."""
    printed = run_example(place, "own_dataset.py", "--output", "a run")
    for name in ("Shapes", "ShapesInOrder"):
        run = place / "a run" / name
        assert max(losses(run)) == 10
        assert patchlight.load_teacher(str(run)).name.endswith("step-00000010")
        assert (run / "knn.jsonl").exists() == (name == "Shapes")
    assert "features of an image: [1, 32], of its patches: [1, 36, 32]" in printed


def own_loop(place: Path) -> None:
    """The loss falls, and timm's file of the teacher can be opened."""
    printed = run_example(place, "own_loop.py", "--output", "a run")
    found = [float(loss) for loss in re.findall(r"^step \d+: loss (\S+),", printed, re.MULTILINE)]
    assert len(found) == 5
    assert 0 < found[-1] < found[0] - 0.1
    encoder = patchlight.load_teacher(str(place / "a run/teacher.safetensors"), heads=3)
    assert (encoder.width, encoder.depth, encoder.patch_size) == (96, 3, 8)


def new_objective(place: Path) -> None:
    """In a loop, which saves its state, and as a recipe for the trainer, with an option as a flag."""
    printed = run_example(place, "new_objective.py", "--output", "a run")
    found = re.findall(r"^step (\d+):.* likeness/images ([\d.]+)", printed, re.MULTILINE)
    assert [step for step, _ in found] == ["8", "16"]
    assert all(0 < float(loss) < 5 for _, loss in found), "ln 15 is 2.7"
    assert torch.load(place / "a run/training.pt", weights_only=True)
    recipe = f"{EXAMPLES / 'new_objective.py'}:run"
    options = ["--objectives.options.1.width", "32", "--output.folder", "with the trainer"]
    call(place, [sys.executable, "-m", "patchlight.command", "train", recipe, *options])
    lines = [json.loads(line) for line in (place / "with the trainer/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 20
    assert all(0 < line["likeness/images"] < 5 for line in lines)


RUNS: dict[str, Callable[[Path], None]] = {
    "ops_alone.py": ops_alone,
    "train_on_folder.sh": train_on_folder,
    "evaluate_and_look.py": evaluate_and_look,
    "patchlight.ipynb": notebook,
    "own_dataset.py": own_dataset,
    "own_loop.py": own_loop,
    "new_objective.py": new_objective,
}


@pytest.mark.parametrize("name", RUNS)
def test_it_runs(name, place):
    RUNS[name](place)


def test_every_example_is_run_and_has_a_row():
    files = {path.name for path in EXAMPLES.iterdir() if path.is_file() and path.name != "README.md"}
    assert files == set(RUNS)
    rows = re.findall(r"^\| \[`([^`]+)`\]\(\1\) \| .+ \| .+ \| `(.+)` \|$", (EXAMPLES / "README.md").read_text(), re.M)
    assert sorted(name for name, _ in rows) == sorted(RUNS)
    assert all(f"examples/{name}" in command for name, command in rows)


@pytest.fixture
def two_gpus(place) -> dict[str, str]:
    """The environment of a Python that says there are two GPUs, and writes down what else it is asked to do."""
    python = place / "python"
    python.write_text(
        '#!/bin/bash\nif [ "$1" = -c ]; then echo 2; exit; fi\n'
        'printf "[%s]" "$@" >> asked.txt; echo >> asked.txt\n'
        'if [ "$3" = check-data ] && [ -e too_many_are_bad ]; then exit 1; fi\n'
        'mkdir -p "out put/data" "out put/run/checkpoints/step-1"; touch "out put/data/clean.index"\n'
    )
    python.chmod(0o755)
    (place / "my images").mkdir()
    return {"PYTHON": str(python), "RECIPE": "mine"}


FOLDER_TO_TEACHER = ["bash", str(EXAMPLES / "train_on_folder.sh"), "my images", "out put"]


def test_several_gpus_train_with_torchrun(place, two_gpus):
    printed = call(place, [*FOLDER_TO_TEACHER, "--schedule.epochs", "3"], **two_gpus)
    settings = "[mine][--data.path][out put/data/clean.index][--output.folder][out put/run]"
    assert (place / "asked.txt").read_text().splitlines() == [
        "[-m][patchlight.command][check-data][my images][--out][out put/data]",
        f"[-m][patchlight.command][train]{settings}[--schedule.epochs][3][--dry-run]",
        "[-m][torch.distributed.run][--standalone][--nproc-per-node][2][-m][patchlight.command][train]"
        f"{settings}[--output.resume][--schedule.epochs][3]",
        "[-m][patchlight.command][evaluate][attention][--checkpoint][out put/run][--data][out put/data/clean.index]",
        "[-m][patchlight.command][export][hub][--checkpoint][out put/run][--folder][out put/hub]",
    ]
    assert "k-NN accuracy is left out: my images has no train/ and val/" in printed


def test_nothing_is_trained_on_images_that_were_refused(place, two_gpus):
    """Not the second time either."""
    (place / "too_many_are_bad").touch()
    for _ in range(2):
        done = subprocess.run(FOLDER_TO_TEACHER, cwd=place, env=environment() | two_gpus, capture_output=True)
        assert done.returncode == 1
    assert (place / "asked.txt").read_text().count("\n") == (place / "asked.txt").read_text().count("[check-data]") == 2
    (place / "too_many_are_bad").unlink()
    call(place, FOLDER_TO_TEACHER, **two_gpus)
    call(place, FOLDER_TO_TEACHER, **two_gpus)
    assert (place / "asked.txt").read_text().count("[check-data]") == 3, "what was done is not done again"


def test_images_that_do_not_exist_are_an_error(place):
    command = ["bash", str(EXAMPLES / "train_on_folder.sh"), "nothing", "out"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
    assert not (place / "out").exists()


def pictures_of(cell: nbformat.NotebookNode) -> list[Image.Image]:
    outputs = [output.get("data", {}) for output in cell.get("outputs", [])]
    coded = [data[kind] for data in outputs for kind in ("image/png", "image/jpeg") if kind in data]
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in coded]


def text_of(book: nbformat.NotebookNode) -> str:
    return "".join(o.get("text", "") for cell in book.cells for o in cell.get("outputs", []))


def test_the_notebook_has_the_outputs_of_one_run_of_its_cells():
    committed = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"], "an error or a warning"
    assert sum(len(pictures_of(cell)) for cell in cells) == 9
    assert all(is_drawn(picture) for cell in cells for picture in pictures_of(cell))
    untrained, trained = map(float, re.search(r"untrained (\S+) %, trained (\S+) %", text_of(committed)).groups())
    assert 10 < untrained < trained - 2


def test_links_of_the_notebook_lead_somewhere():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "markdown"]
    links = [link for cell in cells for link in re.findall(r"\]\(([^)]+)\)", cell.source)]
    assert len(links) > 3
    assert [link for link in links if not (EXAMPLES / link).exists()] == []


def test_the_notebook_is_small_and_says_nothing_of_the_machine():
    text = NOTEBOOK.read_text()
    assert len(text) < 1.5e6
    assert not re.search(r"/(?:home|root|tmp|usr|work|opt|Users|mnt|var)/", text)
    assert json.loads(text)["metadata"].keys() == {"kernelspec", "language_info"}
    assert json.loads(text)["metadata"]["language_info"] == {"name": "python"}
