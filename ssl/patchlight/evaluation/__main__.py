"""`python -m patchlight.evaluation COMMAND --checkpoint ...`: measures and draws what a checkpoint has learned."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated

from ..checks import check, check_choice
from ..report.console import print_sentence
from ..threads import limit_spinning
from ..usage import POSITIONAL, Choice, Commands, Start, call_one_of, word_after
from .checkpoints import facts_of
from .davis.benchmark import DavisProtocol, evaluate_davis
from .davis.folder import DavisFolder
from .detect.annotations import open_coco
from .detect.benchmark import evaluate_detect
from .detect.pictures import draw_detections
from .detect.protocols import HEADS as DETECTORS
from .detect.protocols import TASKS as DETECT_TASKS
from .detect.protocols import DetectProtocol, published_detect
from .encoder_folder import check_new
from .features import Reading
from .images import PROCEDURAL, open_images
from .layouts.coco import write_coco
from .layouts.davis import write_davis
from .layouts.labeled import write_cars, write_cifar10, write_cifar100, write_flowers102, write_folder, write_inat2019
from .layouts.scenes import write_ade20k, write_imagenet_s, write_voc2012
from .options import Checkpoint, Labeled, LabeledOptions
from .pictures.patch_features import PictureProtocol, draw_pictures
from .pictures.relations import RelationProtocol, evaluate_relations
from .probes.finetune import evaluate_classifier, save_classifier, train_classifier
from .probes.finetune_protocols import FinetuneProtocol, SemiProtocol, published_finetune
from .probes.knn import KnnProtocol, evaluate_knn
from .probes.labeled import FOLDER, choose_labels
from .probes.linear import LinearProtocol, evaluate_linear, missing_layers, published_linear
from .ranks import join_ranks
from .results import build_result
from .segment.benchmark import draw_segments, evaluate_segment
from .segment.predictions import TEST, VAL, Predictions
from .segment.protocols import HEADS, SegmentProtocol, head_name
from .segment.scenes import open_scenes, open_unmasked
from .segment.settings import default_protocol, published_for


def _published_finetune(words: Sequence[str]) -> FinetuneProtocol:
    """The protocol that flags change, by the layout among them."""
    return published_finetune(word_after("--layout", words, FOLDER))


def knn(
    checkpoint: Checkpoint,
    images: Labeled = LabeledOptions(),  # noqa: B008 frozen, as all defaults below
    protocol: KnnProtocol = KnnProtocol(),  # noqa: B008
) -> None:
    """Classify by nearest neighbors: nothing is trained, only the neighbors' labels are used."""
    with join_ranks(checkpoint.device) as ranks:
        encoder, data = checkpoint.open(ranks), images.open()
        metrics = evaluate_knn(encoder, data, protocol, ranks, images.reading)
        left_out = [k for k in protocol.k if f"k{k}" not in metrics]
        notes: tuple[str, ...] = (
            (f"k={left_out} left out: there are {len(data.train)} training images",) if left_out else ()
        )
        notes = (*notes, *data.unreadable.notes(ranks))
        checkpoint.finish(build_result(encoder, "knn", data.name, protocol, metrics, notes), ranks)


def linear(
    checkpoint: Checkpoint,
    images: Labeled = LabeledOptions(),  # noqa: B008
    protocol: LinearProtocol = LinearProtocol(),  # noqa: B008
) -> None:
    """Train linear classifiers on frozen features, one per learning rate, in one pass."""
    with join_ranks(checkpoint.device) as ranks:
        encoder, data = checkpoint.open(ranks), images.open()
        used, published = protocol.on(encoder), published_linear(encoder)
        metrics = evaluate_linear(encoder, data, used, ranks, images.reading)
        notes = (*missing_layers(protocol, encoder), *data.unreadable.notes(ranks))
        checkpoint.finish(build_result(encoder, "linear", data.name, used, metrics, notes, published=published), ranks)


