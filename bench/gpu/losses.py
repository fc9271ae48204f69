"""Each method's first loss beside that of the official mathematics, on this device: same weights and crops, no path dropped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from ..methods import LAPTOP, LARGE, METHODS, Method, StepSize, build_official, build_trainer, last_loss

TOLERANCE = {"bf16": 1e-3, "fp32": 1e-4}  # relative
BATCH = 16


def first_losses(method: Method, size: StepSize) -> tuple[float, float, float]:
    """Ours, the official one, and how far they may be apart."""
    run = method.run(size)
    trainer = build_trainer(replace(run, parallel=replace(run.parallel, graph="off", compile="off")))
    official = build_official(method.official, trainer)
    with torch.autocast(trainer.mesh.device.type, torch.bfloat16, enabled=run.parallel.precision == "bf16"):
        expected = float(official.step(next(trainer.loader)))
    trainer.step()
    return last_loss(trainer), expected, TOLERANCE[run.parallel.precision]


def compare(names: Iterable[str], size: StepSize) -> list[str]:
    """Prints both losses of each method; gives the names of those that differ."""
    differing, errors = [], []
    for name in names:
        ours, expected, tolerance = first_losses(METHODS[name], size)
        errors.append(abs(ours - expected) / abs(expected))
        print(f"{name}: ours {ours:.5f}, official {expected:.5f}, relative difference {errors[-1]:.1e}", flush=True)
        if not errors[-1] <= tolerance:  # also of what is not a number
            differing.append(name)
    print(f"{len(errors)} methods, largest relative difference {max(errors):.1e}")
    return differing


def main() -> None:
    size = replace(LARGE, batch=BATCH) if torch.cuda.is_available() else LAPTOP
    if differing := compare(METHODS, size):
        raise SystemExit(f"losses differ from the official ones: {', '.join(differing)}")


if __name__ == "__main__":
    main()
