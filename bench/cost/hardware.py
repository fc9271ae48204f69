"""The constants of one GPU and its network, from bench/hardware/NAME.toml, and the time of a kernel by them."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .records import Kernel

FOLDER = Path(__file__).parent.parent / "hardware"
ELSE = "elementwise"  # the constants of a kind that the file does not name


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


@dataclass(frozen=True)
class Hardware:
    """`table` is the file as it is; every constant in it says where it comes from."""

    name: str
    table: dict[str, Any]

    @classmethod
    def load(cls, name: str) -> Hardware:
        path = FOLDER / f"{name}.toml"
        if not path.exists():
            raise ValueError(f"The hardware must be one of {names()}, got {name!r}; choose one of them.")
        table = tomllib.loads(path.read_text())
        if "based_on" not in table:
            return cls(name, table)
        base = cls.load(table["based_on"]).table
        kinds = {kind: scaled(values, table["tflops_scale"]) for kind, values in base["kinds"].items()}
        return cls(name, {**base, "kinds": kinds, **table})

    def microseconds(self, kernel: Kernel) -> float:
        """The longest of what the kernel's bytes, FLOPs and blocks take, and of the least time of its kind."""
        kinds = self.table["kinds"]
        kind = kinds.get(kernel.kind, kinds[ELSE])
        times = [kind.get("floor_us", kinds[ELSE]["floor_us"])]
        times.append(kernel.bytes / (self.table["memory"]["copy_tb_s"] * kind.get("share", 1.0)) / 1e6)
        if "tflops" in kind:
            times.append(kernel.flops / kind["tflops"] / 1e6)
        times.append(kernel.blocks * kind.get("block_ns", 0.0) / 1e3)
        return max(times)

    def device_ms(self, kernels: Iterable[Kernel]) -> float:
        return sum(map(self.microseconds, kernels)) / 1e3

    def wall_ms(self, device_ms: float, launches: int, graph: bool) -> float:
        """Launched from Python one by one, or replayed as one graph: what is longer, the host or the device."""
        launch = self.table["launch"]
        if graph:
            return device_ms + launches * launch["graph_us"] / 1e3
        return max(device_ms, launches * launch["python_us"] / 1e3)


def scaled(kind: dict[str, float], factor: float) -> dict[str, float]:
    return {**kind, "tflops": kind["tflops"] * factor} if "tflops" in kind else kind
