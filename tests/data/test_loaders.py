"""Which loader runs, and the reason; a loader that is set by name is never replaced."""

import pytest
import torch
from data.pictures import Pictures

from patchlight.data import loaders
from patchlight.data.policy import dino_policy

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("wanted", "device", "installed", "name", "why"),
    [
        ("auto", GPU, True, "dali", "on cuda:0"),
        ("auto", GPU, False, "torchvision", "not installed"),
        ("auto", CPU, True, "torchvision", "no GPU"),
        ("dali", CPU, True, "dali", "set by Data.loader"),
        ("torchvision", GPU, True, "torchvision", "set by Data.loader"),
        ("procedural", GPU, True, "procedural", "set by Data.loader"),
    ],
)
def test_the_choice(monkeypatch, wanted, device, installed, name, why):
    monkeypatch.setattr(loaders, "dali_is_there", lambda: installed)
    choice = loaders.choose_loader(wanted, device)
    assert choice.name == name
    assert why in choice.why


def test_dali_is_never_replaced_when_it_is_set(monkeypatch):
    monkeypatch.setattr(loaders, "dali_is_there", lambda: False)
    with pytest.raises(ModuleNotFoundError, match=r"needs NVIDIA DALI, got a Python without it; pip install"):
        loaders.choose_loader("dali", GPU)


def test_the_torchvision_loader_is_built_without_dali(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali", None)
    loader = loaders.build_loader("torchvision", Pictures(4), dino_policy(1, 24, 12), 2, seed=3, most_bad=0.5)
    assert (loader.name, loader.seed, loader.most_bad) == ("torchvision", 3, 0.5)
    assert next(loader).ids.shape == (2,)
