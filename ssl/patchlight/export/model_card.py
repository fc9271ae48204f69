"""The model card of an exported teacher: what the run recorded, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..heads.summary import SummaryHead
from ..report.log_file import number
from .files import last_part
from .markdown import code, escaped, quoted, table, word
from .papers import METHODS, kinds_of, methods_of, papers_of
from .run_facts import RunFacts
from .traced import Teacher
from .training_tables import objectives_table, recipe_table, training_rows

PROJECT = "https://github.com/patchlight/patchlight"
PICTURE = "picture.png"  # its name beside the card
SUMMARIES = {
    "cls": "the class token",
    "mean": "the mean of the patches",
    "class_attention": "a learned token that attends to the patches (class attention, in `summary.safetensors`)",
}
MOST_LOOKS = 10


@dataclass(frozen=True)
class Card:
    """Everything that the card is written from."""

    facts: RunFacts
    teacher: Teacher
    timm_name: str
    timm_options: Mapping[str, Any]
    repository: str  # user/name on the Hub
    license: str  # empty: not known

    @property
    def run(self) -> dict[str, Any]:
        return self.facts.shareable_run()

    @property
    def methods(self) -> list[str]:
        return methods_of(self.run)

    @property
    def kind(self) -> str:
        """Of the summary, as in Model.summary."""
        head = self.teacher.encoder.summary
        assert isinstance(head, SummaryHead)  # of a run
        return head.kind

    def text(self, picture: str = "") -> str:
        """The whole file. picture: the name of that whose copy is beside it."""
        title = f"# {escaped(' + '.join(self.methods))}, {escaped(self.run['model']['arch'])}/{self.run['model']['patch_size']}"
        parts = [
            self._front_matter(),
            title,
            self._what_it_is(),
            self._picture(picture),
            self._loading(),
            self._use(),
            self._training(),
            self._results(),
            self._license(),
            self._citation(),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _front_matter(self) -> str:
        from huggingface_hub import ModelCardData

        tags = ["timm", "patchlight", "self-supervised-learning", *map(word, self.methods)]
        data = ModelCardData(
            license=self.license or None,
            library_name="timm",
            pipeline_tag="image-feature-extraction",
            tags=list(dict.fromkeys(tags)),
        )
        return f"---\n{data.to_yaml()}\n---"

    def _what_it_is(self) -> str:
        encoder, size, patch = self.teacher.encoder, self.teacher.size, self.teacher.encoder.patch_size
        about = (
            f"A vision backbone, pretrained without labels by {escaped(' + '.join(self.methods))} with "
            f"[patchlight]({PROJECT}). It turns an image into one vector (the summary) and one vector per patch. It is the "
            "teacher of the run: the moving average of the network that was trained."
        )
        options = "".join(f", {name}={escaped(value)}" for name, value in self.timm_options.items())
        million = sum(p.numel() for _, p in encoder.backbone.named_parameters()) / 1e6
        rows = [
            ("backbone", f"{escaped(self.run['model']['arch'])}, {million:.1f} million parameters, fp32"),
            ("name in timm", f"`{self.timm_name}`{options}"),
            ("input", f"RGB, {size} x {size} pixels, values in 0..1, minus the mean, divided by std"),
            ("mean, std", f"{_numbers(encoder.input_format.mean)}; {_numbers(encoder.input_format.std)}"),
            ("patches", f"{(size // patch) ** 2} per image, each of {patch} x {patch} pixels"),
            ("width", f"{encoder.width} numbers per vector"),
            ("summary", SUMMARIES[self.kind]),
        ]
        return f"{about}\n\n{table(('property', 'value'), rows)}"

    def _picture(self, name: str) -> str:
        if not name:
            return ""
        what = "What the summary attends to" if name.startswith("attention") else "Crops of the first batch"
        return f"![{what}]({PICTURE})\n\n{what}: a picture that the run has drawn."

    def _loading(self) -> str:
        prefix = int(self.teacher.encoder.backbone.has_class_token)
        arch = self.timm_name.partition("_")[0]
        patches = {
            "vit": f"features[:, {prefix}:]" if prefix else "features",
            "swin": "features.flatten(1, 2)",
        }.get(arch, "features.flatten(2).mT")
        summary = (
            "# the mean of the patches: timm has no class attention" if self.kind == "class_attention" else "# [1, D]"
        )
        lines = [
            "import timm",
            "import torch",
            "from PIL import Image",
            "",
            f"model = timm.create_model({quoted(f'hf-hub:{self.repository}')}, pretrained=True).eval()  # or local-dir:FOLDER",
            "prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
            'pixels = prepare(Image.open("image.jpg").convert("RGB"))[None]',
            "with torch.no_grad():",
            "    features = model.forward_features(pixels)",
            f"    patches = {patches}  # [1, N, D], row by row",
            f"    summary = model(pixels)  {summary}",
        ]
        ours = [
            "import patchlight",
            "",
            f"encoder = patchlight.load_teacher({quoted(f'hf-hub:{self.repository}')})  # or this folder",
            "encoded = encoder(encoder.normalize(images))  # [M, 3, H, W] uint8",
            "encoded.summary, encoded.patches",
        ]
        return "\n\n".join(
            ["## How to load", code("\n".join(lines), "python"), "With patchlight:", code("\n".join(ours), "python")]
        )

    def _use(self) -> str:
        return (
            "## Use and limits\n\n"
            "It is meant as a source of features for images like those that it has seen (retrieval, classification, dense "
            "prediction), frozen or as a start for fine-tuning; it has no classifier. Nothing was measured but the numbers "
            "in this card: on other images, and for decisions about people, its features are untested, and they carry whatever "
            "is one-sided in the images that it was trained on."
        )

    def _training(self) -> str:
        weights = self.run["objectives"]["weights"]
        given = ", ".join(f"{escaped(name)} {value:g}" for name, value in weights.items())
        return "\n\n".join(
            [
                "## Training",
                table(("training", "value"), training_rows(self.facts)),
                objectives_table(self.run),
                f"Weights of loss terms: {given}; 1 for all others." if given else "All loss terms have the weight 1.",
                recipe_table(self.run, self.facts.facts["processes"]),
                "<details><summary>All settings (run.json)</summary>",
                code(json.dumps(self.run, indent=1, ensure_ascii=False), "json"),
                "</details>",
            ]
        )

    def _results(self) -> str:
        parts = []
        if looks := self.facts.looks:
            names = list(dict.fromkeys(name for line in looks for name in line if name != "step"))
            rows = [[str(line["step"]), *(_percent(line.get(name)) for name in names)] for line in looks[-MOST_LOOKS:]]
            shown = f" The last {len(rows)} of {len(looks)} looks." if len(looks) > len(rows) else ""
            parts.append(
                "k-NN accuracy in percent, as the run has measured it on its own data (k neighbors vote): it compares steps of "
                f"this run and is no benchmark.{shown}"
            )
            parts.append(table(("step", *names), rows))
        if results := self.facts.results:
            parts.append("Measured by `patchlight evaluate`, in percent:")
            parts.append(table(("task", "data", "numbers", "protocol"), [_result_row(result) for result in results]))
        return "\n\n".join(["## Results", *parts]) if parts else ""

    def _license(self) -> str:
        if self.license:
            return f"## License\n\nThe weights: {escaped(self.license)}."
        return (
            "## License\n\nNone is stated yet: it is for those who trained these weights to choose one that the training images "
            "allow, and to write it at the head of this file (`license: ...`)."
        )

    def _citation(self) -> str:
        parts = []
        if papers := papers_of(self.run):
            entries = "\n\n".join(paper.bibtex() for paper in papers)
            parts += ["The papers of the methods that trained it:", code(entries, "bibtex")]
        if others := [kind for kind in kinds_of(self.run) if kind not in METHODS]:
            parts.append(f"{escaped(', '.join(others))}: an objective of other authors, whose paper is not known here.")
        return "\n\n".join(["## Citation", *parts]) if parts else ""


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _percent(share: object) -> str:
    measured = number(share)
    return "" if measured is None else f"{100 * measured:.2f}"


def _result_row(result: Mapping[str, Any]) -> tuple[str, ...]:
    metrics = ", ".join(f"{escaped(name)} {_percent(value)}" for name, value in result["metrics"].items())
    changed = ", ".join(f"{escaped(name)} {escaped(used)}" for name, (_, used) in result["changed"].items())
    protocol = f"changed: {changed}" if changed else "the published one"
    return escaped(result["task"]), escaped(last_part(result["data"])), metrics, protocol
