"""The DALI loader: decodes once and cuts every crop from that, on the GPU or on the CPU, by numbers drawn beforehand.

DALI draws no random numbers and keeps no state here. Threads of this loader read files and draw the crop table; the inputs
of the graph are a pure function of the position in the stream. So the loader's state is a position, and after an error the
graph is built again and gets the same batch.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import AsyncResult, ThreadPool
from typing import cast

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def
from nvidia.dali.data_node import DataNode
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType
from torch import Tensor

from ..checks import sentence
from ..records import Views
from .dali_photometric import apply_photometric_in_dali
from .interface import Position, SourceLoader, host_tensors
from .policy import CropPolicy, CropTable, sample_crops
from .reading import Replacement, read_samples, wait_while_moving
from .stored import Source, as_ppm, decode, open_image

_PREFETCHED = 2  # batches that DALI processes ahead
_USUAL_PIXELS = 512 * 512  # of a source image, for the first size of decoding buffers
_MODES = {"JPEG": ("RGB", "L"), "PNG": ("RGB", "RGBA", "L", "LA", "P"), "WEBP": ("RGB",), "PPM": ("RGB",)}


@dataclass(frozen=True, slots=True)
class _Inputs:
    """A batch as it is given to DALI, and what is kept beside it."""

    files: list[np.ndarray]  # B times [bytes] uint8, each of a kind that DALI decodes as Pillow does
    regions: list[np.ndarray]  # per crop two [B, 2] fp32: start and end, y and x; in a flip the start is on the right
    photometric: list[np.ndarray]  # per crop [B, columns] fp32: the columns of the photometric op
    tensors: dict[str, Tensor]  # everything but the pixels, as Loader._views takes it
    replacements: list[Replacement]


@dataclass(slots=True)
class _Progress:
    """How far a thread has come with a batch."""

    begun: int = 0  # images
    image: int = -1  # the number of the last one


class DaliLoader(SourceLoader):
    """Decodes and cuts with DALI: on a GPU, with its JPEG decoder, if `device` is a GPU, else on the CPU.

    Boxes, flips, ids and colors are those of the TorchvisionLoader with the same arguments. `workers` threads read files
    and as many work inside DALI. photometric="op" changes colors with the op that all loaders share, "dali" with DALI's
    own operators: a fixed order of the jitter and another hue (docs/data.md).
    """

    name = "dali"

    def __init__(self, source: Source, policy: CropPolicy, batch: int, *rest, photometric: str = "op", **options):
        super().__init__(source, policy, batch, *rest, **options)
        self.photometric = photometric
        self._pool: ThreadPool | None = None  # its threads do not keep Python from ending, should a read never end
        self._to_read: Iterator[tuple[AsyncResult[_Inputs], _Progress]] = iter(())
        self._reading: deque[tuple[AsyncResult[_Inputs], _Progress]] = deque()
        self._in_dali: deque[_Inputs] = deque()  # oldest first
        self._pipeline: Pipeline | None = None

    def _fetch(self, start: Position) -> Views:
        if self._pipeline is None:
            self._begin(start)
        try:
            outputs = self._run()
        except RuntimeError as error:
            lost = max(1, len(self._in_dali))
            warnings.warn(
                f"dali loader: DALI failed on a batch ({_main_line(error)}); Pillow decodes {lost} batches in its place"
            )
            self._begin(start, decoded_by_pillow=lost)
            outputs = self._run()
        except BaseException:
            self._restart()  # what is read ahead is no longer what follows this position
            raise
        inputs = self._in_dali.popleft()
        self._report(inputs.replacements)
        crops = iter(torch.from_dlpack(output.as_tensor()) for output in outputs)  # no copies
        pixels = {
            f"{kind}.pixels": torch.stack([next(crops) for spec in specs for _ in range(spec.count)])
            for kind, specs in self.policy.kinds()
        }
        return self._views(inputs.tensors | pixels)

    def _run(self) -> tuple:
        assert self._pipeline is not None  # built by _begin
        if self.device.type == "cuda":
            return self._pipeline.run(torch.cuda.current_stream(self.device).cuda_stream)
        return self._pipeline.run()

    def _begin(self, start: Position, decoded_by_pillow: int = 0) -> None:
        """Reads ahead from a position, into a new pipeline; Pillow decodes the first so many batches."""
        self._restart()
        pool = self._pool = ThreadPool(max(1, self.workers))

        def submit(epoch: int, ids: np.ndarray, decode_here: bool) -> tuple[AsyncResult[_Inputs], _Progress]:
            progress = _Progress()
            return pool.apply_async(self._prepare, (epoch, ids, decode_here, progress)), progress

        self._to_read = (
            submit(position.epoch, ids, number < decoded_by_pillow)
            for number, (position, ids) in enumerate(self._schedule(start))
        )
        for _ in range(max(1, self.workers)):
            self._reading.append(next(self._to_read))
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
        """DALI calls this when it starts on a batch."""
        self._reading.append(next(self._to_read))
        result, progress = self._reading.popleft()
        if not wait_while_moving(partial(_wait, result), lambda: progress.begun, self.timeout):
            at = self.source.name(progress.image) if progress.image >= 0 else "the start of a batch"
            got = f"none for {self.timeout:g} seconds at {at}"
            remedy = "look at that file and its file system, or raise Data.timeout"
            raise TimeoutError(sentence("dali loader: reading must get on by an image", got, remedy))
        inputs = result.get()
        self._in_dali.append(inputs)
        return [inputs.files, *inputs.regions, *(inputs.photometric if self.photometric == "dali" else [])]

    def _prepare(self, epoch: int, ids: np.ndarray, decode_here: bool, progress: _Progress) -> _Inputs:
        read = partial(self._read, progress=progress, decode_here=decode_here)
        samples = list(read_samples(self.source, self.seed, ids, read))
        sizes = np.array([sample.content[1] for sample in samples])
        tables = sample_crops(self.policy, self.seed, epoch, ids, sizes)
        tensors = {"ids": torch.tensor([sample.id for sample in samples])}
        for kind, table in tables.items():
            tensors |= host_tensors(kind, table)
        photometric = [view.numpy() for kind in tables for view in tensors[f"{kind}.photometric"]]
        if self.photometric == "dali":
            tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".photometric")}
        if self.device.type == "cuda":
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        regions = [edge for table in tables.values() for edge in _regions(table)]
        files = [sample.content[0] for sample in samples]
        replacements = [sample.replacement for sample in samples if sample.replacement]
        return _Inputs(files, regions, photometric, tensors, replacements)

    def _read(self, index: int, progress: _Progress, decode_here: bool) -> tuple[np.ndarray, tuple[int, int]]:
        """A file for DALI to decode, and the image's width and height. decode_here: Pillow decodes, to a plain file."""
        progress.image, progress.begun = index, progress.begun + 1
        data, most_pixels = self.source.encoded(index), self.source.most_pixels
        size = None if decode_here else size_for_dali(data, most_pixels)
        if size is None:
            image = decode(data, most_pixels)
            data, size = as_ppm(image), (image.shape[1], image.shape[0])
        return np.frombuffer(data, np.uint8), size

    def _restart(self) -> None:
        if self._pool is not None:
            self._pool.terminate()
        self._reading.clear()
        self._in_dali.clear()
        self._pipeline, self._pool, self._to_read = None, None, iter(())

    def close(self) -> None:
        """Ends the threads."""
        self._restart()