def finetune(
    checkpoint: Checkpoint,
    images: Labeled = LabeledOptions(),  # noqa: B008
    protocol: Annotated[FinetuneProtocol, Start(_published_finetune)] = FinetuneProtocol(),  # noqa: B008
    save: Path | None = None,
) -> None:
    """Train the whole network on all labels.

    Args:
        protocol: by default as published for the layout.
        save: a new folder for the trained network, which other commands take as a checkpoint.
    """
    _finetune(checkpoint, images, protocol, published_finetune(images.layout), save)


def semi(
    checkpoint: Checkpoint,
    images: Labeled = LabeledOptions(),  # noqa: B008
    share: float = 0.01,
    names: str = "",
    protocol: SemiProtocol = SemiProtocol(),  # noqa: B008
    save: Path | None = None,
) -> None:
    """Train the whole network on few labels: 1 % or 10 %.

    Args:
        share: of the labels of each class, drawn once for all.
        names: instead, a list of file names, such as SimCLR's 1percent.txt, which published numbers use.
        save: a new folder for the trained network, which other commands take as a checkpoint.
    """
    _finetune(checkpoint, images, protocol, SemiProtocol(), save, share, names)


def _finetune(
    checkpoint: Checkpoint,
    images: Labeled,
    protocol: FinetuneProtocol,
    published: FinetuneProtocol,
    save: Path | None,
    share: float = 1.0,
    names: str = "",
) -> None:
    with join_ranks(checkpoint.device) as ranks:
        encoder, data = checkpoint.open(ranks), images.open()
        train = choose_labels(data.train, share, names, protocol.seed)
        if save:
            check_new(save)  # before hours of training
        percent = round(100 * len(train) / len(data.train), 1) if names else 100 * share
        task = f"finetune-{percent:g}%" if isinstance(protocol, SemiProtocol) else "finetune"
        model = train_classifier(encoder, train, data, protocol, ranks, images.reading)
        metrics = evaluate_classifier(model, data, protocol, ranks, images.reading)
        if save and ranks.rank == 0:
            save_classifier(save, model, data, protocol, metrics, facts_of(checkpoint.checkpoint))
            print(f"saved: {save}")
        notes = (
            f"{len(train)} of {len(data.train)} labels, {'listed in ' + names if names else 'drawn'}",
            *data.unreadable.notes(ranks),
        )
        checkpoint.finish(build_result(encoder, task, data.name, protocol, metrics, notes, published=published), ranks)


def davis(
    checkpoint: Checkpoint,
    data: str,
    split: str = "val",
    resolution: str = "480p",
    protocol: DavisProtocol = DavisProtocol(),  # noqa: B008
    precision: str = "fp32",
    previews: int = 4,
) -> None:
    """Find the first frame's objects in all frames of videos by patch features alone (DAVIS 2017), and score J&F.

    Args:
        data: a folder in DAVIS layout.
        split: a list of sequences in ImageSets.
        resolution: the folder of frames and masks.
        precision: of the backbone, fp32 or bf16.
        previews: sequences that get an animation and a sheet.
    """
    with join_ranks(checkpoint.device) as ranks:
        encoder, folder = checkpoint.open(ranks), DavisFolder(data, split, resolution)
        out = checkpoint.folder / f"davis-{Path(data).name}"
        result = evaluate_davis(encoder, folder, protocol, ranks, out, precision, previews)
        name = "davis2017" if split == "val" and len(folder.names) == 30 and "bike-packing" in folder.names else data
        unscored = len(result.unscored)
        notes = (f"{unscored} sequences have a first mask only and no score",) if unscored else ()
        details = {"objects": result.per_object(), "pictures": str(out)}
        metrics, failed = result.metrics(), result.failed
        checkpoint.finish(build_result(encoder, "davis", name, protocol, metrics, notes, failed, details), ranks)


