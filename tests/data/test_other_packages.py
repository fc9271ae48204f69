"""Data sets of Hugging Face's `datasets` and of `torchdata`, where these are installed: read, resumed, labeled."""

import json
import warnings

import numpy as np
import pytest
import torch
from data.pictures import picture
from PIL import Image

from patchlight.data.policy import dino_policy
from patchlight.data.sources import open_own
from patchlight.data.stream_loader import StreamLoader
from patchlight.data.torchvision_loader import TorchvisionLoader

POLICY = dino_policy(2, 24, 12)
COUNT = 31
pytestmark = pytest.mark.filterwarnings("ignore:.*pass \\d+ has ended", "ignore:.*set_vital")


def steps(loader, count: int) -> list[torch.Tensor]:
    return [tensor for _ in range(count) for tensor in next(loader).tensors()]


def assert_same(one: list[torch.Tensor], two: list[torch.Tensor]) -> None:
    assert len(one) == len(two)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def hugging_face(decode: bool = True):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b", "c"]))
    columns = {
        "image": [Image.fromarray(picture(number)) for number in range(COUNT)],
        "label": [number % 3 for number in range(COUNT)],
    }
    return datasets.Dataset.from_dict(columns, features).cast_column("image", datasets.Image(decode=decode))


def stream(loader_of: str):
    """An iterable with a state of its own."""
    if loader_of.startswith("datasets"):
        return hugging_face(decode=loader_of == "datasets").to_iterable_dataset(num_shards=4)
    pictures = [torch.from_numpy(picture(number)).permute(2, 0, 1) for number in range(COUNT)]
    if loader_of == "torchdata.nodes":
        nodes = pytest.importorskip("torchdata.nodes")
        return nodes.Loader(nodes.IterableWrapper(pictures))
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    return stateful.StatefulDataLoader(pictures, batch_size=None)


@pytest.mark.parametrize("decode", [True, False])
def test_a_dataset_of_hugging_face(decode):
    source = open_own(hugging_face(decode))
    assert source.labels.tolist() == [number % 3 for number in range(COUNT)]
    assert source.classes == ("a", "b", "c")
    assert np.array_equal(source.read(7), picture(7))
    assert source.name(7) == "item 7 of Dataset"
    loader = TorchvisionLoader(source, POLICY, 5, workers=2)
    pictures = [picture(number) for number in range(COUNT)]
    assert_same(steps(loader, 8), steps(TorchvisionLoader(open_own(pictures), POLICY, 5), 8))
    loader.close()


@pytest.mark.parametrize("stop", [3, 7, 8, 15])
@pytest.mark.parametrize("loader_of", ["datasets", "datasets, not decoded", "torchdata.nodes", "StatefulDataLoader"])
def test_a_stream_with_a_state_continues_exactly_and_reads_nothing_again(loader_of, stop):
    def build(**options) -> StreamLoader:
        return StreamLoader(open_own(stream(loader_of)), POLICY, 4, epoch_images=COUNT, **options)

    whole = steps(build(), 24)
    first = build(workers=2)
    before = steps(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    assert state["of_rank"]["state"] is not None
    second = build()
    second.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*read again and dropped")
        assert_same(before + steps(second, 24 - stop), whole)
