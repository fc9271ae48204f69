"""Opens checkpoints: a run's folder, an exported folder, a teacher.safetensors, a published file, a timm model by name, or a
backbone at random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from ..backbones.architectures import build_backbone, capabilities_of
from ..backbones.interface import Backbone
from ..backbones.published import MAY_START_ANEW, read_published, without_ones
from ..backbones.timm_backbone import TimmBackbone
from ..backbones.weight_file import read_tensors
from ..checkpoint.folder import FACTS, complete, load_tensors, read_facts
from ..checkpoint.manifest import MANIFEST
from ..checks import sentence
from ..heads.summary import ClassTokenSummary, MeanSummary, build_summary
from .encoder import Encoder, InputFormat
from .encoder_folder import EXPORTED, EXPORTED_SUMMARY, is_described, read_encoder
from .file_backbones import build_from_shapes
from .random_start import RANDOM, open_random

HUB = "hf-hub:"  # as timm writes it
# timm's options, by its modules, with which models take images of any size.
ANY_SIZE: dict[str, dict[str, Any]] = {
    "vision_transformer": {"dynamic_img_size": True},
    "swin_transformer": {"strict_img_size": False},
    "swin_transformer_v2": {"strict_img_size": False},
}
_MEAN_NOTE = "an image is summed up by the mean of its patches"


def open_checkpoint(checkpoint: str, heads: int | None = None) -> Encoder:
    """An encoder in eval mode on the CPU.

    checkpoint: a run's folder (its latest checkpoint), one step's folder, what `patchlight export hub` wrote or uploaded
    ("hf-hub:user/name"), a .safetensors or .pth file, timm's name, or "random:vit_small", a backbone of this library as
    it is before any training. Of files with several networks the one that their
    authors evaluate is taken. heads: attention heads, which a file of weights does not state. Runs of this library record
    them; others are taken to have 64 channels per head (MoCo v3's ViT-S has 12 heads).
    """
    if checkpoint.startswith(RANDOM):
        return open_random(checkpoint, heads).eval()
    if checkpoint.startswith(HUB):
        return _open_file(_download(checkpoint) / EXPORTED, heads, checkpoint).eval()
    path = Path(checkpoint)
    folder = path.parent if path.name == EXPORTED else path
    if is_described(folder):
        return read_encoder(folder).eval()
    if path.is_dir():
        return _open_folder(path).eval()
    if path.is_file():
        return _open_file(path, heads).eval()
    if path.suffix or "/" in checkpoint or not timm.is_model(checkpoint):
        rule, got = (
            "A checkpoint must be a folder, a file or the name of a timm model",
            f"{checkpoint!r}, which is none",
        )
        raise FileNotFoundError(sentence(rule, got, "check the path, or list names with timm.list_models()"))
    return _open_timm(checkpoint).eval()


def run_folder_of(checkpoint: str) -> Path | None:
    """The folder of the run that a checkpoint belongs to; None for a checkpoint of no run of this library."""
    if not Path(checkpoint).exists():
        return None
    path = Path(checkpoint).resolve()
    return next((folder for folder in (path, *path.parents) if (folder / "run.json").is_file()), None)


def latest_step(path: Path) -> Path:
    """The folder of a run's latest complete checkpoint, or of the one checkpoint that the path is."""
    steps = [path] if (path / MANIFEST).exists() else complete(path / "checkpoints")
    if not steps:
        rule, got = "A run's folder must hold a complete checkpoint", f"none in {path / 'checkpoints'}"
        raise FileNotFoundError(sentence(rule, got, "train until the first save, or pass a file"))
    return steps[-1]


def facts_of(checkpoint: str) -> dict[str, Any] | None:
    """The facts of the run that made a checkpoint, as far as they are beside it; None where there are none."""
    path = Path(checkpoint)
    if path.is_dir() and not (path / EXPORTED).is_file():
        return read_facts(latest_step(path))
    facts = path / FACTS if path.is_dir() else path.with_name(FACTS)
    if not path.exists() or not facts.exists():
        return None
    if is_described(facts.parent) and "run" not in json.loads(facts.read_text()):
        return None  # of an encoder that no run made
    run = _read_run(facts)  # which names what is wrong with the file
    return {**json.loads(facts.read_text()), "run": run}


def _open_folder(path: Path) -> Encoder:
    if (path / EXPORTED).is_file():
        return _open_file(path / EXPORTED, None, str(path))
    step = latest_step(path)
    run = read_facts(step)["run"]
    backbone = _build_backbone_of_run(run["model"])
    assert isinstance(backbone, nn.Module)
    summary = build_summary(run["model"]["summary"], backbone)
    state = {
        "teacher": {f"backbone.{n}": t for n, t in backbone.state_dict().items()}
        | {f"summary.{n}": t for n, t in summary.state_dict().items()}
    }
    load_tensors(step, state)  # into the tensors themselves
    return Encoder(backbone, summary, str(step), _input_format(run))


def _download(name: str) -> Path:
    """The folder of an exported teacher on the Hugging Face Hub."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.removeprefix(HUB).partition("@")
    files = [EXPORTED, EXPORTED_SUMMARY, FACTS]
    try:
        folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=files))
    except Exception as error:  # the Hub's own errors, the network's, and those of the folder of downloads
        rule, got = f"{HUB} needs a repository of the Hugging Face Hub that can be read", first_line(error)
        raise OSError(
            sentence(rule, f"{name}: {got}", "check the name and the network, or run hf auth login")
        ) from error
    if not (folder / EXPORTED).is_file() or not (folder / FACTS).is_file():
        rule, got = f"{HUB} needs a repository that patchlight export hub made", f"{name} without {EXPORTED} or {FACTS}"
        raise FileNotFoundError(sentence(rule, got, "pass timm's own name of a model, or a file of its weights"))
    return folder


def first_line(error: Exception) -> str:
    """What an error of another library says first, as a part of a sentence."""
    text = (str(error).strip() or "no reason").splitlines()[0].rstrip(":. ")
    return f"{type(error).__name__} ({text})"


def _open_file(path: Path, heads: int | None, name: str = "") -> Encoder:
    """name: of the encoder, if it is not the file's path."""
    published, facts = read_published(path), path.with_name(FACTS)
    run = _read_run(facts) if facts.exists() else None
    summary_weights = _under("summary.", published.weights) or _read_summary(path.with_name(EXPORTED_SUMMARY), path)
    weights = {name: t for name, t in published.weights.items() if not name.startswith("summary.")}
    if run:
        backbone, input_format = _build_backbone_of_run(run["model"]), _input_format(run)
    else:
        backbone, size = build_from_shapes(weights, path, heads)
        input_format = InputFormat(size)
    notes = [] if run else [f"layout of {published.layout}"]
    summary: nn.Module
    if summary_weights:
        summary = build_summary("class_attention", backbone)
        _load_weights(summary, summary_weights, path)
        if not _under("norm.", backbone.state_dict()):  # it is the summary's
            weights = {name: t for name, t in weights.items() if not name.startswith("norm.")}
    elif backbone.has_class_token:
        summary = ClassTokenSummary()
    else:
        if run["model"]["summary"] != "mean" if run else backbone.returns_blocks:  # a Swin or a ResNet has none
            notes.append(f"no summary head in the file: {_MEAN_NOTE}")
        norm = _under("norm.", weights)
        summary = build_summary("mean", backbone) if norm or backbone.norm_eps is None else MeanSummary()
        if norm and not _under("norm.", backbone.state_dict()):
            _load_weights(summary.get_submodule("norm"), norm, path)
            weights = {name: t for name, t in weights.items() if not name.startswith("norm.")}
        elif not norm and backbone.norm_eps is not None:
            notes.append("no final norm in the file: patches are the raw residual stream")
    _load_weights(backbone, weights, path)
    if left_out := published.beside:
        notes.append(f"{len(left_out)} tensors are no part of the backbone and were left out, such as {left_out[0]}")
    return Encoder(backbone, summary, name or str(path), input_format, tuple(notes))


def _read_summary(path: Path, weights: Path) -> dict[str, Tensor]:
    """The class attention beside the weights of an exported folder, if there is one."""
    return read_tensors(path) if weights.name == EXPORTED and path.is_file() else {}


def _read_run(facts: Path) -> dict[str, Any]:
    """The run that made the file beside these facts."""
    try:
        run = json.loads(facts.read_text())["run"]
        return {**run, "model": dict(run["model"]), "data": dict(run["data"])}
    except (ValueError, KeyError, TypeError, OSError) as error:
        rule, got = f"{FACTS} beside weights must describe their run", f"{type(error).__name__}: {error} in {facts}"
        raise ValueError(
            sentence(rule, got, "copy both files of the checkpoint again, or the weights alone")
        ) from error


def _under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights whose names start with the prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}


