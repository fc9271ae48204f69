"""A step on many GPUs: what its messages take, how much of that computation hides, and how a run scales by that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log2

from rich.table import Table

from patchlight.run import Run

from ..console import wide_console
from ..rows import Row
from .count import as_on_a_gpu, build_trainer, count_step
from .fake_gpu import fake_gpu
from .hardware import Hardware
from .records import BACKWARD, Launch
from .traffic import ALL_REDUCE, EVERYONE, GRADIENTS, REPLICATE, WEIGHTS, Message, StepTraffic, traffic_of

COLUMNS = (
    "method", "hardware", "layout", "scaling", "gpus", "batch", "computed_ms", "sent_mb", "messages", "network_ms",
    "visible_ms", "step_ms", "images_per_s", "efficiency",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """`replicate` copies of the model, each on `shard` neighboring GPUs."""

    replicate: int
    shard: int

    @property
    def world(self) -> int:
        return self.replicate * self.shard

    @property
    def title(self) -> str:
        if self.shard == 1:
            return "replicas"
        return "full shards" if self.replicate == 1 else f"shards of {self.shard}"


def layouts(gpus: int, node: int) -> list[Layout]:
    """Copies, copies on a node each, and one copy on all; those that differ."""
    shards = dict.fromkeys((1, node if gpus % node == 0 else gpus, gpus))
    return [Layout(gpus // shard, shard) for shard in shards]


@dataclass(frozen=True)
class Network:
    """The constants of the hardware's file for messages."""

    gpus_per_node: int
    nvlink_gb_s: float
    nic_gb_s: float
    node_latency_us: float
    doubling_latency_us: float
    hidden_share: float

    def milliseconds(self, message: Message, layout: Layout) -> float:
        """Within nodes first, then between the GPUs of the same number in all nodes, each with its share."""
        inside, nodes = self.shape(message, layout)
        rounds = 2 if message.kind == ALL_REDUCE else 1
        within = rounds * (inside - 1) / inside * message.bytes / self.nvlink_gb_s
        between = rounds * (nodes - 1) / nodes * message.bytes / inside / self.nic_gb_s
        latency = self.node_latency_us * (inside > 1) + self.doubling_latency_us * log2(nodes)
        return (within + between) / 1e6 + latency / 1e3

    def shape(self, message: Message, layout: Layout) -> tuple[int, int]:
        """How many members of the message's group share a node, and over how many nodes the group goes."""
        if message.group == EVERYONE:
            members, spread = layout.world, 1
        elif message.group == REPLICATE:
            members, spread = layout.replicate, layout.shard
        else:
            members, spread = layout.shard, 1
        inside = max(1, min(members, self.gpus_per_node // spread))
        return inside, members // inside


def wire_bytes(message: Message, layout: Layout) -> float:
    """What a rank sends by the usual ring, whatever the distance."""
    members = {EVERYONE: layout.world, REPLICATE: layout.replicate}.get(message.group, layout.shard)
    return (2 if message.kind == ALL_REDUCE else 1) * (members - 1) / members * message.bytes


def plan(
    method: str,
    run: Run,
    gpus: Sequence[int],
    hardware: Hardware,
    global_batch: int | None = None,
    compiled: bool = False,
) -> list[Row]:
    """Rows for weak scaling, with the run's batch on every GPU, and for strong scaling of one global batch."""
    network = Network(**hardware.table["network"])
    with fake_gpu():
        trainer = build_trainer(as_on_a_gpu(run))
        trainer.device_step([next(trainer.loader) for _ in range(run.parallel.accumulate)])
        traffic = traffic_of(trainer)
    batch = run.data.batch_per_rank
    sizes = {"weak": dict.fromkeys(gpus, batch)}
    if global_batch is not None:
        sizes["strong"] = {number: global_batch // number for number in gpus if global_batch % number == 0}
    needed = sorted({batch, *(size for of_kind in sizes.values() for size in of_kind.values())})
    launches = {size: count_step(with_batch(run, size), compiled) for size in needed}
    single = computed(launches[batch], hardware) / batch  # per image, on one GPU at the run's batch
    rows = []
    for scaling, of_kind in sizes.items():
        for number, size in of_kind.items():
            for layout in layouts(number, network.gpus_per_node):
                row: Row = {"method": method, "hardware": hardware.name, "scaling": scaling, "batch": size}
                row |= predict(launches[size], traffic, layout, network, hardware, compiled)
                rows.append(
                    row
                    | {
                        "images_per_s": number * size / row["step_ms"] * 1e3,
                        "efficiency": single * size / row["step_ms"],
                    }
                )
    return rows


def with_batch(run: Run, batch: int) -> Run:
    return replace(run, data=replace(run.data, batch_per_rank=batch))


def computed(launches: Sequence[Launch], hardware: Hardware) -> float:
    """Milliseconds of a step on one GPU, as one graph."""
    return hardware.wall_ms(hardware.device_ms(launch.kernel for launch in launches), len(launches), graph=True)


def predict(
    launches: Sequence[Launch],
    traffic: StepTraffic,
    layout: Layout,
    network: Network,
    hardware: Hardware,
    compiled: bool,
) -> Row:
    """The step of one layout: gradients run beside the backward, gathered weights beside everything, the rest beside nothing.

    The backward of a replica's branch that is compiled as a whole gives all gradients at its end: they run beside nothing.
    """
    messages = list(traffic.messages(layout.replicate, layout.shard))
    alone = computed(launches, hardware)
    backward = hardware.device_ms(launch.kernel for launch in launches if launch.phase == BACKWARD)
    times = {message: network.milliseconds(message, layout) for message in set(messages)}
    hidden = (WEIGHTS,) if compiled and layout.shard == 1 else (WEIGHTS, GRADIENTS)
    hideable = sum(times[message] for message in messages if message.purpose in hidden)
    waited = sum(times[message] for message in messages if message.purpose not in hidden)
    beside = backward if layout.shard == 1 else alone
    visible = waited + max(0.0, hideable - network.hidden_share * beside)
    return {
        "layout": layout.title,
        "gpus": layout.world,
        "computed_ms": alone,
        "sent_mb": sum(wire_bytes(message, layout) for message in messages) / 1e6,
        "messages": len(messages),
        "network_ms": hideable + waited,
        "visible_ms": visible,
        "step_ms": alone + visible,
    }


def print_plan(rows: Sequence[Row]) -> None:
    """What a step sends and how the run scales; predictions."""
    title = f"{rows[0]['method']} on many GPUs, predicted for {rows[0]['hardware']}"
    table = Table(title=title)
    table.add_column("scaling")
    table.add_column("layout", no_wrap=True)
    for name in ("GPUs", "batch each", "computed ms", "sent MB", "messages", "network ms", "of it visible", "images/s",
                 "efficiency"):  # fmt: skip
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["scaling"], row["layout"], str(row["gpus"]), str(row["batch"]), f"{row['computed_ms']:.1f}",
            f"{row['sent_mb']:.0f}", str(row["messages"]), f"{row['network_ms']:.2f}", f"{row['visible_ms']:.2f}",
            f"{row['images_per_s']:.0f}", f"{row['efficiency']:.0%}",
        )  # fmt: skip
    wide_console().print(table)
