"""Iterables: read in their own order, pass after pass; the same stream for any ranks, workers and restarts."""

import itertools
import json
import os
import signal
import warnings

import numpy as np
import pytest
import torch
from data.pictures import picture
from PIL import Image
from torch.utils.data import DataLoader

from patchlight.data.policy import dino_policy
from patchlight.data.sources import open_own
from patchlight.data.stream_loader import StreamLoader

POLICY = dino_policy(2, 24, 12)
COUNT = 31
pytestmark = pytest.mark.filterwarnings("ignore:.*pass \\d+ has ended", "ignore:.*read again and dropped")


class Stream:
    """Pictures in order."""

    def __init__(self, count: int = COUNT) -> None:
        self.count = count

    def __iter__(self):
        for number in range(self.count):
            yield Image.fromarray(picture(number)), number % 3


class Kinds(Stream):
    """The same pictures in all kinds that travel differently to workers."""

    def __init__(self, folder) -> None:
        super().__init__()
        self.paths = [folder / f"{number}.png" for number in range(self.count)]
        for number, path in enumerate(self.paths):
            Image.fromarray(picture(number)).save(path)

    def __iter__(self):
        for number, path in enumerate(self.paths):
            yield (picture(number), path, path.read_bytes(), {"image": str(path)})[number % 4]


class Shuffled(Stream):
    """Another order in each pass."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        for number in np.random.default_rng(self.epoch).permutation(self.count).tolist():
            yield picture(number)


class Stateful(Shuffled):
    """Finds its place again without reading up to it."""

    def __init__(self) -> None:
        super().__init__()
        self.next, self.read = 0, 0

    def state_dict(self):
        return {"epoch": self.epoch, "next": self.next}

    def load_state_dict(self, state):
        self.epoch, self.next = state["epoch"], state["next"]

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(self.count).tolist()
        while self.next < self.count:
            self.read, self.next = self.read + 1, self.next + 1
            yield picture(order[self.next - 1])
        self.next = 0


@pytest.fixture
def build():
    built = []

    def build(images, batch: int = 6, **options) -> StreamLoader:
        built.append(StreamLoader(open_own(images), POLICY, batch, **{"epoch_images": 30, "seed": 5, **options}))
        return built[-1]

    yield build
    for loader in built:
        loader.close()


def steps(loader, count: int) -> list[list[torch.Tensor]]:
    return [list(next(loader).tensors()) for _ in range(count)]


def joined(ranks: list[list[list[torch.Tensor]]]) -> list[list[torch.Tensor]]:
    """Per step, all tensors of the ranks' parts, concatenated along the images."""
    return [
        [torch.cat(parts, int(parts[0].ndim > 1)) for parts in zip(*of_ranks, strict=True)]
        for of_ranks in zip(*ranks, strict=True)
    ]


