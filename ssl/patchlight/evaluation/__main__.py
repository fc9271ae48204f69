"""`python -m patchlight.evaluation COMMAND --checkpoint ...`: what a checkpoint is worth."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

from ..data.procedural_video import write_davis
from ..report.console import print_sentence
from ..report.environment import describe_environment
from ..report.page import write_report
from ..threads import limit_spinning
from .checkpoints import home, open_checkpoint
from .davis.benchmark import DavisFolder, DavisProtocol, evaluate_davis
from .encoder import Encoder
from .features import Reading
from .images import PROCEDURAL, open_images
from .pictures.patch_features import SENTENCES, PictureProtocol, draw_pictures, write_page
from .pictures.relations import RelationProtocol, evaluate_relations
from .probes.finetune import FinetuneProtocol, SemiProtocol, evaluate_finetune
from .probes.knn import KnnProtocol, evaluate_knn
from .probes.labeled import choose_labels, open_labelled
from .probes.linear import LinearProtocol, evaluate_linear
from .ranks import Ranks, ranks
from .results import Result, judged, results_folder, save_result, show_result
from .segment.benchmark import (
    TASKS,
    ConvSegment,
    FpnSegment,
    LinearSegment,
    UperNetSegment,
    draw_segments,
    evaluate_segment,
)
from .segment.scenes import open_scenes


@dataclass(frozen=True)
class Subject:
    """Which checkpoint is judged, and where."""

    checkpoint: str
    """A run's folder, a .safetensors or .pth file, or the name of a timm model."""
    heads: int | None = None
    """Attention heads, where weights do not tell: by default 64 channels each."""
    device: str | None = None
    """cuda, cuda:1, cpu, ...; by default a GPU where there is one."""
    out: Path | None = None
    """Folder for results; by default in the run's folder or beside the file."""

    def open(self, here: Ranks) -> Encoder:
        encoder = open_checkpoint(self.checkpoint, self.heads).to(here.device)
        if here.rank == 0:
            for note in encoder.notes:
                print_sentence(f"note: {note}")
        return encoder

    @property
    def folder(self) -> Path:
        return self.out or results_folder(self.checkpoint)

    def finish(self, result: Result, here: Ranks) -> None:
        """On the first rank: the table, the JSON file, and the run's report anew."""
        if here.rank == 0:
            show_result(result)
            print(f"result: {save_result(result, self.folder, describe_environment())}")
            run = home(self.checkpoint) if Path(self.checkpoint).exists() else None
            if run is not None:
                print(f"report: {write_report(run)}")
        if result.failed:
            raise ValueError(
                f"All parts should be done, got {len(result.failed)} that failed (named above); results of the others are"
                " kept."
            )


def knn(
    subject: Annotated[Subject, tyro.conf.arg(name="")],
    data: str = PROCEDURAL,
    protocol: KnnProtocol = KnnProtocol(),  # noqa: B008 frozen
    reading: Reading = Reading(),  # noqa: B008
) -> None:
    """Classify by nearest neighbors: no training, no labels but the neighbors'.

    Args:
        subject: what is judged.
        data: a folder with train/ and val/, or `procedural`.
        protocol: the published one by default.
        reading: how images are read.
    """
    with ranks(subject.device) as here:
        encoder, labelled = subject.open(here), open_labelled(data)
        metrics = evaluate_knn(encoder, labelled, protocol, here, reading)
        left_out = [k for k in protocol.k if f"k{k}" not in metrics]
        notes = (f"k={left_out} left out: there are {len(labelled.train)} training images",) if left_out else ()
        subject.finish(judged(encoder, "knn", labelled.name, protocol, metrics, notes=notes), here)


def linear(
    subject: Annotated[Subject, tyro.conf.arg(name="")],
    data: str = PROCEDURAL,
    protocol: LinearProtocol = LinearProtocol(),  # noqa: B008
    reading: Reading = Reading(),  # noqa: B008
) -> None:
    """Train linear classifiers on frozen features, one per learning rate, in one pass.

    Args:
        subject: what is judged.
        data: a folder with train/ and val/, or `procedural`.
        protocol: the published one by default.
        reading: how images are read.
    """
    with ranks(subject.device) as here:
        encoder, labelled = subject.open(here), open_labelled(data)
        metrics = evaluate_linear(encoder, labelled, protocol, here, reading)
        subject.finish(judged(encoder, "linear", labelled.name, protocol, metrics), here)


