"""The DALI loader: decodes once and cuts every crop from that, on the GPU or on the CPU, by numbers drawn beforehand.

DALI draws nothing and remembers nothing here. Threads of ours read files and draw the crop table; what enters the graph is
a pure function of the position in the stream, so a state is a position, and after an error the graph is built anew and
given the same batch again.
"""

from __future__ import annotations

import io
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..records import Views
from .dali_photometric import change_in_dali
from .interface import Loader, Position, host_tensors
from .policy import CropPolicy, CropTable, sample_crops
from .reading import Replacement, read_samples
from .stored import Source, as_ppm, decode

_PREFETCHED = 2  # batches that DALI works on ahead
_USUAL_PIXELS = 512 * 512  # of a source image: what decoding buffers are made for at the start
_MODES = {"JPEG": ("RGB", "L"), "PNG": ("RGB", "RGBA", "L", "LA", "P"), "WEBP": ("RGB",), "PPM": ("RGB",)}


@dataclass(frozen=True, slots=True)
class _Planned:
    """A batch before DALI sees it."""

    files: list[np.ndarray]  # B times [bytes] uint8, each of a kind that DALI decodes as Pillow does
    regions: list[
        np.ndarray
    ]  # per crop twice [B, 2] fp32: where it starts and ends, y and x; x runs backwards in a flip
    looks: list[np.ndarray]  # per crop [B, columns] fp32: what photometric does to it
    tensors: dict[str, Tensor]  # what goes beside the pixels, as Loader._views takes it
    replacements: list[Replacement]


class DaliLoader(Loader):
    """Decodes and cuts with DALI: on a GPU if `device` is one (there with its JPEG decoder), else on the CPU.

    Boxes, flips, ids and colors are those of the TorchvisionLoader with the same arguments. `workers` threads read files
    and as many work inside of DALI. photometric="op" changes colors with the op that all loaders share, "dali" with DALI's
    own operators: a fixed order of the jitter and another hue (see docs/data.md).
    """

    name = "dali"

    def __init__(self, source: Source, policy: CropPolicy, batch: int, *rest, photometric: str = "op", **options):
        super().__init__(source, policy, batch, *rest, **options)
        self.photometric = photometric
        self._pool = ThreadPoolExecutor(max(1, self.workers), thread_name_prefix="patchlight-read")
        self._plans: Iterator[Future[_Planned]] | None = None
        self._waiting: deque[Future[_Planned]] = deque()  # being read
        self._inside: deque[_Planned] = deque()  # handed to DALI, oldest first
        self._pipeline: Pipeline | None = None

    def _fetch(self, start: Position) -> Views:
        if self._pipeline is None:
            self._begin(start)
        try:
            outputs = self._run()
        except RuntimeError as error:
            suspects = max(1, len(self._inside))
            warnings.warn(
                f"dali loader: DALI failed on a batch ({_gist(error)}); Pillow decodes {suspects} batches in its place"
            )
            self._begin(start, careful=suspects)
            outputs = self._run()
        planned = self._inside.popleft()
        self._report(planned.replacements)
        crops = iter(torch.from_dlpack(output.as_tensor()) for output in outputs)  # no copies
        pixels = {
            f"{kind}.pixels": torch.stack([next(crops) for spec in specs for _ in range(spec.count)])
            for kind, specs in self.policy.kinds()
        }
        return self._views(planned.tensors | pixels)

    def _run(self) -> tuple:
        if self.device.type == "cuda":
            return self._pipeline.run(torch.cuda.current_stream(self.device).cuda_stream)
        return self._pipeline.run()

    def _begin(self, start: Position, careful: int = 0) -> None:
        """Reads ahead from a position, into a new pipeline; the first `careful` batches are decoded by Pillow."""
        self._restart()
        schedule = enumerate(self._schedule(start))
        self._plans = (
            self._pool.submit(self._plan, position.epoch, ids, number < careful) for number, (position, ids) in schedule
        )
        for _ in range(max(1, self.workers)):
            self._waiting.append(next(self._plans))
        self._pipeline = crop_graph(
            self.policy,
            self._next_inputs,
            self.photometric,
            batch_size=self.batch,
            num_threads=max(1, self.workers),
            device_id=(self.device.index or 0) if self.device.type == "cuda" else None,
        )
        self._pipeline.build()

    def _next_inputs(self) -> list:
        """What DALI asks for when it starts on a batch."""
        self._waiting.append(next(self._plans))
        planned = self._waiting.popleft().result()
        self._inside.append(planned)
        return [planned.files, *planned.regions, *(planned.looks if self.photometric == "dali" else [])]

    def _plan(self, epoch: int, ids: np.ndarray, careful: bool) -> _Planned:
        samples = read_samples(self.source, self.seed, ids, partial(self._read, careful=careful))
        sizes = np.array([size for _, size in samples.contents])
        tables = sample_crops(self.policy, self.seed, epoch, ids, sizes)
        tensors = {"ids": torch.from_numpy(samples.ids)}
        for kind, table in tables.items():
            tensors |= host_tensors(kind, table)
        looks = [view.numpy() for kind in tables for view in tensors[f"{kind}.looks"]]
        if self.photometric == "dali":
            tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".looks")}
        if self.device.type == "cuda":
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        regions = [edge for table in tables.values() for edge in _regions(table)]
        files = [file for file, _ in samples.contents]
        return _Planned(files, regions, looks, tensors, samples.replacements)

    def _read(self, index: int, careful: bool) -> tuple[np.ndarray, tuple[int, int]]:
        """A file for DALI to decode, and the image's width and height."""
        data = self.source.encoded(index)
        size = None if careful else size_for_dali(data)
        if size is None:
            image = decode(data)
            data, size = as_ppm(image), (image.shape[1], image.shape[0])
        return np.frombuffer(data, np.uint8), size

    def _restart(self) -> None:
        for future in self._waiting:
            future.cancel()
        self._waiting.clear()
        self._inside.clear()
        self._pipeline = self._plans = None

    def close(self) -> None:
        """Ends the threads."""
        self._restart()
        self._pool.shutdown(cancel_futures=True)