def _wait(result: AsyncResult, seconds: float) -> bool:
    result.wait(seconds)
    return result.ready()


def size_for_dali(data: bytes, most_pixels: int) -> tuple[int, int] | None:
    """Width and height if DALI decodes the file to the same pixels as Pillow for sure; None if Pillow must decode it.

    Files must be complete to the last byte, else DALI loses the whole batch.
    """
    try:
        with open_image(data, most_pixels) as image:
            kind, mode, size = image.format, image.mode, image.size
    except Exception:  # of any type for a damaged header; Pillow raises it again
        return None
    complete = {
        "JPEG": data[-64:].rstrip(b"\0").endswith(b"\xff\xd9"),
        "PNG": data[-8:-4] == b"IEND",
        "WEBP": int.from_bytes(data[4:8], "little") + 8 == len(data),
        "PPM": len(data) >= size[0] * size[1] * 3,
    }
    return size if kind is not None and complete.get(kind) and mode in _MODES[kind] else None


@pipeline_def(enable_conditionals=True, prefetch_queue_depth=_PREFETCHED, seed=0)  # DALI draws no random numbers here
def crop_graph(policy: CropPolicy, inputs: Callable[[], list], photometric: str) -> tuple[DataNode, ...]:
    """The graph, the same for both devices: files and regions in, a uint8 tensor [B, S, S, 3] per crop out.

    With photometric="dali" the crops are changed and normalized here, fp32 [B, 3, S, S].
    """
    on_gpu = Pipeline.current().device_id is not None
    sizes = [specs[0].size for _, specs in policy.kinds() for spec in specs for _ in range(spec.count)]
    crops, tables = len(sizes), len(sizes) if photometric == "dali" else 0
    files, *rest = fn.external_source(
        source=inputs,
        num_outputs=1 + 2 * crops + tables,
        batch=True,
        dtype=[DALIDataType.UINT8] + [DALIDataType.FLOAT] * (2 * crops + tables),
        ndim=1,
    )
    images = fn.decoders.image(
        files,
        device="mixed" if on_gpu else "cpu",
        output_type=DALIImageType.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # as on the CPU and in Pillow
        bytes_per_sample_hint=_USUAL_PIXELS * 3,
    )
    outputs: list[DataNode] = []
    for number, size in enumerate(sizes):
        crop = fn.resize(
            images,
            size=[size, size],
            roi_start=rest[2 * number],
            roi_end=rest[2 * number + 1],
            interp_type=DALIInterpType.INTERP_CUBIC,
            antialias=True,
            bytes_per_sample_hint=size * size * 3,
        )
        crop = cast(DataNode, crop)  # DALI's types allow for more outputs
        outputs.append(apply_photometric_in_dali(crop, rest[2 * crops + number], policy) if tables else crop)
    return tuple(outputs)


def _regions(table: CropTable) -> Iterator[np.ndarray]:
    """Per crop, where its region starts and ends: [B, 2] fp32, y and x. DALI mirrors a region from right to left."""
    for (x, y, w, h), flip in zip(table.box.transpose(0, 2, 1), table.flip, strict=True):
        left, right = np.where(flip, x + w, x), np.where(flip, x, x + w)
        yield np.stack([y, left], axis=1).astype(np.float32)
        yield np.stack([y + h, right], axis=1).astype(np.float32)


def _main_line(error: RuntimeError) -> str:
    """DALI's message without its stack trace."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "Failed" in line or "failure" in line), lines[0] if lines else "no message")
