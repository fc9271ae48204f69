"""From a checkpoint to numbers and pictures in Python.

Features of a folder, k-NN, a linear probe, a map of attention, main directions of patches, nearest patches of other images.

    python examples/evaluate_and_look.py --checkpoint runs/NAME --images my/images --output runs/looks

--checkpoint: a run's folder, a .safetensors or .pth file, or the name of a timm ViT; without it a small model is trained first.
--images: a folder with train/ and val/, each with a folder per class; without it, drawn images are written to OUTPUT/images.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import patchlight
from patchlight.data.procedural import ProceduralSource
from patchlight.evaluation.encoder import Encoded, Encoder
from patchlight.evaluation.pictures.attention import draw_attention
from patchlight.evaluation.pictures.patch_features import attention_maps, draw_components, principal_components
from patchlight.evaluation.probes.knn import knn_accuracy
from patchlight.recipes import RECIPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOOKED_AT = 5  # images in the pictures


def train_small(folder: Path, steps: int) -> None:
    """The recipe `demo`, shortened to so many steps."""
    run = RECIPES["demo"]()
    schedule = patchlight.Schedule(epochs=8, steps_per_epoch=max(1, steps // 8))
    output = replace(run.output, folder=str(folder), evaluate_every=0, resume=True)  # nothing to do if it is done
    patchlight.train(replace(run, schedule=schedule, output=output))


def write_drawn_images(root: Path) -> None:
    """Images that need no download, as a folder of the usual form: train/CLASS/*.png and val/CLASS/*.png."""
    for part, count, seed in (("train", 600, 0), ("val", 200, 1)):
        source = ProceduralSource(count, seed=seed)
        for number, label in enumerate(source.labels):
            folder = root / part / source.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source.read(number)).save(folder / f"{number:04d}.png")


def open_part(folder: Path, size: int) -> ImageFolder:
    """A folder with a folder per class: images as uint8 [3, size, size], which is what `Encoder.normalize` takes."""
    center = [v2.Resize(size, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(size)]
    return ImageFolder(str(folder), v2.Compose([v2.PILToTensor(), v2.RGB(), *center]))


@torch.no_grad()
def features_of(encoder: Encoder, images: ImageFolder) -> tuple[Tensor, Tensor]:
    """One vector per image [n, D], and the labels [n]."""
    batches = DataLoader(images, batch_size=64)
    found = [(encoder(encoder.normalize(batch.to(DEVICE))).summary, labels) for batch, labels in batches]
    features, labels = (torch.cat(column) for column in zip(*found, strict=True))
    return features.float().cpu(), labels


def linear_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """A linear classifier on frozen features. `patchlight evaluate linear` is the papers' protocol, with random crops."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    classifier = nn.Linear(train.shape[1], int(train_labels.max()) + 1)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(classifier((train - mean) / std), train_labels).backward()
        optimizer.step()
    return (classifier((test - mean) / std).argmax(1) == test_labels).double().mean().item()


def nearest_patches(patches: Tensor, image: int, patch: int, count: int) -> list[tuple[int, int]]:
    """The most similar patch of each other image, for the `count` images that have the most similar ones: (image, patch)."""
    unit = F.normalize(patches, dim=-1)  # [B, N, D]
    best = (unit @ unit[image, patch]).max(dim=1)  # over the patches of each image
    order = [other for other in best.values.argsort(descending=True).tolist() if other != image]
    return [(other, int(best.indices[other])) for other in order[:count]]


def draw_nearest(images: np.ndarray, encoded: Encoded, attention: Tensor, rows: int, count: int = 5) -> Image.Image:
    """A row per image: its most attended patch in red, then the images with the patches that are most like it, in yellow."""
    side, gap = 144, 4
    sheet = Image.new("RGB", ((count + 1) * (side + gap) - gap, rows * (side + gap) - gap), "white")
    grid_rows, grid_columns = encoded.grid
    for row in range(rows):
        patch = int(attention[row].mean(0).argmax())
        for column, (image, place) in enumerate([(row, patch), *nearest_patches(encoded.patches, row, patch, count)]):
            picture = Image.fromarray(images[image]).resize((side, side), Image.Resampling.BICUBIC)
            y, x = divmod(place, grid_columns)
            corners = (x / grid_columns, y / grid_rows, (x + 1) / grid_columns, (y + 1) / grid_rows)
            ImageDraw.Draw(picture).rectangle(
                [side * corner for corner in corners], outline="gold" if column else "red", width=3
            )
            sheet.paste(picture, (column * (side + gap), row * (side + gap)))
    return sheet


@torch.no_grad()
def look(encoder: Encoder, images: ImageFolder, output: Path) -> None:
    """Three pictures of patch features."""
    ids = np.random.default_rng(0).permutation(len(images))[:64]  # the first few are shown, all may be nearest
    batch = torch.stack([images[number][0] for number in ids])  # [B, 3, size, size] uint8
    pixels = encoder.normalize(batch.to(DEVICE))
    encoded = encoder(pixels)  # .summary [B, D], .patches [B, N, D], .grid (rows, columns)
    attention = attention_maps(encoder, pixels).cpu()  # [B, heads, N]
    pictures, grid, some = batch.permute(0, 2, 3, 1).numpy(), encoded.grid, slice(LOOKED_AT)
    components = principal_components(encoded.patches[some]).cpu()  # [B, N, 3] in 0..1
    draw_attention(pictures[some], attention[some], grid).save(output / "attention.png")
    draw_components(pictures[some], components, grid).save(output / "components.png")
    draw_nearest(pictures, encoded, attention, LOOKED_AT).save(output / "nearest_patches.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/looks"), help="folder for numbers.json and pictures")
    parser.add_argument("--checkpoint", default="", help="what patchlight.load_teacher takes")
    parser.add_argument("--images", type=Path, help="a folder with train/ and val/, each with a folder per class")
    parser.add_argument("--steps", type=int, default=64, help="of the training, if no checkpoint is given")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    checkpoint, root = options.checkpoint, options.images
    if not checkpoint:
        checkpoint = str(options.output / "run")
        train_small(Path(checkpoint), options.steps)
    if root is None:
        root = options.output / "images"
        write_drawn_images(root)

    encoder = patchlight.load_teacher(checkpoint).to(DEVICE)
    size = encoder.input_format.image_size  # it may be another: any multiple of encoder.patch_size
    train, val = open_part(root / "train", size), open_part(root / "val", size)
    if different := set(train.classes) ^ set(val.classes):
        parser.error(f"train/ and val/ must have the same classes, got {', '.join(sorted(different))} in one of them")
    features = (*features_of(encoder, train), *features_of(encoder, val))
    numbers = {f"k-NN, k={k}": accuracy for k, accuracy in knn_accuracy(*features, k=(5, 20)).items()}
    numbers |= {"linear": linear_accuracy(*features), "chance": 1 / len(train.classes)}
    for name, accuracy in numbers.items():
        print(f"{name:<10} {accuracy:.1%}")
    (options.output / "numbers.json").write_text(json.dumps(numbers, indent=1))

    look(encoder, open_part(root / "val", 2 * size), options.output)  # twice the size: four times the patches
    print(f"pictures: {options.output}/attention.png, components.png, nearest_patches.png")


if __name__ == "__main__":
    main()
