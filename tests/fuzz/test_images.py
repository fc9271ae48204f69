"""Damaged images: each gives pixels within the limit, or an error on one line, and the loaders agree on which."""

import io
import warnings

import numpy as np
import pytest
from data.pictures import picture
from fuzz.mutations import limits, mutated, with_png_checksums
from fuzz.rounds import fuzz
from PIL import Image, features

from patchlight.data.check_data import find_bad_images
from patchlight.data.loaders import build_loader, dali_is_there
from patchlight.data.policy import dino_policy
from patchlight.data.sources import Files, ImageFolder

MOST_PIXELS = 2**16
KINDS = {
    "JPEG": [("RGB", {}), ("L", {}), ("CMYK", {}), ("RGB", {"progressive": True})],
    "PNG": [("RGB", {}), ("RGBA", {}), ("P", {}), ("LA", {}), ("1", {}), ("I;16", {})],
    "WEBP": [("RGB", {}), ("RGBA", {"lossless": True})],
    "PPM": [("RGB", {}), ("L", {}), ("1", {})],
    "GIF": [("P", {}), ("L", {})],
    "TIFF": [("RGB", {}), ("CMYK", {}), ("RGB", {"compression": "tiff_lzw"}), ("RGB", {"compression": "jpeg"})],
    "BMP": [("RGB", {}), ("P", {})],
    **({"AVIF": [("RGB", {})]} if features.check("avif") else {}),
}


def stored(kind: str, mode: str, options: dict) -> bytes:
    image, data = Image.fromarray(picture(0)), io.BytesIO()
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256)
    else:
        image = image.convert(mode)
    image.save(data, kind, **options)
    return data.getvalue()


FILES = {kind: [stored(kind, mode, options) for mode, options in cases] for kind, cases in KINDS.items()}


def damaged(rng: np.random.Generator, kinds: list[str]) -> bytes:
    files = FILES[str(rng.choice(kinds))]
    data = mutated(files[int(rng.integers(len(files)))], rng)
    return with_png_checksums(data) if data.startswith(b"\x89PNG") and rng.random() < 0.7 else data


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_image_is_an_image_or_an_error(tmp_path, kind):
    path = tmp_path / "a.png"
    source = Files([path], ["a.png"], None)
    source.most_pixels = MOST_PIXELS

    def attempt(rng: np.random.Generator) -> None:
        path.write_bytes(damaged(rng, [kind]))
        with limits():
            ((_, bad),) = find_bad_images(source, workers=1)
        if bad:
            assert "MemoryError" not in bad[0].reason
            assert bad[0].reason.isprintable() or "\n" not in bad[0].reason
            return
        image = source.read(0)
        assert image.dtype == np.uint8
        assert image.ndim == 3 and image.shape[2] == 3
        assert 0 < image.shape[0] * image.shape[1] <= MOST_PIXELS

    assert fuzz(attempt) >= 1


@pytest.mark.skipif(not dali_is_there(), reason="NVIDIA DALI is not installed")
@pytest.mark.filterwarnings("ignore")
def test_dali_gets_only_images_whose_size_pillow_agrees_on():
    from patchlight.data.dali_loader import size_for_dali
    from patchlight.data.stored import decode

    def attempt(rng: np.random.Generator) -> None:
        data = damaged(rng, list(FILES))
        with limits():
            size = size_for_dali(data, MOST_PIXELS)
        if size is None:
            return
        assert 0 < size[0] * size[1] <= MOST_PIXELS
        try:
            image = decode(data, MOST_PIXELS)
        except Exception:  # DALI finds that out too
            return
        assert (image.shape[1], image.shape[0]) == size

    assert fuzz(attempt) >= 1


@pytest.mark.skipif(not dali_is_there(), reason="NVIDIA DALI is not installed")
def test_the_dali_loader_survives_damaged_images(tmp_path):
    """Of four images in a batch, one is whole."""
    (tmp_path / "whole.png").write_bytes(FILES["PNG"][0])

    def attempt(rng: np.random.Generator) -> None:
        for name in "abc":
            (tmp_path / f"{name}.png").write_bytes(damaged(rng, ["JPEG", "PNG", "WEBP", "PPM"]))
        source = ImageFolder(tmp_path)
        source.most_pixels = MOST_PIXELS
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loader = build_loader("dali", source, dino_policy(0, 16), 4, most_bad=1.0)
            views = next(loader)
            loader.close()
        assert len(views.ids) == 4
        assert views.global_crops.pixels.isfinite().all()

    assert fuzz(attempt, at_least=3) >= 1