def assert_same(one: list[list[torch.Tensor]], two: list[list[torch.Tensor]]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert len(a) == len(b)
        assert all(torch.equal(left, right) for left, right in zip(a, b, strict=True))


def test_ids_are_running_numbers_and_crops_are_new_in_each_pass(build):
    found = steps(build(Stream(12)), 4)
    ids = [tensors for tensors in zip(*found, strict=True) if tensors[0].dtype == torch.int64]
    assert torch.cat(ids[0]).tolist() == list(range(24))
    first, second = (next(build(Stream(6), seed=seed)) for seed in (5, 6))
    assert not torch.equal(first.global_crops.box, second.global_crops.box)
    loader = build(Stream(6))
    one, two = next(loader), next(loader)
    assert (one.global_crops.box != two.global_crops.box).any(-1).all(), "the same images"


@pytest.mark.parametrize("world", [2, 3, 6])
def test_the_stream_does_not_depend_on_the_number_of_ranks(build, world):
    alone = steps(build(Stream()), 9)
    ranks = [steps(build(Stream(), 6 // world, rank=rank, world=world), 9) for rank in range(world)]
    assert_same(joined(ranks), alone)


@pytest.mark.parametrize("kind", [Shuffled, Stateful])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 3, 5, 6, 11])
def test_a_resumed_stream_continues_exactly(build, kind, stop, workers):
    """Within a pass of five steps and an item, at its end, and in later ones; with batches read ahead or not."""
    whole = steps(build(kind()), 16)
    first = build(kind(), workers=workers)
    before = steps(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    steps(first, 1)  # a step that the crash loses
    first.close()
    second = build(kind(), workers=workers)
    second.load_state_dict(state)
    after = steps(second, 16 - stop)
    second.close()
    assert_same(before + after, whole)


def test_kinds_of_items_reach_workers_unchanged(build, tmp_path):
    alone = steps(build(Stream()), 9)
    assert_same(steps(build(Kinds(tmp_path), workers=2), 9), alone)


def test_each_pass_has_its_number(build):
    class Told(Shuffled):
        told: tuple[int, ...] = ()

        def set_epoch(self, epoch):
            super().set_epoch(epoch)
            self.told += (epoch,)

    images = Told(12)
    first = build(images)
    found = steps(first, 4)
    assert images.told == (0, 1)
    again = build(Told(12))
    again.load_state_dict(first.state_dict())
    steps(again, 1)
    assert again.stream.images.told == (1, 2)
    assert not torch.equal(found[0][0].mean((0, 2, 3, 4)).sort()[0], found[2][0].mean((0, 2, 3, 4)).sort()[0])


def itself(item):
    return item


def test_torchs_data_loader_may_read_items_in_processes_of_its_own(build):
    items = [picture(number) for number in range(COUNT)]
    others = DataLoader(items, batch_size=None, num_workers=2, collate_fn=itself)
    assert_same(steps(build(others), 7), steps(build(Stream()), 7))


def test_a_stream_may_be_resumed_by_another_number_of_ranks(build):
    whole = steps(build(Shuffled()), 8)
    part = build(Shuffled())
    steps(part, 3)
    ranks = [build(Shuffled(), 2, rank=rank, world=3) for rank in range(3)]
    for loader in ranks:
        loader.load_state_dict(part.state_dict())
    assert_same(joined([steps(loader, 5) for loader in ranks]), whole[3:])


def test_a_state_of_its_own_saves_reading_again(build):
    first = build(Stateful())
    steps(first, 7)
    images = Stateful()
    second = build(images)
    second.load_state_dict(first.state_dict())
    steps(second, 1)
    assert images.read == 6


def test_reading_again_is_said(build):
    first = build(Stream())
    steps(first, 4)
    second = build(Stream())
    second.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match="Stream: 24 items of pass 1 are read again and dropped, to go on after them"):
        next(second)
    silent = build(Stream(), 3, rank=1, world=2)
    silent.load_state_dict(first.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(silent)


def test_a_state_that_no_checkpoint_holds_is_said_and_not_used(build):
    class Tensors(Stateful):
        def state_dict(self):
            return {"next": torch.tensor(self.next)}

    with pytest.warns(UserWarning, match="Tensors: its state_dict has more than plain values .* reads it again up to"):
        before = steps(first := build(Tensors()), 3)
    second = build(Tensors())
    second.load_state_dict(first.state_dict())
    assert_same(before + steps(second, 1), steps(build(Tensors()), 4))


class Shard(Stream):
    """What one of several processes reads: pictures of its own."""

    sharded = True

    def __init__(self, rank: int, count: int = COUNT) -> None:
        super().__init__(count)
        self.rank = rank

    def __iter__(self):
        for number in range(self.count):
            yield picture(100 * self.rank + number)


def test_each_rank_reads_all_of_a_sharded_iterable(build):
    ranks = [build(Shard(rank, 31 - rank), 3, rank=rank, world=2) for rank in range(2)]
    whole = [steps(loader, 14) for loader in ranks]
    ids = torch.cat([t for step in joined(whole) for t in step if t.dtype == torch.int64])
    assert ids.tolist() == list(range(14 * 6)), "no two samples have the same crops"
    alone = steps(build(Stream(), 3), 14)
    boxes = [step[1] for step in whole[1]]
    assert not any(torch.equal(a, step[1]) for a, step in zip(boxes, alone, strict=True))
    again = [build(Shard(rank, 31 - rank), 3, rank=rank, world=2) for rank in range(2)]
    for loader in again:
        steps(loader, 11)
    states = [loader.state_dict() for loader in again]
    assert states[0]["of_rank"]["taken"] != states[1]["of_rank"]["taken"], "their passes end at different steps"
    saved = json.loads(json.dumps(states[0] | {"of_ranks": [state["of_rank"] for state in states]}))
    for rank in range(2):
        loader = build(Shard(rank, 31 - rank), 3, rank=rank, world=2)
        loader.load_state_dict(saved)
        assert_same(steps(loader, 3), whole[rank][11:])
    with pytest.raises(
        ValueError, match="resumed on as many processes as have read it, got 3 where there were 2; start 2"
    ):
        build(Shard(0), 2, rank=0, world=3).load_state_dict(saved)


@pytest.mark.parametrize(
    ("change", "key"), [({"seed": 6}, "seed"), ({"images": Shuffled()}, "stream"), ({"images": Shard(0)}, "stream")]
)
def test_another_stream_is_refused(build, change, key):
    state = build(Stream()).state_dict()
    with pytest.raises(ValueError, match=f"same data in the same order, got {key}="):
        build(**({"images": Stream()} | change)).load_state_dict(state)


def test_fewer_images_than_before_are_refused(build):
    first = build(Stream())
    steps(first, 4)
    second = build(Stream(20))
    second.load_state_dict(first.state_dict())
    with pytest.raises(
        ValueError, match=r"same images in the same order, got an end after 20 items where 24 were read"
    ):
        next(second)


def test_a_new_pass_is_said(build):
    loader = build(Stream(7))
    next(loader)
    with pytest.warns(UserWarning, match="Stream: pass 1 has ended after 7 items; pass 2 begins"):
        next(loader)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("count", "got"), [(0, "none"), (5, "5")])
def test_a_pass_without_a_global_batch_is_an_error(build, count, got, workers):
    with pytest.raises(ValueError, match=f"must have the images of a global batch, 6, got {got} in pass 1; give more"):
        next(build(Stream(count), 3, world=2, workers=workers))


def test_an_iterator_is_read_once(build):
    whole = steps(build(Stream(14)), 2)
    loader = build(iter(Stream(14)))
    assert_same(steps(loader, 2), whole)
    with pytest.raises(ValueError, match=r"got none in pass 2; pass an object that can be iterated anew"):
        next(loader)
    resumed = build(iter(Stream()))
    resumed.load_state_dict(loader.state_dict())
    assert_same(steps(resumed, 1), steps(build(Stream()), 3)[2:])
    with pytest.raises(ValueError, match=r"must begin anew, got an iterator, of which a part was read"):
        resumed.load_state_dict(loader.state_dict()), next(resumed)


class Damaged(Stream):
    """Files of which one is no image; one of other kinds, of which another raises when it is asked for."""

    def __iter__(self):
        return iter(map(self.item, range(self.count)))

    def item(self, number):
        if number == 9:
            raise OSError("no connection")
        return b"no image" if number == 8 else picture(number)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_item_that_cannot_be_read_is_replaced_counted_and_named(build, tmp_path, workers):
    loader = build(Damaged(), workers=workers, most_bad=0.1, report=tmp_path / "bad.tsv")
    with pytest.warns(UserWarning, match="took its place") as warned:
        found = steps(loader, 4)
    sentences = [str(w.message) for w in warned]
    assert any("stream loader: item 8 of Damaged cannot be read (ValueError: the file is no" in s for s in sentences)
    assert any("item 9 of Damaged cannot be read (OSError: no connection)" in s for s in sentences)
    assert loader.replaced == 2
    ids = torch.cat([t for step in found for t in step if t.dtype == torch.int64]).tolist()
    assert [i for i in range(24) if i not in ids] == [8, 9]
    assert set(ids[6:12]) <= set(range(6, 12)), "substitutes come from the same batch"
    assert len((tmp_path / "bad.tsv").read_text().splitlines()) == 2
    alone = steps(build(Stream()), 4)
    assert_same([found[0], *found[2:]], [alone[0], *alone[2:]])
    assert all(torch.isfinite(t).all() for t in found[1])


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_too_many_that_cannot_be_read_end_the_run(build):
    class Half(Stream):
        def __iter__(self):
            return iter([picture(0), b""] * 15)

    with pytest.raises(RuntimeError, match=r"at most 5.00% of 30 images may be unreadable, got 3 .*; leave them out"):
        next(build(Half()))


class Dying(Stream):
    """A generator, which ends with its first error."""

    def __iter__(self):
        yield from itertools.islice(super().__iter__(), 8)
        raise OSError("no connection")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_iterable_that_ends_with_an_error_ends_the_run(build, workers):
    class Hidden(Dying):
        def __iter__(self):
            return map(np.asarray, (image for image, _ in super().__iter__()))

    error = "OSError: no connection, after 8 items of pass 1; catch"
    for kind, got in ((Dying, error), (Hidden, f"its end after {error}")):
        with pytest.raises(
            (RuntimeError, ValueError), match=f"must go on after an item that cannot be read, got {got}"
        ):
            steps(build(kind(), workers=workers), 2)


def test_an_item_of_another_kind_ends_the_run(build):
    with pytest.raises(ValueError, match=r"item 0 of list_iterator must be .* float64; give values"):
        next(build(iter([picture(0) / 255] * 9)))


def test_a_worker_that_is_killed_reads_the_same_images_again(build):
    """Batches of images are larger than a pipe holds: giving them never waits for a worker."""

    class Large(Stream):
        def __iter__(self):
            for number in range(COUNT):
                yield np.tile(picture(number), (9, 9, 1))

    whole = steps(build(Large()), 10)
    loader = build(Large(), workers=2, timeout=5.0)
    before = steps(loader, 2)
    for worker, number in zip(loader._reader._ahead._workers, (signal.SIGSTOP, signal.SIGKILL), strict=True):
        os.kill(worker.process.pid, number)
    with pytest.warns(UserWarning, match="is started anew and reads the same batch again"):
        after = steps(loader, 8)
    assert_same(before + after, whole)


def test_memory_of_batches_is_given_back(build):
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    loader = build(Stream(), workers=2)
    steps(loader, 4)
    before = descriptors()
    steps(loader, 12)
    assert descriptors() <= before + 4
