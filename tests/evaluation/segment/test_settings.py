"""Published settings: the values of papers and released configurations, and what is compared with what."""

import json

import pytest

from patchlight.evaluation.__main__ import main, segment
from patchlight.evaluation.paper_numbers import all_paper_numbers
from patchlight.evaluation.results import changed_fields
from patchlight.evaluation.segment.protocols import HEADS, ConvSegment, FpnSegment, UperNetSegment
from patchlight.evaluation.segment.settings import OURS, SETTINGS, default_protocol, published_for, setting_of
from patchlight.evaluation.training import poly_rate
from patchlight.usage import Group, Words

FLAGS = "--checkpoint c --data d"


def protocol_of(words: str):
    """The protocol that a command line makes."""
    words = words.split()
    group = Group.of_function(segment, words)
    read = Words(group, words)
    read.read()
    return group.make(read.given, read.typed)["protocol"]


def changed_in(words: str, layout: str, width: int = 384, paper: str = "") -> dict:
    protocol = protocol_of(words)
    return changed_fields(protocol, published_for(protocol, layout, paper, width)[0])


# SERE 4.2, PQCL 4.3, SelfPatch 4.2, PASS B.2; the others from the configurations that iBOT, SelfPatch, mmsegmentation and the
# authors of SERE (for ImageNet-S) released.
VALUES = {
    "upernet --layout ade20k": {
        "steps": 160_000, "batch": 16, "optimizer": "adamw", "rate": 3e-5, "weight_decay": 0.05, "layer_decay": 0.9,
        "drop_path": 0.1, "warmup": 1500, "power": 1.0, "min_rate": 0.0, "crop": 512, "stride": 341, "test": "windows",
        "test_short_side": 512, "long_side": 2048, "scales": (0.5, 2.0), "channels": None, "helper_channels": 256,
    },
    "upernet --layout voc2012": {"steps": 20_000, "batch": 16, "rate": 3e-5, "layer_decay": 0.9},
    "upernet --layout ade20k --paper sere-vitb": {"steps": 160_000, "rate": 8e-5, "layer_decay": 0.65},
    "fpn --layout ade20k": {
        "steps": 40_000, "batch": 16, "optimizer": "adamw", "rate": 6e-5, "weight_decay": 0.01, "layer_decay": 1.0,
        "drop_path": 0.1, "warmup": 1500, "power": 1.0, "min_rate": 0.0, "test": "whole", "channels": 128,
    },
    "fpn --layout ade20k --paper pass": {
        "steps": 40_000, "batch": 16, "optimizer": "sgd", "rate": 0.01, "weight_decay": 5e-4, "layer_decay": 1.0,
        "drop_path": 0.0, "warmup": 0, "power": 0.9, "min_rate": 1e-4, "test": "whole", "crop": 512,
        "test_short_side": 512, "long_side": 2048,
    },
    "conv --layout imagenet-s": {
        "steps": 0, "epochs": 100, "batch": 256, "optimizer": "adamw", "rate": 5e-4, "min_rate": 1e-6,
        "weight_decay": 0.05, "layer_decay": 0.5, "warmup_epochs": 5, "schedule": "cosine", "crop": 224,
        "area": (0.14, 1.0), "drop_path": 0.1, "test": "whole", "test_short_side": 256, "colors": "jitter",
    },
}  # fmt: skip


@pytest.mark.parametrize("words", VALUES)
def test_the_flags_start_from_the_published_values(words):
    protocol = protocol_of(f"{words} {FLAGS}")
    assert {name: getattr(protocol, name) for name in VALUES[words]} == VALUES[words]


def test_a_protocol_is_compared_with_that_of_its_data_set():
    assert changed_in(f"upernet --layout voc2012 {FLAGS}", "voc2012") == {}
    assert changed_in(f"upernet --layout voc2012 --steps 160000 {FLAGS}", "voc2012") == {"steps": [20_000, 160_000]}
    assert changed_in(f"upernet --layout ade20k {FLAGS}", "ade20k") == {}
    assert changed_in(f"upernet --layout ade20k --steps 20000 {FLAGS}", "ade20k") == {"steps": [160_000, 20_000]}


def test_a_wider_backbone_is_compared_with_its_own_setting():
    words = f"upernet --layout ade20k {FLAGS}"
    assert changed_in(words, "ade20k", width=768) == {"rate": [8e-5, 3e-5], "layer_decay": [0.65, 0.9]}
    _, notes = published_for(protocol_of(words), "ade20k", "", 768)
    assert "--paper sere-vitb has the published setting for a backbone of this width" in notes
    wide = f"upernet --layout ade20k --paper sere-vitb {FLAGS}"
    assert changed_in(wide, "ade20k", 768, "sere-vitb") == {}