def _published_detect(kind: type[DetectProtocol], words: Sequence[str]) -> DetectProtocol:
    """What `detect` starts from, as the words before it is read say."""
    return published_detect(kind, word_after("--schedule", words, "1x"), word_after("--data", words, PROCEDURAL))


def segment(
    checkpoint: Checkpoint,
    protocol: Annotated[SegmentProtocol, Choice(HEADS, default_protocol)],
    layout: str = PROCEDURAL,
    data: str = "",
    train_list: str = "train",
    paper: str = "",
    predictions: Path | None = None,
    split: str = VAL,
    reading: Reading = Reading(),  # noqa: B008
) -> None:
    """Predict the class of every pixel: `segment --checkpoint ... linear|conv|fpn|upernet`; then the head's own options.

    Args:
        protocol: a head and its setting; the defaults are those published for the layout.
        layout: ade20k, voc2012, imagenet-s or procedural.
        data: the folder of the data set.
        train_list: VOC's list of training images, e.g. trainaug.
        paper: whose published setting is used where several have one: sere, sere-vitb, pqcl, selfpatch or pass.
        predictions: a new folder for predicted classes, in the format of the data set's server.
        split: of which images: val, which are always scored, or test, which have no masks.
        reading: how images are read.
    """
    check_choice("The split", split, (VAL, TEST))
    rule, remedy = "The test split has no masks and needs a folder of predictions", "add --predictions FOLDER"
    check(split == VAL or predictions is not None, rule, "none", remedy)
    with join_ranks(checkpoint.device) as ranks:
        encoder, scenes = checkpoint.open(ranks), open_scenes(layout, data, train_list)
        unmasked = open_unmasked(layout, data) if split == TEST else None
        written = Predictions(predictions, layout, unmasked) if predictions is not None else None
        published, notes = published_for(protocol, layout, paper, encoder.width)
        result = evaluate_segment(encoder, scenes, protocol, ranks, reading, written)
        task, absent, name = f"segment-{head_name(protocol)}", result.absent, scenes.name
        if absent:
            notes = (*notes, f"{len(absent)} classes are in no test scene: {list(absent)[:20]}")
        if (facts_of(checkpoint.checkpoint) or {}).get("finetuned"):
            name += "-ft" if layout == "imagenet-s" else ""
            notes = (*notes, "the network was fine-tuned on labels first")
        notes = (*notes, *scenes.unreadable.notes(ranks))
        details = {"predictions": str(predictions)} if predictions is not None else {}
        if ranks.rank == 0:
            folder = checkpoint.folder / f"{task}-{name}"
            folder.mkdir(parents=True, exist_ok=True)
            draw_segments(result.pictures).save(folder / "scenes.png")
        metrics = result.metrics
        checkpoint.finish(
            build_result(encoder, task, name, protocol, metrics, notes, details=details, published=published), ranks
        )


def detect(
    checkpoint: Checkpoint,
    protocol: Annotated[DetectProtocol, Choice(DETECTORS, _published_detect)],
    data: str = PROCEDURAL,
    schedule: str = "1x",
    reading: Reading = Reading(),  # noqa: B008
) -> None:
    """Find objects with their boxes and masks: `detect --checkpoint ... mask-rcnn|cascade`; then the detector's own options.

    Args:
        protocol: a detector and its published setting.
        data: a folder in COCO layout, or `procedural`.
        schedule: 1x or 3x, how long is trained.
        reading: how images are read.
    """
    with join_ranks(checkpoint.device) as ranks:
        encoder = checkpoint.open(ranks)
        with open_coco(data) as images:
            result = evaluate_detect(encoder, images, protocol, ranks, reading)
        task, notes = DETECT_TASKS[type(protocol)], (*images.notes, *images.unreadable.notes(ranks))
        if ranks.rank == 0:
            folder = checkpoint.folder / f"{task}-{images.name}"
            folder.mkdir(parents=True, exist_ok=True)
            draw_detections(result.pictures).save(folder / "objects.png")
        published = published_detect(type(protocol), "1x", data)  # which is that of every paper
        checkpoint.finish(
            build_result(
                encoder, task, images.name, protocol, result.metrics, notes, None, result.by_class, published=published
            ),
            ranks,
        )


