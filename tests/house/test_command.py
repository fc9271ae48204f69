"""The command line: what is wrong with it is one sentence in the words that were typed, help is short and fast, and files of
settings and dry runs mean what flags mean."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import torch
from engine.tiny_run import tiny_run, tiny_trainer
from house.api_page import page
from parity import ROOT
from PIL import Image

import patchlight
from patchlight.command import COMMANDS, main
from patchlight.compiled import constant_when_compiled
from patchlight.recipes import RECIPES
from patchlight.recipes.command import parse
from patchlight.recipes.config_file import read_config
from patchlight.run import Run
from patchlight.usage import Group, texts_of


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run, images, recipes and files, good and bad, that command lines name."""
    folder = tmp_path_factory.mktemp("place")
    trainer = tiny_trainer(tiny_run(folder / "tiny"))
    trainer.save()
    plain = trainer.run.to_dict()
    (folder / "tiny" / "run.json").write_text(json.dumps(plain))
    for number in range(3):
        (folder / "images" / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (80 * number, 0, 0)).save(folder / "images" / "a" / f"{number}.png")
    (folder / "empty").mkdir()
    (folder / "text.txt").write_text("not a folder")
    (folder / "notes.pth").write_text("no weights")
    shutil.copytree(folder / "tiny", folder / "hurt")
    for file in (folder / "hurt").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:99])
    (folder / "mine.py").write_text(
        "import numpy as np\n"
        "from patchlight import Run\n"
        "def good(): return Run()\n"
        "def needs(epochs): return Run()\n"
        "def other(): return 3\n"
        "def images(): return [np.zeros((9, 9, 3), np.uint8)] * 64\n"
        "def floats(): return [np.zeros((9, 9, 3))]\n"
        "def stream(): return iter(images())\n"
        "def parts(): return {'train': images(), 'val': images()}\n"
        "def wrong():\n    from patchlight import Schedule\n    return Run(schedule=Schedule(epochs=0))\n"
    )
    files = {
        "broken.json": "{",
        "list.json": "[1, 2]",
        "double.json": '{"schedule": {"epochs": 1, "epochs": 2}}',
        "unknown.json": json.dumps(plain | {"scheduel": {}}),
        "deep.json": json.dumps(plain | {"optim": plain["optim"] | {"base_rl": 1}}),
        "kind.json": json.dumps(plain | {"objectives": {"options": [{"kind": "DinoOption"}]}}),
        "nokind.json": json.dumps(plain | {"objectives": {"options": [{"prototypes": 8}]}}),
        "type.json": json.dumps(plain | {"schedule": {"epochs": "8"}}),
        "short.json": json.dumps(plain | {"data": {"loader": "procedural", "crops": {}}}),
        "value.yaml": "schedule:\n  epochs: 0\n",
        "broken.yaml": "schedule: [",
        "double.yaml": "schedule: {epochs: 1}\nschedule: {epochs: 2}\n",
        "run.txt": "{}",
        "passed.json": json.dumps(
            plain | {"data": plain["data"] | {"path": "source=MyImages", "loader": "torchvision"}}
        ),
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


# The words after `patchlight`, and what the sentence must contain: what was typed, and the remedy. @ is the folder above.
WRONG = [
    ("", "first word must be a command, got nothing; patchlight --help"),
    ("trian", "got trian; perhaps train is meant"),
    ("fly", "got fly; patchlight --help lists them"),
    ("train", "must be a recipe, got nothing; patchlight train --help lists them"),
    ("train deom", "got deom; perhaps demo is meant"),
    ("train dino_vits16_in1k_300", "perhaps dino_vits16_in1k_300ep"),
    ("train --schedule.epochs 3", "must be a recipe, got --schedule.epochs"),
    ("train demo --schedule.epoch 3", "got --schedule.epoch; perhaps --schedule.epochs"),
    ("train demo --dry-rnu", "got --dry-rnu; perhaps --dry-run is meant"),
    ("train demo --nonsense", "got --nonsense; --help-all lists all settings"),
    ("train demo extra", "got extra; write --setting value"),
    ("train demo --schedule.epochs", "--schedule.epochs must be a whole number, got nothing"),
    ("train demo --schedule.epochs three", "--schedule.epochs must be a whole number, got 'three'"),
    ("train demo --schedule.epochs 2.5", "--schedule.epochs must be a whole number, got '2.5'"),
    ("train demo --schedule.epochs=", "--schedule.epochs must be a whole number, got ''"),
    ("train demo --schedule.epochs 0", "--schedule.epochs must be ... got 0"),
    ("train demo --schedule.steps-per-epoch -3", "--schedule.steps-per-epoch must be ... got -3"),
    ("train demo --optim.base-lr fast", "--optim.base-lr must be a number, got 'fast'; for example --optim.base-lr 0.008"),
    ("train demo --optim.base-lr -1", "--optim.base-lr must ... got -1"),
    ("train demo --optim.betas 0.9", "--optim.betas must be 2 values, each a number, got '0.9'"),
    ("train demo --optim.name sdg", "--optim.name must be one of adamw, lars, lamb, sgd, got 'sdg'"),
    ("train demo --optim.teacher-momentum 2", "--optim.teacher-momentum must ... [0, 1], got 2"),
    ("train demo --optim.warmup-epochs 99", "--optim.warmup-epochs must not exceed --schedule.epochs, got 99"),
    ("train demo --output.resume maybe", "--output.resume must be true or false, got 'maybe'"),
    ("train demo --output.no-resume=yes", "--output.no-resume takes no value, got 'yes'"),
    ("train demo --output.keep 0", "--output.keep must be ... got 0"),
    ("train demo --parallel.precision int8", "--parallel.precision must be one of ... bf16, fp16, fp32, got 'int8'"),
    ("train demo --parallel.shard 2", "start torchrun --nproc-per-node 2, or change shard"),
    ("train demo --parallel.replicate 0", "--parallel.replicate must be ... got 0"),
    ("train demo --parallel.graph on", "got the device is cpu"),
    ("train demo --model.arch vit_smal", "must be one of"),
    ("train demo --model.patch-size 7", "--model.image-size must be a multiple of --model.patch-size, got 48 and 7"),
    ("train demo --model.sizes width", "--model.sizes must be names, each with a whole number, got 'width'"),
    ("train demo --model.sizes.dpeth 2", "dpeth"),
    ("train demo --model.init-from @/none.pth", "@/none.pth"),
    ("train demo --model.init-from @/notes.pth", "@/notes.pth"),
    ("train demo --data.crops.local-crops.0.count 0", "--data.crops.local-crops none has no such crops"),
    ("train demo --data.crops.local-crops.0.count -2", "local-crops.0.count must be a whole number ... got -2; leave"),
    ("train demo --data.crops.local-crops.0.photometric.hue 2", "crops.0.photometric.hue must be ... got 2.0"),
    ("train demo --data.crops.local-crops.0.scale 0.5 0.2", "--data.crops.local-crops.0.scale must be 2 ascending"),
    ("train demo --data.crops.std nan 1 1", "--data.crops.std[0] must be a number in (0, 2^53), got nan"),
    ("train demo --data.crops.local-crops 3", "--data.crops.local-crops as a whole can only be none, got 3"),
    ("train demo --data.crops.local-crops.0.scale 0.5", "must be 2 values, each a number, got '0.5'"),
    ("train demo --data.crops.local-crops.7.count 1", "perhaps --data.crops.local-crops.0.count"),
    ("train demo --data.batch-per-rank 0", "--data.batch-per-rank must be ... got 0"),
    ("train demo --data.path @/images", "got --data.path @/images with --data.loader procedural; set --data.loader auto"),
    ("train demo --data.loader dali", "--data.path must be set for every loader except procedural"),
    ("train demo --data.procedural-images 99999999999999999999", "must be a whole number ... got 99999999999999999999"),
    ("train demo --data.procedural-images 9999999999", "must fit in memory, got 9999999999 ... lower --data.procedural-images"),
    ("train demo --data.workers -1", "--data.workers must be a whole number in [0, 2^53), got -1"),
    ("train demo --data.most-bad nan", "--data.most-bad must be a number in [0, 1], got nan"),
    ("train demo --data.most-pixels 0", "--data.most-pixels must be a whole number in [1, 178956970], got 0"),
    ("train demo --data.timeout 0", "--data.timeout must be a number in (0, 2^53), got 0"),
    ("train demo --data.procedural-images 3", "got 3 images for 64"),
    ("train demo --objectives.options none", "--objectives.options needs at least one objective, got none"),
    ("train demo --objectives.weights selfpatch/patch", "--objectives.weights must be names, each with a number"),
    ("train demo --objectives.weights.selfpatch/patch -1", "--objectives.weights ... -1"),
    ("train demo --objectives.options.0.target best", "got 'best'"),
    ("train demo --output.folder @/text.txt", "--output.folder must be a folder that can be written, got @/text.txt"),
    ("train demo --output.folder @/text.txt/below", "--output.folder must be a folder that can be written, got @/text.txt/below"),
    ("train demo --output.folder @/tiny", "which holds a run; set --output.resume to continue it"),
    ("train dino_vits16_in1k", "got path/to/images, which stands for them; add --data.path FOLDER"),
    ("train dino_vits16_in1k --data.path @/none", "@/none"),
    ("train dino_vits16_in1k --data.path @/empty", "@/empty"),
    ("train small_data --data.path @/none.py:images", "A data set's file must exist, got @/none.py"),
    ("train small_data --data.path @/mine.py:imagse", "have the data set that is named, got imagse; name one of its functions"),
    ("train small_data --data.path @/mine.py:needs", "The data set @/mine.py:needs must work without arguments, got epochs"),
    ("train small_data --data.path @/mine.py:other", "items by number, or be iterable, got one int; give"),
    ("train small_data --data.path @/mine.py:floats", "item 0 of list ... got an array [9, 9, 3] of float64; give values from"),
    ("train small_data --data.path @/mine.py:stream", "needs --schedule.steps-per-epoch ... got none; set"),
    ("train small_data --data.path @/mine.py:images --data.loader dali", "got --data.loader dali; use --data.loader auto"),
    ("train debug --data.path @/mine.py:images", "with --data.loader procedural; set --data.loader auto"),
    ("train --config @/passed.json", "passed to train as source ... got only the name of their class, source=MyImages"),
    ("train --config @/passed.json --dry-run", "got only the name of their class, source=MyImages; call patchlight.train"),
    ("check-data @/mine.py:stream", "Images must have numbers here, got @/mine.py:stream, which returns an iterable"),
    ("evaluate knn --checkpoint @/tiny --data @/mine.py:images", "must return a dict of data sets with train, got list"),
    ("evaluate knn --checkpoint @/tiny --data @/mine.py:parts", "need numbers and classes, got none in train of"),
    ("train mine.py", "write mine.py:NAME"),
    ("train @/none.py:run", "A recipe's file must exist, got @/none.py"),
    ("train @/mine.py:god", "got god; name one of its functions: good, needs"),
    ("train @/mine.py:needs", "must work without arguments, got epochs"),
    ("train @/mine.py:other", "must return a Run, got int"),
    ("train @/mine.py:wrong", "Schedule.epochs must be ... got 0"),
    ("train --config", "--config needs a file, got nothing"),
    ("train --config @/none.json", "must exist, got @/none.json"),
    ("train --config @/unknwon.json", "perhaps @/unknown.json is meant"),
    ("train --config @/run.txt", "must be JSON or YAML, got @/run.txt"),
    ("train demo --config @/tiny/run.json", "got demo and @/tiny/run.json; leave one out"),
    ("train --config @/broken.json", "@/broken.json must be JSON, got"),
    ("train --config @/list.json", "@/list.json: it must be a group of settings, got [1, 2]"),
    ("train --config @/double.json", "got the key 'epochs' twice"),
    ("train --config @/unknown.json", "got scheduel; perhaps schedule is meant"),
    ("train --config @/deep.json", "got optim.base_rl; perhaps base_lr is meant"),
    ("train --config @/kind.json", "got DinoOption; perhaps DinoOptions"),
    ("train --config @/nokind.json", "objectives.options.0.kind must be one of"),
    ("train --config @/type.json", "schedule.epochs must be a whole number, got '8'"),
    ("train --config @/short.json", "data.crops.global_crops must be there, got nothing"),
    ("train --config @/value.yaml", "Schedule.epochs must be ... got 0"),
    ("train --config @/broken.yaml", "@/broken.yaml must be YAML, got"),
    ("train --config @/double.yaml", "got the key 'schedule' twice"),
    ("train --config @/tiny/run.json --schedule.epochs x", "--schedule.epochs must be a whole number, got 'x'"),
    ("evaluate", "must be a command, got nothing; patchlight evaluate --help"),
    ("evaluate kn", "got kn; perhaps knn"),
    ("evaluate knn", "--checkpoint must be given, got nothing"),
    ("evaluate knn --checkpoint @/none", "got '@/none', which is none; check the path"),
    ("evaluate knn --checkpoint @/empty", "must hold a complete checkpoint, got none in @/empty"),
    ("evaluate knn --checkpoint @/notes.pth", "@/notes.pth"),
    ("evaluate knn --checkpoint @/hurt", "@/hurt"),
    ("evaluate knn --checkpoint @/tiny --device gpu", "--device must be cpu, cuda, or cuda: with a number, got 'gpu'"),
    ("evaluate knn --checkpoint @/tiny --heads 0", "--heads must be ... got 0"),
    ("evaluate knn --checkpoint @/tiny --reading.batch 0", "--reading.batch must be ... got 0"),
    ("evaluate knn --checkpoint @/tiny --reading.precision fp8", "--reading.precision must be one of fp32, bf16, got 'fp8'"),
    ("evaluate knn --checkpoint @/tiny --protocol.size -1", "--protocol.size must be ... got -1"),
    ("evaluate knn --checkpoint @/tiny --chekpoint 3", "got --chekpoint; perhaps --checkpoint"),
    ("evaluate knn --checkpoint @/tiny --protocol.k ten", "--protocol.k must be any number of values, each a whole number"),
    ("evaluate knn --checkpoint @/tiny --protocol.k 0", "--protocol ... must be ... got"),
    ("evaluate knn --checkpoint @/tiny --data @/empty", "@/empty"),
    ("evaluate finetune --checkpoint @/tiny --layout cifar", "--layout must be one of folder, cifar10 ... got 'cifar'"),
    ("evaluate finetune --checkpoint @/tiny --layout cars", "cars needs a folder, got 'procedural' ... pass the folder"),
    ("evaluate finetune --checkpoint @/tiny --layout cars --data @/images", "cars_train, ... got no cars_train in @/images"),
    ("evaluate semi --checkpoint @/tiny --save @/images", "--save must be new ... got @/images, which holds files"),
    ("evaluate segment --checkpoint @/tiny", "One of linear, conv, fpn, upernet must be named, got none"),
    ("evaluate segment --checkpoint @/tiny upernt", "got upernt; perhaps upernet"),
    ("evaluate segment --checkpoint @/tiny linear --steps 0", "--steps must be ... got 0"),
    ("evaluate davis --checkpoint @/tiny --data @/none", "@/none"),
    ("evaluate render davis @/images", "must be new or empty"),
    ("evaluate render coco @/images", "must be new or empty"),
    ("evaluate render", "must be a command, got nothing; patchlight evaluate render --help lists them"),
    ("evaluate render cocoo @/new", "got cocoo; perhaps coco"),
    ("evaluate detect --checkpoint @/tiny", "One of mask-rcnn, cascade must be named, got none"),
    ("evaluate detect --checkpoint @/tiny mask-rcnn --schedule 2x", "must be one of 1x, 3x, got '2x'"),
    ("evaluate detect --checkpoint @/tiny cascade --samples 0", "--samples must be ... got 0"),
    ("evaluate detect --checkpoint @/tiny cascade --data @/empty", "@/empty"),
    ("export", "must be a command, got nothing; patchlight export --help"),
    ("export onx", "got onx; perhaps onnx"),
    ("export hub", "--checkpoint must be given, got nothing"),
    ("export hub --checkpoint @/tiny", "--folder must be given, got nothing; it is a path"),
    ("export hub --checkpoint @/none --folder @/new", "--checkpoint must be a run's folder ... got @/none, nothing there"),
    ("export hub --checkpoint @/notes.pth --folder @/new", "got @/notes.pth, a file; pass the folder"),
    ("export hub --checkpoint @/empty --folder @/new", "must hold a complete checkpoint, got none in @/empty"),
    ("export hub --checkpoint @/hurt --folder @/new", "@/hurt"),
    ("export hub --checkpoint @/tiny --folder @/images", "got @/images, which holds other files; choose another"),
    ("export hub --checkpoint @/tiny --folder @/text.txt", "got @/text.txt, which is a file; choose another"),
    ("export hub --checkpoint @/tiny --folder @/new --private", "got no --push; add --push user/name"),
    ("export hub --checkpoint @/tiny --folder @/new --push teacher", "--push must name a repository ... got 'teacher'"),
    ("export hub --checkpoint @/tiny --folder @/new --push me/a--b", "--push must name a repository ... got 'me/a--b'"),
    ("export hub --checkpoint @/tiny --folder @/new --pusch me/a", "got --pusch; perhaps --push"),
    ("export onnx --checkpoint @/tiny", "--file must be given, got nothing; it is a path"),
    ("export onnx --checkpoint @/tiny --file @/new.pt", "--file must end in .onnx, got @/new.pt; write --file new.onnx"),
    ("export onnx --checkpoint @/tiny --file @/new.onnx --opset 0", "--opset must be a whole number in [1, 2^53), got 0"),
    ("export onnx --checkpoint @/tiny --file @/new.onnx --opset new", "--opset must be a whole number, or none, got 'new'"),
    ("export onnx --checkpoint @/tiny --file @/new.onnx --tolerance 0", "--tolerance must be ... got 0"),
    ("export torch --checkpoint @/tiny --file @/new.onnx", "--file must end in .pt2, got @/new.onnx"),
    ("export torch --checkpoint @/none --file @/new.pt2", "got '@/none', which is none; check the path"),
    ("export torch --checkpoint @/tiny --file @/new.pt2 --size 17", "multiple of the patch size 4, got 17; the nearest is 16"),
    ("export torch --checkpoint @/tiny --file @/new.pt2 --size 0", "--size must be ... got 0"),
    ("export torch --checkpoint @/tiny --file @/new.pt2 --heads 0", "--heads must be ... got 0"),
    ("check-data", "PATH must be given, got nothing"),
    ("check-data @/none", "@/none"),
    ("check-data @/images @/empty", "got @/empty; see patchlight check-data --help"),
    ("check-data @/images --workers many", "--workers must be a whole number, got 'many'"),
    ("check-checkpoint", "PATH must be given, got nothing"),
    ("check-checkpoint @/none", "got @/none, which holds none"),
    ("check-checkpoint @/empty", "pass the folder that --output.folder named"),
    ("check-checkpoint @/hurt", "got 1 of 1 damaged"),
    ("check-checkpoint @/tiny --all", "got --all"),
    ("doctor now", "takes no words, got now"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "expected"), WRONG, ids=[words or "nothing" for words, _ in WRONG])
def test_a_wrong_command_line_is_one_sentence(place, words, expected, capsys, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as end:
        main([word.replace("@", str(place)) for word in words.split()])
    printed = capsys.readouterr()
    text = printed.err.strip().splitlines()[-1].replace(str(place), "@")
    assert end.value.code in (1, 2), "an exit code, not a text"
    assert re.search(".*".join(map(re.escape, expected.split(" ... "))), text), text
    assert re.fullmatch(r"patchlight[\w -]*: .+, got .*; .+\.", text), f"rule, got, remedy: {text}"
    assert "learning rate" not in printed.out, "before the table of settings"
    for internal in ("tyro", "__", "object at", "dataclass", "Traceback"):
        assert internal not in text


def run_process(*words, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, **options)


def test_exit_codes_of_processes(place):
    """Wrong usage is 2, what failed is 1, help is 0, a defect keeps its traceback."""
    wrong = run_process(ROOT / "train.py", "deom")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "train.py: The first word must be a recipe, got deom; perhaps demo is meant.\n"
    failed = run_process("-m", "patchlight.checkpoint", place / "none")
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    (place / "defect.py").write_text("def run(): return 1 / 0\n")
    defect = run_process("-m", "patchlight.command", "train", f"{place}/defect.py:run")
    assert "ZeroDivisionError" in defect.stderr
    assert "Traceback" in defect.stderr
    forced = run_process(ROOT / "train.py", "demo", env=os.environ | {"PATCHLIGHT_IMPL": "fastest"})
    assert (forced.returncode, forced.stderr.count("\n")) == (2, 1)
    assert "PATCHLIGHT_IMPL" in forced.stderr
    doctor = run_process("-m", "patchlight_kernels", "docter")
    assert doctor.returncode == 2
    assert "got docter; write python -m patchlight_kernels doctor" in doctor.stderr


def test_the_installed_command_is_this_one():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["patchlight"].partition(":")
    assert getattr(importlib.import_module(module), name) is main


def test_bench_needs_a_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("patchlight.command.__file__", str(tmp_path / "lib" / "patchlight" / "command.py"))
    with pytest.raises(SystemExit):
        main(["bench"])
    assert "patchlight bench needs a checkout, got an installed package; clone" in capsys.readouterr().err


def imported_by(*words) -> set[str]:
    """The modules that a command imports before it ends."""
    result = run_process("-X", "importtime", *words)
    assert result.returncode == 0, result.stderr
    return {line.rsplit("|", 1)[1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}


def test_help_imports_little():
    """Seconds depend on the machine, imports do not: these three take most of them."""
    assert not {"torch", "numpy", "timm"} & imported_by("-m", "patchlight.command", "--help")
    heavy = {"torch._dynamo", "timm", "patchlight.engine.assembly", "sympy"}
    assert not heavy & imported_by(ROOT / "train.py", "selfpatch_vits16_in1k", "--help")
    assert not heavy & imported_by("-m", "patchlight.command", "train", "--help")
    assert not {"torch", "numpy", "timm"} & imported_by("-m", "patchlight.command", "export", "onnx", "--help")
    assert not {"torch", "numpy"} & imported_by("-c", "import patchlight; dir(patchlight)")


def test_constants_are_marked_as_torch_marks_them():
    ours, theirs = constant_when_compiled(lambda: 1), torch.compiler.assume_constant_result(lambda: 1)
    assert vars(ours) == vars(theirs) != {}


def test_help_is_short_first(capsys):
    for command in COMMANDS:
        if command != "bench":
            main([command, "--help"])
    printed = capsys.readouterr().out
    for recipe in RECIPES:
        assert re.search(rf"^  {recipe} ", printed, re.MULTILINE)
    main(["train", "dino_vits16_in1k", "--help"])
    short = capsys.readouterr().out
    main(["train", "dino_vits16_in1k", "--help-all"])
    whole = capsys.readouterr().out
    assert "--schedule.epochs" in short
    assert "--optim.warmup-ends" not in short
    assert short.count("\n") < 80
    for setting in Group.of_instance(RECIPES["dino_vits16_in1k"]()).settings:
        assert setting.flag in whole
    assert "Passes over the images. [100]" in whole
    assert "--parallel.accumulate" in short.split("--data.batch-per-rank")[1].split("--data.workers")[0], (
        "as it is typed"
    )


def test_every_field_of_a_run_has_its_text():
    for part in vars(Run()).values():
        assert all(texts_of(type(part)).get(name) for name in vars(part) if type(part).__module__ == "patchlight.run")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_comes_back_from_its_plain_values(recipe):
    run = RECIPES[recipe]()
    assert Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_flags_on_top_of_a_file(place, tmp_path, capsys):
    plain = json.loads((place / "tiny" / "run.json").read_text())
    del plain["optim"]["warmup_ends"], plain["objectives"]["options"][0]["warmup_by"]  # as an older version wrote it
    path = tmp_path / "old.json"
    path.write_text(json.dumps(plain))
    run, note = read_config(path)
    assert run == read_config(place / "tiny")[0]
    assert note == f"{path} lacks objectives.options.0.warmup_by, optim.warmup_ends: each has its default."
    changed = parse(["--config", str(path), "--schedule.epochs", "7", "--output.folder=elsewhere"])
    assert (changed.schedule.epochs, changed.output.folder, changed.model) == (7, "elsewhere", run.model)
    written = tmp_path / "run.yaml"
    written.write_text("optim: {base_lr: 1e-3, warmup_epochs: 1}\ndata: {loader: procedural}\nschedule: {epochs: 3}\n")
    run = parse([f"--config={written}"])
    assert (run.optim.base_lr, run.schedule.epochs) == (1e-3, 3)


FLAGS = """demo --optim.betas 0.8 0.9 --parallel.deterministic --output.no-resume --schedule.steps-per-epoch 3
--objectives.weights.selfpatch/patch=0.5 --objectives.weights.dino/cls 2 --model.sizes width 24 depth 1 heads 1
--data.crops.global-crops.1.flip 0 --objectives.masks.ratios 0 0 0.3 0.2 --optim.min-lr -0 --local-rank=0 --local_rank 1"""


def test_values_of_every_type_by_flag():
    run = parse(FLAGS.split())
    assert run.optim.betas == (0.8, 0.9)
    assert run.parallel.deterministic is True
    assert run.schedule.steps_per_epoch == 3
    assert run.objectives.weights == {"selfpatch/patch": 0.5, "dino/cls": 2.0}
    assert run.model.sizes == {"width": 24, "depth": 1, "heads": 1}
    assert [spec.flip for spec in run.data.crops.global_crops] == [0.5, 0.0]
    assert run.objectives.masks.ratios == ((0.0, 0.0), (0.3, 0.2))
    back = parse(["demo", "--schedule.steps_per_epoch", "none", "--data.crops.local-crops", "none"])
    assert back.schedule.steps_per_epoch is None
    assert back.data.crops.local_crops == ()


def test_a_dry_run_writes_nothing(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["train", "--config", str(place / "tiny"), "--dry-run", "--output.folder", "new", "--parallel.replicate", "3"])
    printed = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert "x 3 processes" in printed
    for line in ("images/s", "seconds per step", "the whole run", "memory", "a checkpoint", "Nothing was written"):
        assert line in printed


def test_a_dry_run_needs_no_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = ["--model.sizes", "width", "32", "depth", "1", "heads", "1", "--objectives.options.0.prototypes", "8"]
    main(["train", "selfpatch_vits16_large_batch", "--dry-run", "--parallel.replicate", "32", *sizes])
    printed = " ".join(capsys.readouterr().out.split())
    assert "4096" in printed
    assert "generated ones stand for yours; --data.path FOLDER names them" in printed
    assert not list(tmp_path.iterdir())


def test_a_failed_start_may_be_tried_again(tmp_path):
    trainer = tiny_trainer(tiny_run(tmp_path))

    def fails() -> None:
        raise RuntimeError("no memory")

    trainer.step = fails
    with pytest.raises(RuntimeError, match="no memory"):
        trainer.fit()
    again = tiny_trainer(tiny_run(tmp_path))
    again.fit()
    assert again.clock.step == again.clock.total


def test_the_page_of_the_api_agrees_with_the_code():
    assert (ROOT / "docs/api.md").read_text() == page(), "run python tests/house/api_page.py > docs/api.md"


def test_the_names_of_the_package():
    for name in patchlight.__all__:
        assert getattr(patchlight, name) is not None
        assert name in dir(patchlight)
    assert patchlight.Run is Run
    assert patchlight.recipes.RECIPES is RECIPES
    with pytest.raises(AttributeError, match="has no attribute 'Ran'"):
        patchlight.Ran  # noqa: B018
