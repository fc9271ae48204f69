"""Evaluates the teacher while it trains: k-NN accuracy on labeled images, and pictures of its attention."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from ..checks import check
from ..data.crop_picture import draw_crops as draw_crop_picture
from ..data.stored import Source, Subset
from ..durable import write_whole
from ..evaluation.images import CenterCrops, Unreadable, readable
from ..evaluation.pictures.attention import class_attention_maps, draw_attention, summary_attention_maps
from ..evaluation.probes.knn import knn_accuracy
from ..evaluation.probes.labeled import LabeledImages, gallery_and_queries
from ..records import Clock, Crops, Views
from ..report.console import warn
from ..report.log_file import LogFile, number
from ..report.outlet import Outlet
from ..report.run_folder import KNN_FILE, PICTURES_FOLDER
from ..run import Run
from ..values import nearest
from .branches import Teacher
from .parallel import Mesh
from .precision import autocast

NEIGHBORS = (10, 20)
MOST_GALLERY, MOST_QUERIES, PICTURES, BATCH = 2048, 512, 4, 64


class TeacherProbe:
    """Classifies held-out images by their nearest neighbors among others, in the teacher's features.

    For procedural data, these are images that no run trains on. Of a labeled folder a fifth, at most 512, are queries; the
    run trains on those too, without their labels, so the accuracy is for comparing steps of a run, and is no benchmark.
    Every rank computes all images, as a sharded teacher needs all ranks; rank 0 writes.
    """

    def __init__(self, run: Run, source: Source, mesh: Mesh) -> None:
        self.run, self.source, self.device, self.writes = run, source, mesh.device, mesh.rank == 0
        self.folder = Path(run.output.folder)
        self.pictures = self.folder / PICTURES_FOLDER
        self.gallery, self.queries = gallery_and_queries(source, run.parallel.seed, MOST_GALLERY, MOST_QUERIES)
        self.labeled = source.labels is not None
        self.counts = [count for count in NEIGHBORS if count <= len(self.gallery)] or [len(self.gallery)]
        if run.output.best:
            self._check_best(run.output.best)
        self.looks: dict[int, float] = {}  # Output.best by step, of the results that were there before
        self.unreadable = Unreadable()
        self.results = LogFile(self.folder / KNN_FILE, warn)
        self.newest: int | None = None  # step of the last result that was there before
        self.pictures_drawn: dict[str, bytes] = {}  # by kind, since `take_pictures`
        self.drawn: Outlet[tuple[Path, bytes]] = Outlet(PICTURES_FOLDER, self._write_pictures, warn, most=16)

    def _check_best(self, best: str) -> None:
        """An error unless looks will have this number."""
        remedy = "add labels (docs/data.md), or leave it out"
        check(self.labeled, "Output.best needs labeled images", f"{best!r} for images without labels", remedy)
        known = [f"k{count}" for count in self.counts]
        rule = f"Output.best must be a number of the evaluations, {' or '.join(known)}"
        check(best in known, rule, repr(best), nearest(best, known, f"use {known[-1]}"))

    def rewind(self, clock: Clock) -> dict[str, float]:
        """Removes results that a run which goes on from here computes again: those of later steps, and all at the start.

        Returns those of the untrained teacher, if any.
        """
        untrained: dict[str, float] = {}

        def visit(line: dict) -> None:
            self.newest = line["step"]
            if (best := number(line.get(self.run.output.best))) is not None:
                self.looks[line["step"]] = best
            if line["step"] == 0:
                untrained.update(
                    {name: value for name, value in line.items() if name != "step" and number(value) is not None}
                )

        if self.writes:
            self.results.rewind(lambda line: 0 < clock.step >= line["step"], visit)
        return untrained

    def lacks(self, clock: Clock) -> bool:
        """Whether there is no result of this step: of a run's start, or of one stopped between a checkpoint and its look."""
        return self.writes and self.newest != clock.step

    def close(self) -> None:
        """Writes what could not be written before."""
        self.results.outlet.close()
        self.drawn.close()

    def draw_crops(self, views: Views) -> None:
        """A picture of the first batch's crops, and where they lie in their images."""
        if self.writes:
            self._save(draw_crop_picture(views, self.source, self.run.data.crops), "crops", 0)

    @torch.no_grad()
    def evaluate(self, teacher: Teacher, clock: Clock) -> dict[str, float]:
        """The accuracies at this step by name, which are also written to a file; draws the attention."""
        teacher.eval()  # a BatchNorm must not use or keep the statistics of these images
        try:
            with torch.compiler.set_stance("force_eager"):  # compiling for these sizes would take longer than it saves
                return self._evaluate(teacher, clock)
        finally:
            teacher.train()

    def _evaluate(self, teacher: Teacher, clock: Clock) -> dict[str, float]:
        accuracies: dict[str, float] = {}
        if self.labeled:
            (gallery, gallery_labels), queries = (self._features(teacher, p) for p in (self.gallery, self.queries))
            k = [count for count in self.counts if count <= len(gallery)] or [len(gallery)]  # some may be unreadable
            found = knn_accuracy(gallery, gallery_labels, *queries, k)
            accuracies = {f"k{count}": accuracy for count, accuracy in found.items()}
            if self.writes:
                self.results.add({"step": clock.step, **accuracies})
        if self.writes and not isinstance(next(teacher.parameters()), DTensor):  # a shard cannot be drawn alone
            self._draw_attention(teacher, clock)
        return accuracies

    def _features(self, teacher: Teacher, part: LabeledImages) -> tuple[Tensor, Tensor]:
        """The summaries of the readable images, [n, D] on the CPU, and their labels [n]."""
        rows, numbers = [], []
        for pixels, ids in self._batches(part):
            batch = pixels.unsqueeze(0)  # one crop per image, for the teacher's own forward, which gathers its shards
            crops = Crops(
                batch, batch.new_zeros(*batch.shape[:2], 4), batch.new_zeros(batch.shape[:2], dtype=torch.bool)
            )
            with autocast(self.run.parallel.precision, self.device):
                features = teacher(Views(crops, None, None, ids))
            rows.append(features.global_crops.summary[0].float().cpu())
            numbers.append(ids.cpu())
        check(bool(rows), "The teacher's evaluation needs readable images", f"none of {len(part)}", "repair the data")
        return torch.cat(rows), torch.from_numpy(part.labels)[torch.cat(numbers)]

    def _draw_attention(self, teacher: Teacher, clock: Clock) -> None:
        part = Subset(self.queries.source, self.queries.ids[:PICTURES])
        pixels, _ = next(self._batches(part), (None, None))
        if pixels is None:  # none of them can be read, which was said
            return
        backbone = teacher.backbone
        if self.run.model.summary == "cls":
            maps = class_attention_maps(backbone, backbone.blocks[-1], pixels)
        elif self.run.model.summary == "class_attention":
            maps = summary_attention_maps(teacher.summary, backbone(pixels).patches)
        else:
            return  # a mean has no attention
        images = self._unnormalized(pixels)
        self._save(draw_attention(images, maps.cpu(), backbone.grid(*pixels.shape[-2:])), "attention", clock.step)

    def _batches(self, part: Subset) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalized centers [B, 3, S, S] of the readable images, and their numbers."""
        size, (mean, std) = self.run.model.image_size, self._mean_and_std()
        centers = CenterCrops(part, np.arange(len(part)), size, resize_to=size)
        # With a generator of its own, so that a look takes no random numbers from the training.
        loader = DataLoader(centers, BATCH, generator=torch.Generator())
        for images, numbers in readable(loader, part, self.unreadable):
            yield ((images - mean * 255) / (std * 255)).to(self.device), numbers.to(self.device)

    def _mean_and_std(self) -> tuple[Tensor, Tensor]:
        crops = self.run.data.crops
        return torch.tensor(crops.mean)[:, None, None], torch.tensor(crops.std)[:, None, None]

    def _unnormalized(self, pixels: Tensor) -> np.ndarray:
        """[B, S, S, 3] uint8."""
        mean, std = self._mean_and_std()
        values = (pixels.float().cpu() * std + mean).clamp(0, 1) * 255
        return values.round().byte().permute(0, 2, 3, 1).numpy()

    def _save(self, picture, kind: str, step: int) -> None:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        self.pictures_drawn[kind] = buffer.getvalue()
        self.drawn.put((self.pictures / f"{kind}-{step:07d}.png", buffer.getvalue()))

    def take_pictures(self) -> dict[str, bytes]:
        """The pictures that were drawn since the last call, as PNG, by kind."""
        taken, self.pictures_drawn = self.pictures_drawn, {}
        return taken

    def _write_pictures(self, pictures: list[tuple[Path, bytes]]) -> None:
        for path, data in pictures:
            write_whole(path, data)
