"""Fine-tuning: protocols by data set, what is saved is what was trained, and ranks agree."""

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from engine.tiny_run import SELFPATCH, on_processes, tiny_run, tiny_trainer
from parity import SEED
from safetensors.torch import load_file, save_file

from patchlight.backbones.architectures import build_backbone
from patchlight.backbones.timm_backbone import TimmBackbone
from patchlight.evaluation.__main__ import finetune, main
from patchlight.evaluation.checkpoints import facts_of, open_checkpoint
from patchlight.evaluation.encoder import Encoder, InputFormat
from patchlight.evaluation.encoder_folder import write_encoder
from patchlight.evaluation.features import Reading
from patchlight.evaluation.layouts.labeled import write_cifar10, write_folder
from patchlight.evaluation.probes.finetune import RepeatedBatches, save_classifier, train_classifier
from patchlight.evaluation.probes.finetune_protocols import FinetuneProtocol, SemiProtocol, published_finetune
from patchlight.evaluation.probes.labeled import open_labeled
from patchlight.evaluation.ranks import Ranks, join_ranks
from patchlight.export.traced import open_teacher
from patchlight.heads.summary import ClassTokenSummary, MeanSummary, build_summary
from patchlight.usage import Group

CPU = Ranks(torch.device("cpu"))
READING = Reading(batch=16, workers=0)
SHORT = FinetuneProtocol(epochs=1, batch=8, warmup_epochs=0, rate=1e-2, drop_path=0.2, size=32)


@pytest.mark.parametrize(
    ("layout", "values"),
    [  # SERE, 4.2; run.sh and evaluation/README.md of iBOT's release: rates of 768 images, 1.5 times those of 512
        ("folder", (100, 512, 1e-3, 1e-6, 0.65, 0.25, 1)),
        ("cifar10", (1000, 768, 1.125e-5, 1e-5, 1.0, 0.25, 3)),
        ("cifar100", (1000, 768, 1.125e-5, 1e-5, 1.0, 0.25, 3)),
        ("flowers102", (1000, 768, 1.125e-5, 1e-5, 1.0, 0.25, 3)),
        ("cars", (1000, 768, 1.125e-4, 1e-5, 1.0, 0.25, 3)),
        ("inat2019", (360, 768, 3.75e-5, 1e-5, 1.0, 0.1, 3)),
    ],
)
def test_every_layout_starts_from_its_published_protocol(layout, values):
    published = published_finetune(layout)
    names = "epochs", "batch", "rate", "min_rate", "layer_decay", "erase", "repeats"
    assert [getattr(published, name) for name in names] == pytest.approx(values, rel=1e-12)
    assert (published.warmup_epochs, published.weight_decay, published.drop_path) == (5, 0.05, 0.1)
    assert (published.randaugment, published.mixup, published.cutmix) == ("rand-m9-mstd0.5-inc1", 0.8, 1.0)
    for words in (["--layout", layout], [f"--layout={layout}", "--protocol.batch", "9"]):
        assert Group.of_function(finetune, words).defaults["protocol"] == published
    assert Group.of_function(finetune, []).defaults["protocol"] == FinetuneProtocol()
    shown = {s.flag: s.default for s in Group.of_function(finetune, ["--layout", layout]).settings}
    assert shown["--protocol.epochs"] == values[0]


def test_a_protocol_is_compared_with_that_of_its_data(tmp_path, run_folder, monkeypatch, capsys):
    write_cifar10(tmp_path / "cifar", 20, 32, SEED)
    monkeypatch.setattr("patchlight.evaluation.__main__.train_classifier", lambda *_: None)
    monkeypatch.setattr("patchlight.evaluation.__main__.evaluate_classifier", lambda *_: {"top1": 0.5})

    def changed(*words):
        main(["finetune", "--checkpoint", str(run_folder), "--out", str(tmp_path / "out"), *words])
        (path,) = (tmp_path / "out").glob("finetune-*.json")
        return json.loads(path.read_text())["changed"]

    cifar = "--layout", "cifar10", "--data", str(tmp_path / "cifar")
    assert changed(*cifar) == {}
    assert changed(*cifar, "--protocol.epochs", "100") == {"epochs": [1000, 100]}
    with pytest.raises(SystemExit, match=r"layout must be one of folder, cifar10, .*, got 'cifar'"):
        main(["finetune", "--checkpoint", str(run_folder), "--layout", "cifar"])


