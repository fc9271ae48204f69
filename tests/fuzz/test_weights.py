"""Damaged and malicious files of weights: weights that are numbers, or one sentence with the file's name."""

import io
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from engine.test_init_from import MODEL, VIT_LAYOUTS, mae_file, timm_vit
from fuzz.rounds import fuzz
from safetensors.torch import save

from patchlight.backbones.published import read_published
from patchlight.engine.assembly import build_branches
from patchlight.engine.init_from import init_from
from patchlight.evaluation.checkpoints import open_checkpoint
from patchlight.run import Model

LAYOUTS = {**VIT_LAYOUTS, "MAE": lambda weights: {"model": {**mae_file(timm_vit())["model"], **weights}}}
NAMES = ("norm.weight", "pos_embed", "cls_token", "blocks.1.ls1.gamma", "rope.freqs", "ca_head.norm.weight", "a\nb", "")


def pickled(content: object, rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=bool(rng.random() < 0.7))
    return buffer.getvalue()


def spoiled(data: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes changed, added, repeated or left out."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        if not data:
            break
        first = int(rng.integers(len(data)))
        last = min(len(data), first + int(2 ** rng.uniform(0, 8)))
        noise = rng.bytes(last - first)
        kind = rng.integers(6)
        if kind == 0:
            data[first] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[first:last] = noise
        elif kind == 2:
            del data[first:last]
        elif kind == 3:
            data[first:first] = data[first:last]
        elif kind == 4:
            data[first:last] = bytes(last - first)
        else:
            del data[first:]
    return bytes(data)


def with_spoiled_entry(data: bytes, rng: np.random.Generator) -> bytes:
    """A zip file whose checksums are right and whose pickle, or another entry, is not."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return spoiled(data, rng)
    source, buffer = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    names = source.namelist()
    chosen = next(n for n in names if n.endswith("data.pkl")) if rng.random() < 0.8 else names[rng.integers(len(names))]
    with zipfile.ZipFile(buffer, "w") as target:
        for name in names:
            content = source.read(name)
            target.writestr(name, spoiled(content, rng) if name == chosen else content)
    return buffer.getvalue()


def other_weights(weights: dict, rng: np.random.Generator) -> dict:
    """Tensors left out, added, of other shapes, formats and values."""
    weights = dict(weights)
    for _ in range(rng.integers(1, 4)):
        name = list(weights)[rng.integers(len(weights))]
        tensor, kind = weights[name], rng.integers(8)
        if kind == 0 or not torch.is_tensor(tensor):
            del weights[name]
        elif kind == 1:
            weights[NAMES[rng.integers(len(NAMES))]] = torch.randn(rng.integers(0, 5, rng.integers(0, 4)).tolist())
        elif kind == 2:
            weights[name] = tensor.reshape(-1)[: rng.integers(0, tensor.numel() + 1)].clone()
        elif kind == 3 and tensor.ndim > 1:
            weights[name] = tensor.transpose(0, -1).contiguous()
        elif kind == 4:
            weights[name] = torch.where(
                torch.rand(tensor.shape) < 0.1, [torch.nan, torch.inf, 1e38][rng.integers(3)], tensor
            )
        elif kind == 5:
            dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64)
            weights[name] = tensor.to(dtypes[rng.integers(len(dtypes))])
        elif kind == 6:
            weights[f"{name}.{name}"] = tensor
        else:
            weights[name] = [3, None, {}, "text", {"a": tensor}, [tensor]][rng.integers(6)]
    return weights


class Malicious:
    """Calls something when it is unpickled."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def malicious(canary: Path, rng: np.random.Generator) -> object:
    """An object that would create the canary."""
    calls = (
        (os.system, f"touch {canary}"),
        (os.mkdir, str(canary)),
        (eval, f"open({str(canary)!r}, 'w')"),
        (exec, f"import os; os.mkdir({str(canary)!r})"),
        (open, str(canary), "w"),
        (torch.save, {}, str(canary)),
    )
    return Malicious(*calls[rng.integers(len(calls))])


@pytest.fixture(scope="module")
def student():
    return build_branches(Model("vit_tiny", **MODEL), [])[0]


def complaint(read: Callable, path: Path) -> str:
    """What a reader says against a file; empty where it reads it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(path)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def check_file(path: Path, student: torch.nn.Module) -> bool:
    """Each reader gives numbers, or a sentence that names the file. Whether the student took them."""
    readers = (read_published, lambda path: open_checkpoint(str(path), heads=2), lambda path: init_from(student, path))
    for read in readers:
        said = complaint(read, path)
        if said:
            assert re.fullmatch(r"[^\n]+, got [^\n]+; [^\n]+\.", said), said
            assert path.name in said, said
            assert len(said) < 5000
    assert all(tensor.isfinite().all() for tensor in student.state_dict().values())
    return not said


def test_damaged_files_give_weights_or_a_sentence(student, tmp_path):
    plain, taken = timm_vit().state_dict(), []

    def attempt(rng):
        layout = list(LAYOUTS)[rng.integers(len(LAYOUTS))]
        weights = other_weights(plain, rng) if rng.random() < 0.5 else plain
        safe = rng.random() < 0.3
        if safe:
            dense = {name: t.clone().contiguous() for name, t in weights.items() if torch.is_tensor(t)}
            data = save({name.replace("\0", ""): t for name, t in dense.items()})
        else:
            try:
                data = pickled(LAYOUTS[layout](weights), rng)
            except (TypeError, RuntimeError, AttributeError):  # a layout that cannot be made of these
                return
        kind = rng.integers(3)
        data = [lambda: data, lambda: spoiled(data, rng), lambda: with_spoiled_entry(data, rng)][kind]()
        path = tmp_path / f"weights.{'safetensors' if safe else 'pth'}"
        path.write_bytes(data)
        taken.append(check_file(path, student))

    fuzz(attempt)
    assert {True, False} == set(taken)


def test_nothing_in_a_file_is_executed(student, tmp_path):
    canary, path, plain = tmp_path / "canary", tmp_path / "weights.pth", timm_vit().state_dict()

    def attempt(rng):
        thing = malicious(canary, rng)
        content = [thing, {**plain, "x": thing}, {"model": plain, "args": [thing]}, {"state_dict": thing}][
            rng.integers(4)
        ]
        data = pickle.dumps(content, protocol=int(rng.integers(0, 6))) if rng.random() < 0.3 else pickled(content, rng)
        path.write_bytes(with_spoiled_entry(data, rng) if rng.random() < 0.3 else data)
        check_file(path, student)
        assert not canary.exists()

    fuzz(attempt)
    data = pickle.dumps(Malicious(os.mkdir, str(canary)))
    pickle.loads(data)  # so that the canary can be seen
    assert canary.exists()
