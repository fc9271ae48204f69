"""A teacher as a folder for timm and the Hugging Face Hub; timm has loaded it and computed the same before it is whole."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..backbones.interface import Backbone
from ..backbones.timm_line import timm_name
from ..checkpoint.folder import FACTS, TEACHER, read_facts
from ..checkpoint.manifest import Manifest, damaged, find_damage
from ..checks import check, sentence
from ..durable import make_folder, write_whole
from ..evaluation.checkpoints import latest_step, open_checkpoint, run_folder_of
from ..evaluation.encoder_folder import EXPORTED, EXPORTED_SUMMARY, as_file
from ..evaluation.images import resize_side
from ..heads.summary import SummaryHead
from ..report.run_folder import RUN_FILE
from .comparison import check_outputs
from .files import check_installed, file_size, last_part
from .model_card import PICTURE, Card
from .run_facts import RunFacts
from .traced import Features, Teacher
from .upload import check_repository, upload

CONFIG, CARD = "config.json", "README.md"
TOLERANCE = 8.0  # as of the other exports
# timm's names of the first and the last layer, by the class of the backbone.
LAYERS = {
    "VisionTransformer": ("patch_embed.proj", "head"),
    "SwinTransformer": ("patch_embed.proj", "head.fc"),
    "ResNet": ("conv1", "fc"),
}


def export_hub(checkpoint: Path, folder: Path, push: str, private: bool, license: str, picture: bool) -> None:
    """Writes the folder, and uploads it if `push` names a repository."""
    check(bool(push) or not private, "--private is of a repository", "no --push", "add --push user/name")
    check_installed("huggingface_hub")
    if push:
        check_repository(push)
    step = _step(checkpoint)
    _check_folder(folder)
    facts = RunFacts(run_folder_of(str(step)), step, read_facts(step))
    teacher = _open(step)
    _check_norm(teacher)
    name, options = _timm_name(teacher, facts.run["model"]["image_size"])
    files = _write_model(teacher, step, folder, timm_config(teacher, name, options))
    shared = {"clock": facts.clock, "run": facts.shareable_run()}
    write_whole(folder / RUN_FILE, json.dumps(shared["run"], indent=1))
    write_whole(folder / FACTS, json.dumps(shared, indent=1))
    card = Card(facts, teacher, name, options, push or f"user/{last_part(folder.absolute())}", license)
    shown = facts.picture() if picture else None
    if shown is not None:
        write_whole(folder / PICTURE, shown.read_bytes())
        files.append(PICTURE)
        print(f"{CARD} shows {shown.name} of the run, which holds images that it has read; --no-picture leaves it out.")
    elif (folder / PICTURE).exists():
        (folder / PICTURE).unlink()  # of an earlier export
    write_whole(folder / CARD, card.text(shown.name if shown else ""))
    for line in facts.left_out():
        print(line)
    files += [RUN_FILE, FACTS, CARD]
    print(f"folder: {folder} ({', '.join(sorted(files))}; {EXPORTED}: {file_size(folder / EXPORTED)})")
    if push:
        print(f"repository: {upload(folder, push, private, files)}")


def _step(checkpoint: Path) -> Path:
    """The checkpoint to export: only those of runs have the facts that the folder needs."""
    if not checkpoint.is_dir() or (checkpoint / EXPORTED).is_file():
        kind = "an exported folder" if checkpoint.is_dir() else "a file" if checkpoint.exists() else "nothing there"
        rule = "--checkpoint must be a run's folder or one of its checkpoints"
        raise FileNotFoundError(sentence(rule, f"{checkpoint}, {kind}", "pass the folder that --output.folder named"))
    return latest_step(checkpoint)


def _check_folder(folder: Path) -> None:
    """An error unless the folder may be written: nothing but an earlier export is replaced."""
    rule, remedy = "--folder must be new, empty, or of an earlier export", "choose another folder"
    check(not folder.exists() or folder.is_dir(), rule, f"{folder}, which is a file", remedy)
    earlier = (folder / CONFIG).is_file() and (folder / EXPORTED).is_file() and (folder / FACTS).is_file()
    empty = not folder.exists() or not any(folder.iterdir())
    check(empty or earlier, rule, f"{folder}, which holds other files", remedy)


def _open(step: Path) -> Teacher:
    encoder = open_checkpoint(str(step))
    return Teacher(Features(encoder).eval().requires_grad_(False), encoder.input_format.image_size, {})


def _check_norm(teacher: Teacher) -> None:
    """An error unless timm has the norm that ends the network; a ResNet has none, but its class attention may."""
    backbone = teacher.encoder.backbone
    lacks = isinstance(backbone, Backbone) and backbone.norm_eps is None and _kind(teacher) == "class_attention"
    rule, got = (
        "timm must have the norm that ends the network",
        "class attention on a ResNet, which has a norm of its own",
    )
    check(not lacks, rule, got, "patchlight export onnx and torch write the whole network")


def _timm_name(teacher: Teacher, image_size: int) -> tuple[str, dict[str, Any]]:
    backbone = teacher.encoder.backbone
    assert isinstance(backbone, Backbone)  # of a run
    shapes = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
    return timm_name(shapes, backbone.heads, image_size)


def timm_config(teacher: Teacher, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """What timm reads from config.json: the model, its options, and how its images are prepared."""
    encoder, size = teacher.encoder, teacher.size
    first, last = LAYERS[type(encoder.backbone).__name__]
    prepared = {
        "input_size": [3, size, size],
        "fixed_input_size": first != "conv1",  # a ResNet has no table of positions
        "interpolation": "bicubic",
        "crop_pct": math.floor(1e4 * size / resize_side(size, whole=False)) / 1e4,  # timm rounds the other side down
        "crop_mode": "center",
        "mean": list(encoder.input_format.mean),
        "std": list(encoder.input_format.std),
    }
    weights = {"num_classes": 0, "custom_load": False, "first_conv": first, "classifier": last}
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": encoder.width,
        "global_pool": "token" if encoder.backbone.has_class_token else "avg",
        "model_args": options,
        "pretrained_cfg": prepared | weights,
    }


def _write_model(teacher: Teacher, step: Path, folder: Path, config: dict[str, Any]) -> list[str]:
    """Writes weights and configuration beside the folder, checks them with timm, and moves them in. Returns their names."""
    wrong = find_damage(step, Manifest.read(step), [TEACHER])
    if wrong:
        raise damaged(step, wrong[0])
    make_folder(folder)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as beside:
        made = Path(beside)
        write_whole(made / CONFIG, json.dumps(config, indent=2))
        write_whole(made / EXPORTED, as_file(load_file(step / TEACHER)))
        if _kind(teacher) == "class_attention":  # which timm does not have
            write_whole(made / EXPORTED_SUMMARY, as_file(teacher.encoder.summary.state_dict()))
        check_with_timm(teacher, made)
        (folder / EXPORTED_SUMMARY).unlink(missing_ok=True)  # of an earlier export
        names = [path.name for path in made.iterdir()]
        for name in names:
            (made / name).replace(folder / name)
    return names


def _kind(teacher: Teacher) -> str:
    """Of the summary, as in Model.summary."""
    head = teacher.encoder.summary
    assert isinstance(head, SummaryHead)  # of a run
    return head.kind


def check_with_timm(teacher: Teacher, folder: Path) -> None:
    """An error unless timm, which loads the folder as its users do, computes what the teacher computes."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    pooled = _kind(teacher) != "class_attention"  # timm takes the mean of the patches then
    outputs = ("summary", "patches") if pooled else ("patches",)
    check_outputs(teacher, lambda pixels: timm_outputs(model, pixels)[-len(outputs) :], TOLERANCE, outputs)


@torch.no_grad()
def timm_outputs(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The summary [M, D] and the patches [M, N, D] of a timm model without a classifier."""
    features = model.forward_features(pixels)
    summary = model.forward_head(features, pre_logits=True)
    if features.ndim == 3:  # a ViT's tokens
        return summary, features[:, model.num_prefix_tokens :]
    channels_last = isinstance(getattr(model, "norm", None), nn.Module)  # Swin's
    return summary, features.flatten(1, 2) if channels_last else features.flatten(2).mT