def run_encoder(folder, **parts) -> str:
    """The folder of a run that was not trained, of which a checkpoint is saved."""
    trainer = tiny_trainer(tiny_run(folder, **parts))
    trainer.save()
    (folder / "run.json").write_text(json.dumps(trainer.run.to_dict()))
    return str(folder)


def published_vit(folder) -> str:
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=224, patch_size=32, embed_dim=36, depth=2, num_heads=3, num_classes=0, mlp_ratio=3
    )
    torch.save({"teacher": {f"backbone.{n}": t for n, t in vit.state_dict().items()}}, folder / "vit.pth")
    return str(folder / "vit.pth")


KINDS = {
    "a run": lambda folder: run_encoder(folder / "run"),
    "class attention": lambda folder: run_encoder(folder / "run", options=(SELFPATCH,)),
    "a published file": published_vit,
    "a ViT of timm": lambda folder: "vit_tiny_patch16_224",
    "a ResNet of timm": lambda folder: "resnet18",
}


def own_encoder(arch: str, summary: str, **sizes) -> Encoder:
    torch.manual_seed(SEED)
    backbone = build_backbone(arch, **sizes)
    head = ClassTokenSummary() if summary == "cls" else build_summary(summary, backbone)
    return Encoder(backbone, head, f"random {arch}", InputFormat(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), ("a note",))


VIT = {"width": 24, "depth": 2, "heads": 2, "patch_size": 8, "image_size": 32}
SWIN = {"image_size": 32, "stem_width": 16, "depth": 2, "head_width": 8, "window": 3}
OWN = {
    "Swin": ("swin_tiny", "mean", SWIN | {"patch_size": 16}),
    "Swin with class attention": ("swin_tiny", "class_attention", SWIN | {"depth": 1, "head_width": 4, "window": 5}),
    "ResNet": ("resnet18", "mean", {"image_size": 32, "stem_width": 8, "depths": (1, 2, 1, 1)}),
    "bottlenecks": ("resnet50", "mean", {"image_size": 32, "stem_width": 4, "depths": (1, 1, 2, 1)}),
    "fixed positions": ("vit_tiny", "cls", VIT | {"positions": "sincos", "position_resize": "size"}),
    "mean of a ViT": ("vit_tiny", "mean", VIT | {"class_token": False, "mlp_ratio": 2.5}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return open_labeled(str(write_folder(root / "images", 20, 32, SEED)))


def features(encoder: Encoder) -> list[torch.Tensor]:
    """Of two images, one of them of a size that the encoder was not made for."""
    with torch.no_grad():
        size = encoder.input_format.image_size
        found = []
        for side in (size, size + encoder.patch_size):
            torch.manual_seed(SEED)
            encoded = encoder(encoder.normalize(torch.rand(2, 3, side, side) * 255))
            found += [encoded.summary, encoded.patches]
        return found


def check_saved(encoder, data, folder, protocol=SHORT, facts=None) -> Encoder:
    """Trains and saves an encoder; the one that is opened must compute the same, bit for bit."""
    before = [tensor.clone() for tensor in encoder.state_dict().values()]
    model = train_classifier(encoder, data.train, data, protocol, CPU, READING)
    assert any(not torch.equal(a, b) for a, b in zip(before, encoder.state_dict().values(), strict=True))
    save_classifier(folder, model, data, protocol, {"top1": 0.25}, facts)
    for path in (folder, folder / "model.safetensors"):
        opened = open_checkpoint(str(path))
        assert not opened.training
        assert all(torch.equal(*pair) for pair in zip(features(opened), features(encoder), strict=True))
        assert opened.input_format == encoder.input_format
    assert opened.notes == (*encoder.notes, f"fine-tuned on {data.name}, 25.00 % top1")
    assert opened.state_dict().keys() == encoder.state_dict().keys()
    made = json.loads((folder / "facts.json").read_text())["finetuned"]
    assert (made["data"], made["classes"], made["top1"]) == (data.name, 10, 0.25)
    assert FinetuneProtocol(**made["protocol"]) == protocol
    head = load_file(folder / "classifier.safetensors")
    assert torch.equal(head["weight"], model.head.weight)
    assert not list(folder.parent.glob(".*")), "nothing but the folder is left"
    return opened


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_checkpoint_is_opened_again(kind, data, tmp_path, monkeypatch):
    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **kw: make(name, pretrained=False, **kw))
    checkpoint = KINDS[kind](tmp_path)
    encoder = open_checkpoint(checkpoint, heads=3 if kind == "a published file" else None)
    facts = facts_of(checkpoint)
    opened = check_saved(encoder, data, tmp_path / "saved here", replace(SHORT, batch=10, size=32), facts)
    assert (facts_of(str(tmp_path / "saved here")) is None) == (facts is None)
    names = {path.name for path in (tmp_path / "saved here").iterdir()}
    assert ("summary.safetensors" in names) == (kind == "class attention")
    if "timm" not in kind and facts:
        assert facts_of(str(tmp_path / "saved here"))["run"] == facts["run"]
        open_teacher(str(tmp_path / "saved here"), None, 16)
    again = check_saved(opened, data, tmp_path / "again", replace(SHORT, batch=10, size=32))
    assert len(again.notes) == len(encoder.notes) + 2


@pytest.mark.parametrize("kind", OWN)
def test_every_backbone_of_ours_is_saved(kind, data, tmp_path):
    arch, summary, sizes = OWN[kind]
    encoder = own_encoder(arch, summary, **sizes)
    opened = check_saved(encoder, data, tmp_path / "saved")
    assert type(opened.backbone) is type(encoder.backbone)
    if arch.startswith("resnet"):
        assert opened.backbone.bn1.num_batches_tracked == 2
        assert not torch.equal(opened.backbone.bn1.running_mean, torch.zeros(opened.backbone.bn1.num_features))
    if kind == "fixed positions":
        assert opened.backbone.position_resize == "size"
    weights = load_file(tmp_path / "saved/model.safetensors")
    assert "mask_token" not in weights
    assert ("norm.weight" in weights) == (not arch.startswith("resnet"))


def test_a_swin_of_timm_keeps_its_option(tmp_path):
    """Without it, timm refuses images of another size."""
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, strict_img_size=False)
    encoder = Encoder(TimmBackbone(swin), MeanSummary(), "timm swin", InputFormat()).eval()
    write_encoder(tmp_path / "saved", encoder, {}, {})
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(open_checkpoint(str(tmp_path / "saved"))(pixels).summary, encoder(pixels).summary)