def test_papers_with_other_settings_for_the_same_data_are_told_apart():
    default, other = FpnSegment(), setting_of(FpnSegment, "ade20k", "pass").protocol
    assert changed_fields(default, published_for(default, "ade20k", "", 384)[0]) == {}
    assert changed_fields(other, published_for(other, "ade20k", "pass", 384)[0]) == {}
    assert changed_fields(other, published_for(other, "ade20k", "", 384)[0])
    with pytest.raises(ValueError, match="got 'sere'; papers that have one: selfpatch, pass"):
        setting_of(FpnSegment, "ade20k", "sere")
    with pytest.raises(ValueError, match="papers that have one: none"):
        setting_of(ConvSegment, "voc2012", "sere")


def test_what_nobody_published_is_called_ours():
    protocol = protocol_of(f"conv --layout voc2012 {FLAGS}")
    published, notes = published_for(protocol, "voc2012", "", 384)
    assert changed_fields(protocol, published) == {}
    assert notes == ("no published setting for conv on voc2012; ours",)
    for kind in HEADS.values():
        assert default_protocol(kind, []) is OURS[kind], "procedural scenes have short settings"


def test_every_row_of_the_papers_has_a_published_setting():
    rows = {(row.task, row.data) for row in all_paper_numbers() if row.task.startswith("segment-")}
    assert rows
    for task, data in rows:
        layout = "imagenet-s" if data.startswith("imagenet-s") else data
        assert setting_of(HEADS[task.removeprefix("segment-")], layout), (task, data)
    assert all(setting.source for setting in SETTINGS)


def test_epochs_are_those_of_the_data_set():
    protocol = ConvSegment()
    assert (protocol.total_steps(35), protocol.warmup_steps(35)) == (3500, 175), (
        "ImageNet-S: 9190 images, batches of 256"
    )
    assert (protocol.total_steps(1), protocol.warmup_steps(1)) == (100, 5), "ImageNet-S50: 500 images"
    assert (UperNetSegment().total_steps(35), UperNetSegment().warmup_steps(35)) == (160_000, 1500)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 5}, "steps must be 0 where epochs count, got 5 and epochs=100"),
        ({"epochs": 0}, "steps must be positive where epochs is 0"),
        ({"epochs": 0, "steps": 5}, "warmup_epochs must be 0 where steps count, got 5"),
        ({"epochs": 3}, r"warmup_epochs must lie in \[0, epochs\], got 5 of 3"),
        ({"test": "sliding"}, "test must be one of whole, windows"),
        ({"optimizer": "lamb"}, "optimizer must be one of adamw, sgd"),
        ({"colors": "all"}, "colors must be one of"),
        ({"scales": (2.0, 0.5)}, "ascending"),
        ({"area": (0.0, 1.0)}, r"area\[0\] must be a number in \(0, 1\]"),
        ({"drop_path": 1.0}, "drop_path must be"),
        ({"rate": 0.0}, "rate must be"),
    ],
)
def test_settings_that_cannot_be_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        ConvSegment(**values)


def test_the_rate_falls_by_a_power():
    """mmsegmentation: (rate - end) * (1 - step / steps) ** power + end, times a rise from 1e-6 of it."""
    assert poly_rate(10_000, 40_000, 0.01, 1e-4, power=0.9) == pytest.approx(0.0099 * 0.75**0.9 + 1e-4)
    assert poly_rate(0, 100, 1.0, warmup=10) == pytest.approx(1e-6)
    assert poly_rate(5, 100, 1.0, warmup=10) == pytest.approx(0.5 * 0.95)
    assert poly_rate(10, 100, 1.0, warmup=10) == pytest.approx(0.9)


def test_results_say_what_they_are_compared_with(run_folder, tmp_path, capsys):
    flags = [
        "--steps",
        "2",
        "--crop",
        "16",
        "--test-short-side",
        "16",
        "--batch",
        "4",
        "--reading.workers",
        "0",
        "--out",
    ]
    words = ["segment", "conv", "--checkpoint", str(run_folder), *flags, str(tmp_path)]
    main(words)
    result = json.loads((tmp_path / "segment-conv-procedural.json").read_text())
    assert result["changed"] == {}
    assert "no published setting for conv on procedural; ours" in result["notes"]
    assert {"mIoU", "aAcc", "mAcc", "fgIoU", "fgF"} == result["metrics"].keys()
    printed = capsys.readouterr().out
    assert "Not comparable" not in printed
    for words, message in (
        (["--split", "test"], "needs a folder of predictions"),
        (["--split", "train"], "split must be one of val, test"),
        (["--paper", "pass"], "papers that have one: none"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["segment", "conv", "--checkpoint", str(run_folder), *words])