def finetune(
    subject: Annotated[Subject, tyro.conf.arg(name="")],
    data: str = PROCEDURAL,
    protocol: FinetuneProtocol = FinetuneProtocol(),  # noqa: B008
    reading: Reading = Reading(),  # noqa: B008
) -> None:
    """Train the whole network on all labels of any image folder.

    Args:
        subject: what is judged.
        data: a folder with train/ and val/, or `procedural`.
        protocol: the published one by default.
        reading: how images are read.
    """
    _tune(subject, "finetune", data, 1.0, "", protocol, reading)


def semi(
    subject: Annotated[Subject, tyro.conf.arg(name="")],
    data: str = PROCEDURAL,
    share: float = 0.01,
    names: str = "",
    protocol: SemiProtocol = SemiProtocol(),  # noqa: B008
    reading: Reading = Reading(),  # noqa: B008
) -> None:
    """Train the whole network on few labels: 1 % or 10 %.

    Args:
        subject: what is judged.
        data: a folder with train/ and val/, or `procedural`.
        share: of the labels of each class, drawn once for all.
        names: instead, a list of file names, such as SimCLR's 1percent.txt, which published numbers use.
        protocol: the published one by default.
        reading: how images are read.
    """
    _tune(subject, f"finetune-{100 * share:g}%", data, share, names, protocol, reading)


def _tune(
    subject: Subject, task: str, data: str, share: float, names: str, protocol: FinetuneProtocol, reading: Reading
) -> None:
    with ranks(subject.device) as here:
        encoder, labelled = subject.open(here), open_labelled(data)
        train = choose_labels(labelled.train, share, names, protocol.seed)
        metrics = evaluate_finetune(encoder, train, labelled, protocol, here, reading)
        notes = (f"{len(train)} of {len(labelled.train)} labels, {'listed in ' + names if names else 'drawn'}",)
        subject.finish(judged(encoder, task, labelled.name, protocol, metrics, notes=notes), here)


def davis(
    subject: Annotated[Subject, tyro.conf.arg(name="")],
    data: str,
    split: str = "val",
    resolution: str = "480p",
    protocol: DavisProtocol = DavisProtocol(),  # noqa: B008
    precision: str = "fp32",
    previews: int = 4,
) -> None:
    """Carry the first frame's objects through videos by patch features alone (DAVIS 2017), and score J&F.

    Args:
        subject: what is judged.
        data: a folder in DAVIS layout.
        split: a list of sequences in ImageSets.
        resolution: the folder of frames and masks.
        protocol: the published one by default.
        precision: of the backbone, fp32 or bf16.
        previews: sequences that get an animation and a sheet.
    """
    with ranks(subject.device) as here:
        encoder, folder = subject.open(here), DavisFolder(data, split, resolution)
        out = subject.folder / f"davis-{Path(data).name}"
        found = evaluate_davis(encoder, folder, protocol, here, out, precision, previews)
        name = "davis2017" if split == "val" and len(folder.names) == 30 and "bike-packing" in folder.names else data
        notes = (f"{len(found.unscored)} sequences have a first mask only and no score",) if found.unscored else ()
        result = judged(
            encoder,
            "davis",
            name,
            protocol,
            found.metrics(),
            notes=notes,
            failed=found.failed,
            details={"objects": found.per_object(), "pictures": str(out)},
        )
        subject.finish(result, here)


Head = (
    Annotated[LinearSegment, tyro.conf.subcommand("linear", prefix_name=False)]
    | Annotated[ConvSegment, tyro.conf.subcommand("conv", prefix_name=False)]
    | Annotated[FpnSegment, tyro.conf.subcommand("fpn", prefix_name=False)]
    | Annotated[UperNetSegment, tyro.conf.subcommand("upernet", prefix_name=False)]
)


