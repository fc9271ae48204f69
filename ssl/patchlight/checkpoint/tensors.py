"""Tensors of a checkpoint, for torch.distributed.checkpoint: a safetensors file per process, and nothing that is unpickled."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from .manifest import Chunk, Manifest, Piece, StoredTensor, damaged, pieces_of, read_piece

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# torch says so each time that one process saves or loads alone, in a thread of its own too.
warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")


@dataclass(frozen=True, slots=True)
class Tensors:
    """What all processes have written."""

    files: dict[str, tuple[Piece, ...]]
    stored: dict[str, StoredTensor]


class TensorWriter(StorageWriter):
    """Writes the tensors of this process into one file of a folder."""

    def __init__(self, folder: Path, complete: Callable[[Tensors], None]) -> None:
        """complete: called on one process, when all have written."""
        super().__init__()
        self.folder, self.complete = folder, complete

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=f"rank-{rank:04d}.safetensors") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes one file; its chunks are aligned, as those of larger types come first."""
        chunks: list[tuple[WriteItem, Tensor]] = []
        for item in plan.items:
            tensor = planner.resolve_data(item)
            if not isinstance(tensor, Tensor):
                raise TypeError(f"A checkpoint holds tensors only, got another object as {item.index.fqn}.")
            chunks.append((item, tensor))
        chunks.sort(key=lambda chunk: -chunk[1].element_size())
        named = {_name_of_chunk(item): tensor for item, tensor in chunks}
        pieces = write_tensors(self.folder / plan.storage_data, named)
        results = [
            WriteResult(item.index, pieces[number].length, (plan.storage_data, number, pieces))
            for number, (item, _) in enumerate(chunks, start=1)
        ]
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On one process, after all have written."""
        files: dict[str, tuple[Piece, ...]] = {}
        places: dict[MetadataIndex, tuple[str, int]] = {}
        for result in (result for of_process in results for result in of_process):
            file, number, files[result.storage_data[0]] = result.storage_data
            places[result.index] = (file, number)
        tensors = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)  # write_data has refused everything else
            chunks = (Chunk(tuple(c.offsets), tuple(c.sizes), *places[_index(name, c.offsets)]) for c in entry.chunks)
            tensors[name] = StoredTensor(NAMES[entry.properties.dtype], tuple(entry.size), tuple(chunks))
        self.complete(Tensors(files, tensors))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def storage_meta(self) -> StorageMeta | None:
        return None


class TensorReader(StorageReader):
    """Reads tensors of a checkpoint; raises DamagedError for bytes that are not those that were written."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__()
        self.folder, self.manifest = folder, manifest

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {}
        for name, tensor in self.manifest.tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in tensor.chunks]
            properties = TensorProperties(dtype=DTYPES[tensor.dtype])
            tensors[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        return Metadata(tensors, storage_data={}, storage_meta=StorageMeta())

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        places = {
            _index(name, chunk.offsets): (tensor, chunk)
            for name, tensor in self.manifest.tensors.items()
            for chunk in tensor.chunks
        }
        wanted: dict[str, list[tuple[ReadItem, StoredTensor, Chunk]]] = {}
        for item in plan.items:
            tensor, chunk = places[item.storage_index]
            wanted.setdefault(chunk.file, []).append((item, tensor, chunk))
        for name, entries in wanted.items():
            if not (self.folder / name).is_file():  # reading a pipe would wait for ever
                raise damaged(self.folder, f"no file {name}")
            with (self.folder / name).open("rb") as file:
                for item, tensor, chunk in entries:
                    data = read_piece(self.folder, file, name, self.manifest.files[name][chunk.piece])
                    _fill(item, planner, data, tensor, chunk)
        return _done(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


def _index(name: str, offsets: Any) -> MetadataIndex:
    return MetadataIndex(name, torch.Size(offsets))


def _fill(item: ReadItem, planner: LoadPlanner, data: bytearray, tensor: StoredTensor, chunk: Chunk) -> None:
    """Copies the wanted part of a chunk into the tensor that it is for."""
    dtype = DTYPES[tensor.dtype]
    whole = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    whole = whole.view(chunk.sizes)
    for dimension, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        whole = whole.narrow(dimension, offset, length)
    target = planner.resolve_tensor(item).detach()
    target.copy_(whole)
    planner.commit_tensor(item, target)


def _name_of_chunk(item: WriteItem) -> str:
    """The tensor's name; with ranges if the chunk is a part of it."""
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    if chunk.sizes == item.tensor_data.size:
        return item.index.fqn
    ranges = (f"{offset}:{offset + size}" for offset, size in zip(chunk.offsets, chunk.sizes, strict=True))
    return f"{item.index.fqn}[{','.join(ranges)}]"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[Piece, ...]:
    """Writes a safetensors file without a second copy in memory; its pieces are the header and each tensor."""
    entries, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with pieces_of(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return tuple(file.pieces)
