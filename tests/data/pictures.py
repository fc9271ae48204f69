"""Sources for tests: smooth pictures of several sizes, in memory or as files."""

from pathlib import Path

import numpy as np
from PIL import Image


class Pictures:
    """`count` smooth pictures whose sizes differ; those in `bad` cannot be read."""

    classes, labels, fingerprint = (), None, "pictures"

    def __init__(self, count: int, bad: tuple[int, ...] = ()) -> None:
        self.images = [picture(number) for number in range(count)]
        self.bad = set(bad)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"picture {index}"

    def read(self, index: int) -> np.ndarray:
        if index in self.bad:
            raise OSError("broken data stream")
        return self.images[index]


def picture(number: int) -> np.ndarray:
    """[H, W, 3] uint8, smooth, without symmetry."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return np.array(coarse.resize((60 + number % 5 * 8, 50 + number % 3 * 10), Image.Resampling.BICUBIC))


def write_pictures(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number)).save(path)