def attention(
    checkpoint: Checkpoint,
    data: str = PROCEDURAL,
    protocol: PictureProtocol = PictureProtocol(),  # noqa: B008
) -> None:
    """Draw attention of class token and query patches, similarities of patches, and main directions: PNGs and a page.

    Swin and ResNet get similarities and main directions, and the attention of a class-attention summary.

    Args:
        data: a folder or list of images, or `procedural`.
    """
    with join_ranks(checkpoint.device) as ranks:
        encoder, source = checkpoint.open(ranks), open_images(data)
        if ranks.rank == 0:
            drawn = draw_pictures(encoder, source, protocol, ranks.device, whole=data == PROCEDURAL)
            checkpoint.save_sheets("attention", drawn.sheets, f"Patch features of {encoder.name}", drawn.notes)


def relations(
    checkpoint: Checkpoint,
    data: str = PROCEDURAL,
    protocol: RelationProtocol = RelationProtocol(),  # noqa: B008
) -> None:
    """Measure and draw how much spatial and channel relations change between two views of an image (SERE, Figures 5, 6).

    Args:
        data: a folder or list of images, or `procedural`.
    """
    with join_ranks(checkpoint.device) as ranks:
        encoder = checkpoint.open(ranks)
        result = evaluate_relations(encoder, open_images(data), protocol, ranks)
        left_out = result.left_out
        notes: tuple[str, ...] = (
            (f"{left_out} pairs of views have no common part and were left out",) if left_out else ()
        )
        if result.replaced:
            notes = (*notes, f"{result.replaced} images could not be read; others took their place")
        if ranks.rank == 0:
            checkpoint.save_sheets("relations", {"relations": result.sheet}, f"Self-relations of {encoder.name}")
        checkpoint.finish(build_result(encoder, "relations", data, protocol, result.metrics, notes), ranks)


_DRAWN = """

    Args:
        out: a new folder.
        images: how many.
        size: side of an image.
        seed: other seeds give other images.
    """


def drawn(write: Callable[..., Path]) -> Callable[..., None]:
    """A writer of a layout as a command."""

    @wraps(write)
    def command(**options) -> None:
        print(f"written: {write(**options)}")

    text = write.__doc__ or ""
    command.__doc__ = text if "Args:" in text else text.rstrip() + _DRAWN
    command.__annotations__ = {**write.__annotations__, "out": Annotated[Path, POSITIONAL]}
    return command


RENDER = Commands(
    "Draw small procedural data with true labels, in the layout of a published data set.",
    {
        "davis": drawn(write_davis),
        "coco": drawn(write_coco),
        "ade20k": drawn(write_ade20k),
        "voc2012": drawn(write_voc2012),
        "imagenet-s": drawn(write_imagenet_s),
        "folder": drawn(write_folder),
        "cifar10": drawn(write_cifar10),
        "cifar100": drawn(write_cifar100),
        "flowers102": drawn(write_flowers102),
        "cars": drawn(write_cars),
        "inat2019": drawn(write_inat2019),
    },
)

COMMANDS: dict[str, Callable[..., None] | Commands] = {
    **{
        command.__name__: command
        for command in (knn, linear, finetune, semi, davis, segment, detect, attention, relations)
    },
    "render": RENDER,
}


def main(arguments: Sequence[str] | None = None, prog: str = "python -m patchlight.evaluation") -> None:
    words = sys.argv[1:] if arguments is None else arguments
    with limit_spinning(print_sentence):
        call_one_of(COMMANDS, words, prog)


if __name__ == "__main__":
    main()
