"""Sources for tests: smooth pictures of several sizes, in memory or as files."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from patchlight.data.stored import MOST_PIXELS, as_ppm


class Pictures:
    """`count` smooth pictures whose sizes differ; those in `bad` cannot be read."""

    classes, labels, fingerprint, most_pixels = (), None, "pictures", MOST_PIXELS

    def __init__(self, count: int, bad: tuple[int, ...] = ()) -> None:
        self.images = [picture(number) for number in range(count)]
        self.bad = set(bad)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"picture {index}"

    def files(self) -> tuple:
        return ()

    def encoded(self, index: int) -> bytes:
        return as_ppm(self.read(index))

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


def write_awkward_files(folder: Path) -> dict[str, bool]:
    """Files as they turn up in real data sets, by name, and whether they are pictures at all."""
    folder.mkdir(parents=True, exist_ok=True)
    photo = Image.fromarray(picture(0)).resize((120, 90), Image.Resampling.BICUBIC)

    def stored(image: Image.Image, name: str, kind: str | None = None, **options) -> bytes:
        image.save(folder / name, kind, **options)
        return (folder / name).read_bytes()

    jpeg = stored(photo, "plain.jpg", quality=95)
    stored(photo, "really_png.JPEG", "PNG")
    stored(photo.convert("CMYK"), "cmyk.jpg", quality=95)
    stored(photo.convert("L"), "gray.jpg", quality=95)
    stored(photo.convert("L"), "gray.png")
    stored(photo.convert("LA"), "gray_alpha.png")
    stored(photo.convert("RGBA"), "alpha.png")
    stored(photo.convert("P"), "palette.png")
    stored(photo, "progressive.jpg", quality=95, progressive=True)
    stored(photo, "lossy.webp", quality=95)
    stored(photo, "bitmap.bmp")
    stored(photo, "turned.jpg", quality=95, exif=_turned())
    stored(Image.fromarray(np.linspace(0, 65535, 120 * 90).astype(np.uint16).reshape(90, 120)), "sixteen_bits.png")
    stored(Image.new("RGB", (1, 1), (200, 100, 50)), "one_pixel.png")
    stored(Image.new("RGB", (8000, 6000), (90, 120, 150)), "huge.jpg", quality=30)
    (folder / "trailing_zeros.jpg").write_bytes(jpeg + bytes(100))
    (folder / "damaged_inside.jpg").write_bytes(jpeg[: len(jpeg) // 2] + bytes(40) + jpeg[len(jpeg) // 2 + 40 :])
    (folder / "truncated.jpg").write_bytes(jpeg[: len(jpeg) * 2 // 3])
    (folder / "only_a_header.jpg").write_bytes(jpeg[:100])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("this is no image\n" * 20)
    (folder / "cut.png").write_bytes((folder / "alpha.png").read_bytes()[:-3000])
    bad = {"truncated.jpg", "only_a_header.jpg", "empty.jpg", "text.jpg", "cut.png"}
    return {path.name: path.name not in bad for path in sorted(folder.iterdir())}


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    return exif


def write_shards(folder: Path, per_shard: list[int], first: int = 0) -> list[np.ndarray]:
    """Tar shards of so many pictures each, with classes; the pictures, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for shard, count in enumerate(per_shard):
        with tarfile.open(folder / f"train-{shard:03}.tar", "w") as tar:
            for number in range(count):
                pictures.append(picture(first + len(pictures)))
                data = io.BytesIO()
                Image.fromarray(pictures[-1]).save(data, "PNG")
                for ending, content in (("png", data.getvalue()), ("cls", str(number % 3).encode()), ("json", b"{}")):
                    entry = tarfile.TarInfo(f"{shard:03}/{number:05}.{ending}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return pictures
