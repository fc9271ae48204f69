"""Pretrains on a torch Dataset of your own, then on an iterable: `python examples/own_dataset.py --output FOLDER`.

The images are drawn here, so nothing is downloaded; it takes less than a minute on a CPU.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

import patchlight


def draw(number: int) -> Image.Image:
    """A disk or a square on gray; stands for an image that your code reads."""
    image = Image.new("RGB", (64, 48), (90, 90, 90))
    left, color = 5 + number * 7 % 30, (number * 37 % 256, number * 91 % 256, 200)
    shape = ImageDraw.Draw(image).ellipse if number % 2 else ImageDraw.Draw(image).rectangle
    shape((left, 10, left + 24, 34), fill=color)
    return image


class Shapes(Dataset):
    """Anything with a length and items by number. Items are whole images: patchlight crops them and changes colors."""

    def __init__(self, count: int) -> None:
        self.classes = ["square", "disk"]  # with `targets`, the teacher's k-NN accuracy is computed during the run
        self.targets = [number % 2 for number in range(count)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        return draw(number), self.targets[number]


class ShapesInOrder:
    """Anything that can be iterated, again and again: it may have no length, as images from a network."""

    def __iter__(self) -> Iterator[Image.Image]:
        for number in range(100):
            yield draw(number)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("runs/examples/own_dataset"))
    output = parser.parse_args().output

    run = patchlight.recipes.RECIPES["debug"]()  # a very small model; any recipe takes a source
    run = replace(
        run,
        data=replace(run.data, batch_per_rank=8),
        schedule=replace(run.schedule, steps_per_epoch=10),  # an iterable has no length; a Dataset needs no such number
    )
    for source in (Shapes(100), ShapesInOrder()):
        folder = output / type(source).__name__
        patchlight.train(replace(run, output=replace(run.output, folder=str(folder), resume=True)), source=source)

    teacher = patchlight.load_teacher(str(output / "Shapes"))
    image = torch.from_numpy(np.array(draw(3).crop((0, 0, 48, 48)))).permute(2, 0, 1)
    with torch.no_grad():
        encoded = teacher(teacher.normalize(image[None]))
    print(f"features of an image: {list(encoded.summary.shape)}, of its patches: {list(encoded.patches.shape)}")


if __name__ == "__main__":
    main()
