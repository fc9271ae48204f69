"""What linear probes, fine-tuning and segmentation share: batches, schedules, parameter groups, the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from ..checks import check, sentence
from ..data.reading import TIMEOUT, Named, read_sample
from .encoder import EvaluatedBackbone
from .images import Unreadable
from .layers import MASK_TOKEN, parameter_layers
from .ranks import Ranks

UNDECAYED = ("bias", "pos_embed", "cls_token", "reg_token", "relative_position_bias_table")  # ends of names


class Batches(Sampler[list[int]]):
    """This rank's part of each global batch over all epochs. Images that do not fill a batch are dropped in each epoch."""

    def __init__(self, count: int, batch: int, epochs: int, ranks: Ranks, seed: int = 0) -> None:
        self.count, self.epochs, self.ranks, self.seed = count, epochs, ranks, seed
        self.batch = min(batch, count)
        check(
            self.batch >= ranks.world,
            "Every rank needs an image of each batch",
            f"batches of {self.batch} for {ranks.world} ranks",
            "use fewer ranks or more images",
        )
        self.steps_per_epoch = count // self.batch

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch // self.ranks.world
        for epoch in range(self.epochs):
            order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
            for step in range(self.steps_per_epoch):
                first = step * self.batch + self.ranks.rank * share
                yield order[first : first + share].tolist()


class TrainingData(Named, Protocol):
    """Images, or scenes, that are read and changed at random."""

    def __getitem__(self, item: int) -> tuple[Tensor, Any]: ...


class TrainingBatches:
    """Batches over all epochs from one set of workers. Another sample, drawn by seed, takes the place of an unreadable one."""

    def __init__(self, data: TrainingData, loader: DataLoader, unreadable: Unreadable) -> None:
        self.data, self.loader, self.unreadable = data, loader, unreadable

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for sample, numbers, reasons in self._in_time():
            for number, reason in zip(numbers.tolist(), reasons, strict=True):
                if reason:
                    self.unreadable.add(self.data.name(number), reason)
            yield sample

    def _in_time(self) -> Iterator[tuple]:
        """The loader's batches; an error if a worker stands still. A finished batch before is lost with it, so that it is
        named from there on."""
        batches = iter(self.loader)
        for items in self.loader.batch_sampler or ():
            try:
                yield next(batches)
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
                names = ", ".join(self.data.name(item) for item in items[:3]) + (
                    " and others" if len(items) > 3 else ""
                )
                got = f"nothing in {self.loader.timeout:g} seconds at {names} or in the batches after it"
                remedy = "look at these files and their file system, or use --reading.workers 0"
                raise RuntimeError(sentence("A worker must read its batch", got, remedy)) from error


class _Replacing(Dataset):
    """(a sample, -1, ""), or (its substitute, the number of the unreadable one, why)."""

    def __init__(self, data: TrainingData, seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, item: int) -> tuple[tuple[Tensor, Any], int, str]:
        sample = read_sample(self.data, self.seed, item, self.data.__getitem__)
        return (sample.content, *((item, sample.replacement.reason) if sample.replacement else (-1, "")))


def training_loader(
    data: TrainingData,
    batches: Batches,
    workers: int,
    device: torch.device,
    unreadable: Unreadable,
    collate: Callable[[list], tuple] | None = None,
) -> TrainingBatches:
    """collate: makes a batch of samples that do not stack."""
    replacing, pin_memory = _Replacing(data, batches.seed), device.type == "cuda"
    timeout = TIMEOUT if workers else 0
    loader = DataLoader(replacing, batch_sampler=batches, num_workers=workers, pin_memory=pin_memory, timeout=timeout,
                        collate_fn=collate)  # fmt: skip
    return TrainingBatches(data, loader, unreadable)


def cosine_rate(step: int, total: int, peak: float, end: float = 0.0, warmup: int = 0) -> float:
    """The learning rate of a step: a straight rise from 0 over the warm-up, then half a cosine."""
    if step < warmup:
        return peak * step / warmup
    return end + 0.5 * (peak - end) * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def poly_rate(step: int, total: int, peak: float, end: float = 0.0, warmup: int = 0, power: float = 1.0) -> float:
    """A fall by a power of the share of steps that are left, times a straight rise from almost 0, as in mmsegmentation."""
    rate = end + (peak - end) * (1 - step / total) ** power
    return rate * max(step / warmup, 1e-6) if step < warmup else rate


def layer_groups(
    backbone: EvaluatedBackbone, others: nn.Module, decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups with an `lr_scale`: decay^(distance from the top) in the backbone, 1 elsewhere.

    Vectors, biases, tokens and tables of positions have no weight decay.
    """
    own = [(name, p) for name, p in backbone.named_parameters() if name != MASK_TOKEN]
    if decay == 1:
        scales = [(name, p, 1.0) for name, p in own]
    else:
        layers, top = parameter_layers(backbone)
        scales = [(name, p, decay ** (top - layers[name])) for name, p in own]
    scales += [(name, p, 1.0) for name, p in others.named_parameters()]
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter, scale in scales:
        if not parameter.requires_grad:
            continue
        undecayed = parameter.ndim <= 1 or name.endswith(UNDECAYED)
        group = {"params": [], "lr_scale": scale, "weight_decay": 0.0 if undecayed else weight_decay}
        groups.setdefault((scale, undecayed), group)["params"].append(parameter)
    return list(groups.values())


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of a step, scaled for each group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def update(
    loss: Tensor, module: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, max_norm: float = 0.0
) -> None:
    """One optimizer step on the gradients averaged over ranks; max_norm: their largest norm, 0 for none."""
    optimizer.zero_grad()
    loss.backward()
    average_gradients(module, ranks)
    if max_norm:
        torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm)
    optimizer.step()


def average_gradients(module: nn.Module, ranks: Ranks) -> None:
    """The mean gradient over ranks, in one message. Parameters without a gradient are left out on all ranks."""
    if ranks.world == 1:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= ranks.world
    for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(piece.view_as(gradient))


def broadcast_weights(module: nn.Module, ranks: Ranks) -> None:
    """All ranks take the first rank's values."""
    if ranks.world > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)
