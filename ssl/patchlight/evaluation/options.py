"""Options that several commands share, and what is done with their results."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from PIL import Image

from ..checks import check, check_choice, check_numbers
from ..report.console import print_sentence
from ..report.environment import describe_environment
from ..report.page import write_report
from ..usage import FLAT
from .checkpoints import open_checkpoint, run_folder_of
from .encoder import Encoder
from .features import Reading
from .images import PROCEDURAL
from .pictures.page import CAPTIONS, write_page
from .probes.labeled import FOLDER, LAYOUTS, LabeledData, open_labeled
from .ranks import Ranks
from .results import Result, print_result, results_folder, save_result


@dataclass(frozen=True)
class CheckpointOptions:
    """Which checkpoint is evaluated, and where."""

    checkpoint: str
    """A run's folder, a .safetensors or .pth file, the name of a timm model, or e.g. random:vit_small, an untrained one."""
    heads: int | None = None
    """Attention heads, where the checkpoint does not state them: by default 64 channels each."""
    device: str | None = None
    """cuda, cuda:1, cpu, ...; by default a GPU where there is one."""
    out: Path | None = None
    """Folder for results; by default in the run's folder or beside the file."""

    def __post_init__(self) -> None:
        check_numbers(self, heads="[1, inf)")
        known = self.device is None or re.fullmatch(r"cpu|cuda(:\d+)?", self.device)
        rule, remedy = (
            "CheckpointOptions.device must be cpu, cuda, or cuda: with a number",
            "leave it out for the fastest",
        )
        check(bool(known), rule, repr(self.device), remedy)

    @property
    def folder(self) -> Path:
        return self.out or results_folder(self.checkpoint)

    def open(self, ranks: Ranks) -> Encoder:
        encoder = open_checkpoint(self.checkpoint, self.heads).to(ranks.device)
        if ranks.rank == 0:
            for note in encoder.notes:
                print_sentence(f"note: {note}")
        return encoder

    def finish(self, result: Result, ranks: Ranks) -> None:
        """On the first rank: prints the table, writes the JSON file, and writes the run's report again."""
        if ranks.rank == 0:
            print_result(result)
            print(f"result: {save_result(result, self.folder, describe_environment())}")
            self._write_report()
        failed = f"{len(result.failed)} that failed (named above)"
        check(not result.failed, "All parts should be done", failed, "results of the others are kept")

    def save_sheets(self, kind: str, sheets: dict[str, Image.Image], title: str, notes: tuple[str, ...] = ()) -> None:
        """Saves sheets as PNG files and in one page with notes, and writes the run's report again."""
        folder = self.folder / kind
        folder.mkdir(parents=True, exist_ok=True)
        sections = []
        for name, sheet in sheets.items():
            path = folder / f"{name.replace(' ', '-')}.png"
            sheet.save(path)
            sections.append((name, CAPTIONS[name], path))
        for note in notes:
            print_sentence(f"note: {note}")
        print(f"page: {write_page(folder, title, sections, notes)}")
        self._write_report()

    def _write_report(self) -> None:
        run = run_folder_of(self.checkpoint)
        if run is not None:
            print(f"report: {write_report(run)}")


@dataclass(frozen=True)
class LabeledOptions:
    """Which labeled images are used, and how they are read."""

    data: str = PROCEDURAL
    """A folder with train/ and val/, my_file.py:my_function that returns data sets of these names, or `procedural`."""
    layout: str = FOLDER
    """folder, or the files of cifar10, cifar100, flowers102, cars or inat2019 as they are downloaded."""
    reading: Reading = field(default_factory=Reading)
    """How images are read."""

    def __post_init__(self) -> None:
        check_choice("LabeledOptions.layout", self.layout, LAYOUTS)

    def open(self) -> LabeledData:
        return open_labeled(self.data, layout=self.layout)


Checkpoint = Annotated[CheckpointOptions, FLAT]  # its options without a prefix
Labeled = Annotated[LabeledOptions, FLAT]
