"""The page about exports: its command lines are right, and its Python runs on the files that they write."""

import re
import shlex

import numpy as np
import pytest
import torch
from export.teachers import saved_run
from parity import ROOT

from patchlight.command import main
from patchlight.data.policy import dino_policy
from patchlight.export.__main__ import COMMANDS
from patchlight.usage import Group, Words

PAGE = (ROOT / "docs/export.md").read_text()


def test_its_command_lines_are_right():
    lines = re.findall(r"^(?: {4}|\$ )patchlight export (.+?)(?:\s+#.*)?$", PAGE, re.MULTILINE)
    assert {shlex.split(line)[0] for line in lines} == COMMANDS.keys()
    for line in lines:
        name, *words = shlex.split(line)
        group = Group.of_function(COMMANDS[name], words)
        read = Words(group, words)
        read.read()
        assert not read.loose, line
        assert group.make(read.given, read.typed)
    known = {s.flag for command in COMMANDS.values() for s in Group.of_function(command, []).settings}
    for flag in re.findall(r"`(--[a-z-]+)", PAGE):
        assert flag in known or flag.replace("--no-", "--") in known, flag


def test_its_python_runs(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    monkeypatch.chdir(tmp_path)
    model = {"sizes": {"width": 24, "depth": 1, "heads": 2}, "image_size": 48, "patch_size": 16}
    saved_run(tmp_path / "run", model=model, data={"crops": dino_policy(0, 48)})
    main(["export", "hub", "--checkpoint", "run", "--folder", "out"])
    main(["export", "onnx", "--checkpoint", "run", "--file", "teacher.onnx"])
    main(["export", "torch", "--checkpoint", "run", "--file", "teacher.pt2"])
    found = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, found)
    assert found["patches"].shape == (5, 9, 24), "of the last block"
    assert found["encoder"].width == 24
    pixels = torch.from_numpy(((found["images"] - found["mean"]) / found["std"]).astype(np.float32))
    with torch.no_grad():
        expected = found["encoder"](pixels).summary
        summary = found["session"].run(["summary"], {"pixels": pixels.numpy()})[0]
        assert abs(expected.numpy() - summary).max() < 1e-5 * float(expected.abs().max())
        assert (found["program"](pixels)[0] - expected).abs().max() < 1e-5 * float(expected.abs().max())