def test_a_folder_that_holds_anything_is_refused_first(data, tmp_path, run_folder, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")

    def never(*_):
        raise AssertionError("hours of training")

    monkeypatch.setattr("patchlight.evaluation.__main__.train_classifier", never)
    command = "finetune", "--checkpoint", str(run_folder), "--data", data.name, "--save"
    with pytest.raises(SystemExit, match=r"The folder of --save must be new or empty, got .*mine, which holds files"):
        main([*command, str(tmp_path / "mine")])
    with pytest.raises(SystemExit, match=r"got .*thesis.txt, which is a file; choose another"):
        main([*command, str(tmp_path / "mine" / "thesis.txt")])
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_commands_pass_a_network_on(tmp_path, run_folder, capsys):
    """SERE's ImageNet-S after fine-tuning: `finetune --save`, then another command with the folder as its checkpoint."""
    data, saved = write_cifar10(tmp_path / "cifar", 20, 32, SEED), tmp_path / "saved"
    common = "--layout", "cifar10", "--data", str(data), "--reading.workers", "0"
    short = "--protocol.epochs", "1", "--protocol.warmup-epochs", "0", "--protocol.batch", "8"
    main(["finetune", "--checkpoint", str(run_folder), *common, *short, "--save", str(saved)])
    assert f"saved: {saved}" in capsys.readouterr().out
    main(["semi", "--checkpoint", str(saved), *common, *short, "--share", "0.5", "--save", str(tmp_path / "next")])
    main(["knn", "--checkpoint", str(tmp_path / "next"), *common, "--protocol.k", "3"])
    assert "note: fine-tuned on" in capsys.readouterr().out
    result = json.loads((tmp_path / "next-evaluation" / "knn-cifar.json").read_text())
    assert result["checkpoint"] == str(tmp_path / "next")
    facts = json.loads((tmp_path / "next" / "facts.json").read_text())
    assert facts["run"]["model"]["arch"] == "vit_small"
    assert facts["finetuned"]["checkpoint"] == str(saved)


def test_nothing_is_left_of_a_save_that_failed(data, tmp_path, monkeypatch):
    model = train_classifier(own_encoder(*OWN["ResNet"][:2], **OWN["ResNet"][2]), data.train, data, SHORT, CPU, READING)
    monkeypatch.setattr("patchlight.evaluation.encoder_folder.move", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        save_classifier(tmp_path / "saved", model, data, SHORT, {"top1": 0.5}, None)
    assert [*tmp_path.iterdir()] == [tmp_path / "saved"]
    assert not [*(tmp_path / "saved").iterdir()]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda folder, facts: facts["encoder"].pop("backbone"), "must describe the network beside it, got KeyError: 'backbone'"),
        (lambda folder, facts: facts["encoder"]["backbone"].update(depths=[1, 1, 1, 1]), r"others in .*such as \['layer2.1"),
        (lambda folder, facts: facts["encoder"]["backbone"].update(stem_width=9), "have the tensors of the network"),
        (lambda folder, facts: facts["encoder"]["backbone"].update(layers=3), "got TypeError"),
        (lambda folder, facts: facts["encoder"]["backbone"].update({"class": "VGG"}), "got KeyError: 'VGG'"),
        (lambda folder, facts: save_file({"conv1.weight": torch.ones(2)}, folder / "model.safetensors"), "the tensors of"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_named(data, tmp_path, change, sentence):
    folder = tmp_path / "saved"
    check_saved(own_encoder(*OWN["ResNet"][:2], **OWN["ResNet"][2]), data, folder)
    facts = json.loads((folder / "facts.json").read_text())
    change(folder, facts)
    (folder / "facts.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=sentence):
        open_checkpoint(str(folder))


def test_equal_seeds_train_equal_networks(data):
    """timm draws from three generators of random numbers."""
    trained = []
    for seed in (1, 1, 2):
        encoder = own_encoder(*OWN["mean of a ViT"][:2], **OWN["mean of a ViT"][2])
        model = train_classifier(encoder, data.train, data, replace(SHORT, seed=seed), CPU, READING)
        trained.append(torch.cat([p.flatten() for p in model.state_dict().values()]))
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])


def test_each_image_is_several_times_in_a_batch():
    for world in (1, 2, 3):
        ranks = [
            list(RepeatedBatches(40, 12, 2, Ranks(torch.device("cpu"), rank, world), 3, 3)) for rank in range(world)
        ]
        assert {len(batches) for batches in ranks} == {6}, "as many steps as without"
        for epoch in (0, 1):
            seen = [np.concatenate([batches[3 * epoch + step] for batches in ranks]) for step in range(3)]
            for batch in seen:
                assert np.unique(batch, return_counts=True)[1].tolist() == [3] * 4
            assert len(np.unique(seen)) == 12, "a third of the images"
        if world == 3:
            assert all(len(set(batch)) == 4 for batches in ranks for batch in batches), "copies are on different ranks"


def resnet_on_a_rank(path: str) -> dict[str, np.ndarray]:
    with join_ranks("cpu") as mine:
        encoder = own_encoder(*OWN["ResNet"][:2], **OWN["ResNet"][2])
        images = open_labeled(path)
        seen: list[torch.Tensor] = []
        encoder.backbone.bn1.register_forward_hook(
            lambda m, i, o: seen.append(m.running_var.clone()) if m.training else 0
        )
        model = train_classifier(encoder, images.train, images, SHORT, mine, READING)
        return {name: tensor.numpy() for name, tensor in model.state_dict().items()} | {"own": seen[-1].numpy()}


def test_statistics_of_ranks_become_one(data):
    first, second = on_processes(2, resnet_on_a_rank, data.name)
    own = [part.pop("own") for part in (first, second)]
    assert all(np.array_equal(first[name], second[name]) for name in first), "weights and statistics"
    name = "encoder.backbone.bn1.running_var"
    assert not np.allclose(own[0], own[1], rtol=1e-3), "each rank had its own"
    assert np.allclose(first[name], (own[0] + own[1]) / 2, rtol=1e-6)


def test_few_labels_have_ibots_setting():
    """SERE, 4.2: 1000 epochs, 1024, 1e-5; iBOT's semi_supervised/eval_cls.py, of which 5e-6 for 512 images are 1e-5 for 1024."""
    used = SemiProtocol()
    assert (used.epochs, used.batch, used.rate, used.min_rate, used.layer_decay) == (1000, 1024, 1e-5, 1e-5, 1.0)
    assert (used.mixup, used.cutmix, used.smoothing, used.erase, used.drop_path, used.repeats) == (
        0.8,
        1.0,
        0.1,
        0.25,
        0.1,
        3,
    )