def segment(
    subject: Annotated[Subject, tyro.conf.arg(name="")],
    protocol: Annotated[Head, tyro.conf.arg(name="")],
    layout: str = PROCEDURAL,
    data: str = "",
    train_list: str = "train",
    reading: Reading = Reading(),  # noqa: B008
) -> None:
    """Name the class of every pixel: `segment --checkpoint ... linear|conv|fpn|upernet`; options of the head come after it.

    Args:
        subject: what is judged.
        protocol: a head and its published setting.
        layout: ade20k, voc2012, imagenet-s or procedural.
        data: the folder of the data set.
        train_list: VOC's list to learn from, e.g. trainaug.
        reading: how images are read.
    """
    with ranks(subject.device) as here:
        encoder, scenes = subject.open(here), open_scenes(layout, data, train_list)
        found = evaluate_segment(encoder, scenes, protocol, here, reading)
        task = TASKS[type(protocol)]
        notes = (
            (f"{len(found.absent)} classes are in no test scene: {list(found.absent)[:20]}",) if found.absent else ()
        )
        if here.rank == 0:
            folder = subject.folder / f"{task}-{scenes.name}"
            folder.mkdir(parents=True, exist_ok=True)
            draw_segments(found.pictures).save(folder / "scenes.png")
        subject.finish(judged(encoder, task, scenes.name, protocol, found.metrics, notes=notes), here)


def attention(
    subject: Annotated[Subject, tyro.conf.arg(name="")],
    data: str = PROCEDURAL,
    protocol: PictureProtocol = PictureProtocol(),  # noqa: B008
) -> None:
    """Draw what class and query patches attend to, what patches resemble, and their main directions: PNGs and a page.

    Args:
        subject: what is judged.
        data: a folder or list of images, or `procedural`.
        protocol: what is drawn.
    """
    with ranks(subject.device) as here:
        encoder, source = subject.open(here), open_images(data)
        if here.rank == 0:
            sheets = draw_pictures(encoder, source, protocol, here.device, whole=data == PROCEDURAL)
            _show(subject, "attention", sheets, f"Patch features of {encoder.name}")


def relations(
    subject: Annotated[Subject, tyro.conf.arg(name="")],
    data: str = PROCEDURAL,
    protocol: RelationProtocol = RelationProtocol(),  # noqa: B008
) -> None:
    """Measure and draw how much spatial and channel relations change between two views of an image (SERE, Figures 5, 6).

    Args:
        subject: what is judged.
        data: a folder or list of images, or `procedural`.
        protocol: which views are compared, and where.
    """
    with ranks(subject.device) as here:
        encoder = subject.open(here)
        found = evaluate_relations(encoder, open_images(data), protocol, here)
        notes = (f"{found.left_out} pairs of views have no common part and were left out",) if found.left_out else ()
        if here.rank == 0:
            _show(subject, "relations", {"relations": found.sheet}, f"Self-relations of {encoder.name}")
        subject.finish(judged(encoder, "relations", data, protocol, found.metrics, notes=notes), here)


def _show(subject: Subject, kind: str, sheets: dict[str, Image.Image], title: str) -> None:
    """Saves sheets as PNG files and in one page, and takes them into the run's report."""
    folder = subject.folder / kind
    folder.mkdir(parents=True, exist_ok=True)
    sections = []
    for name, sheet in sheets.items():
        path = folder / f"{name.replace(' ', '-')}.png"
        sheet.save(path)
        sections.append((name, SENTENCES[name], path))
    print(f"page: {write_page(folder, title, sections)}")
    run = home(subject.checkpoint) if Path(subject.checkpoint).exists() else None
    if run is not None:
        print(f"report: {write_report(run)}")


def render(out: Path, videos: int = 8, frames: int = 24, size: int = 192, seed: int = 0) -> None:
    """Draw videos of the procedural objects with true masks, as a folder in DAVIS layout.

    Args:
        out: a new folder.
        videos: how many.
        frames: of each.
        size: side of a frame.
        seed: other videos.
    """
    print(f"{videos} videos: {write_davis(out, videos, frames, size, seed)}")


COMMANDS = {one.__name__: one for one in (knn, linear, finetune, semi, davis, segment, attention, relations, render)}


def main() -> None:
    try:
        with limit_spinning(print_sentence):
            tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="python -m patchlight.evaluation")
    except (ValueError, OSError) as error:
        if os.environ.get("PATCHLIGHT_TRACEBACK") == "1":
            raise
        raise SystemExit(f"patchlight: {error}") from None


if __name__ == "__main__":
    main()