def size_for_dali(data: bytes) -> tuple[int, int] | None:
    """Width and height if DALI surely decodes the file to what Pillow makes of it; None: leave it to Pillow.

    Files must be whole to the last byte: one that is not costs DALI the batch.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind, mode, size = image.format, image.mode, image.size
    except (UnidentifiedImageError, OSError):
        return None
    whole = {
        "JPEG": data[-64:].rstrip(b"\0").endswith(b"\xff\xd9"),
        "PNG": data[-8:-4] == b"IEND",
        "WEBP": int.from_bytes(data[4:8], "little") + 8 == len(data),
        "PPM": len(data) >= size[0] * size[1] * 3,
    }
    return size if whole.get(kind) and mode in _MODES[kind] else None


@pipeline_def(enable_conditionals=True, prefetch_queue_depth=_PREFETCHED, seed=0)  # nothing here is drawn by DALI
def crop_graph(policy: CropPolicy, inputs: Callable[[], list], photometric: str) -> tuple[DataNode, ...]:
    """The graph, one for both devices: files and regions in, one uint8 tensor [B, S, S, 3] per crop out.

    With photometric="dali" crops leave it changed and normalized instead, fp32 [B, 3, S, S].
    """
    on_gpu = Pipeline.current().device_id is not None
    sizes = [specs[0].size for _, specs in policy.kinds() for spec in specs for _ in range(spec.count)]
    crops, looks = len(sizes), len(sizes) if photometric == "dali" else 0
    files, *rest = fn.external_source(
        source=inputs,
        num_outputs=1 + 2 * crops + looks,
        batch=True,
        dtype=[types.UINT8] + [types.FLOAT] * (2 * crops + looks),
        ndim=1,
    )
    images = fn.decoders.image(
        files,
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # as on the CPU and in Pillow
        bytes_per_sample_hint=_USUAL_PIXELS * 3,
    )
    outputs = []
    for number, size in enumerate(sizes):
        crop = fn.resize(
            images,
            size=[size, size],
            roi_start=rest[2 * number],
            roi_end=rest[2 * number + 1],
            interp_type=types.INTERP_CUBIC,
            antialias=True,
            bytes_per_sample_hint=size * size * 3,
        )
        outputs.append(change_in_dali(crop, rest[2 * crops + number], policy) if looks else crop)
    return tuple(outputs)


def _regions(table: CropTable) -> Iterator[np.ndarray]:
    """Per crop, where its region starts and ends: [B, 2] fp32, y and x. From right to left it comes out mirrored."""
    for (x, y, w, h), flip in zip(table.box.transpose(0, 2, 1), table.flip, strict=True):
        left, right = np.where(flip, x + w, x), np.where(flip, x, x + w)
        yield np.stack([y, left], axis=1).astype(np.float32)
        yield np.stack([y + h, right], axis=1).astype(np.float32)


def _gist(error: RuntimeError) -> str:
    """What DALI's message says, without its stack trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "Failed" in line or "failure" in line), lines[0] if lines else "no message")