def _build_backbone_of_run(model: dict[str, Any]) -> Backbone:
    """The backbone of a run of this library, from the model in its facts."""
    options = {"patch_size": model["patch_size"], "image_size": model["image_size"], **model["sizes"]}
    if "class_token" in capabilities_of(model["arch"]):
        options |= {"class_token": model["summary"] == "cls"}
        options |= {name: model[name] for name in ("position_resize", "positions") if name in model}
    return build_backbone(model["arch"], **options)


def _load_weights(module: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Copies the weights, which must be exactly the module's own but for a mask token."""
    expected = module.state_dict()
    missing = [name for name in expected if name not in weights and not MAY_START_ANEW.fullmatch(name)]
    unknown = [name for name in weights if name not in expected]
    common = [name for name in expected if name in weights]
    wrong = [name for name in common if without_ones(weights[name].shape) != without_ones(expected[name].shape)]
    if missing or unknown or wrong:
        rule = "A checkpoint must fit the network of its shapes"
        got = (
            f"{len(missing)} tensors missing, {len(unknown)} unknown and {len(wrong)} of another size in {path}, such as"
            f" {(missing + unknown + wrong)[0]}"
        )
        raise ValueError(sentence(rule, got, "use timm's name if timm knows the model"))
    module.load_state_dict(expected | {name: weights[name].reshape(expected[name].shape) for name in common})


def _input_format(run: dict[str, Any]) -> InputFormat:
    crops = run["data"]["crops"]
    return InputFormat(run["model"]["image_size"], tuple(crops["mean"]), tuple(crops["std"]))


def _open_timm(name: str) -> Encoder:
    options = ANY_SIZE.get(timm.model_entrypoint(name).__module__.rpartition(".")[2], {})
    backbone = TimmBackbone(timm.create_model(name, pretrained=True, num_classes=0, **options))
    config = backbone.model.pretrained_cfg
    summary = ClassTokenSummary() if backbone.has_class_token else MeanSummary()
    notes = () if backbone.has_class_token else (f"no class token: {_MEAN_NOTE}",)
    input_format = InputFormat(config["input_size"][-1], tuple(config["mean"]), tuple(config["std"]))
    return Encoder(backbone, summary, f"timm {name}", input_format, notes)
