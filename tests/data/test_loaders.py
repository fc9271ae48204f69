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


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_a_data_set_of_the_users_own_is_read_by_python(monkeypatch, device):
    """In processes, where DALI's threads might read what allows one at a time."""
    monkeypatch.setattr(loaders, "dali_is_there", lambda: True)
    choice = loaders.choose_loader("auto", device, own=True)
    assert (choice.name, choice.why) == ("torchvision", "a data set of your own is read by Python, not by NVIDIA DALI")
    assert loaders.choose_loader("torchvision", device, own=True).why == "set by Data.loader"
    with pytest.raises(ValueError, match=r'may not allow, got Data.loader="dali"; use loader="auto" or loader="torchv'):
        loaders.choose_loader("dali", device, own=True)


def test_dali_is_never_replaced_when_it_is_set(monkeypatch):
    monkeypatch.setattr(loaders, "dali_is_there", lambda: False)
    with pytest.raises(ModuleNotFoundError, match=r"needs NVIDIA DALI, got a Python without it; pip install"):
        loaders.choose_loader("dali", GPU)


def test_the_torchvision_loader_is_built_without_dali(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali", None)
    loader = loaders.build_loader("torchvision", Pictures(4), dino_policy(1, 24, 12), 2, seed=3, most_bad=0.5)
    assert (loader.name, loader.seed, loader.most_bad) == ("torchvision", 3, 0.5)
    assert next(loader).ids.shape == (2,)
