"""Tensors by key in litdata's chunks: compressed without loss, with checksums, there whole or not at all.

A folder holds `chunk-*.bin` files and, once it is whole, `manifest.json`, which says what the tensors are, which keys
lie in which chunk, and every chunk's size and sums, and `index.json`, with which litdata's StreamingDataset reads
the folder too. Each item is a dictionary of byte planes: a tensor's bytes, first all the first ones, then all the
second ones, because those compress better apart, and litdata cannot store bfloat16.

While a folder is being filled every finished chunk has a `chunk-*.json` beside it, so that what was computed is not
computed again after a kill.
"""

import hashlib
import importlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from srpo_lightning.data.manifest import COMPRESSION, CONFIG, INDEX, LITDATA, Chunk, sha256, write_record
from srpo_lightning.files.checkpoints import sync
from srpo_lightning.files.crc import crc32

Item: TypeAlias = Mapping[str, Tensor]
Planes: TypeAlias = npt.NDArray[np.uint8]
INSTALL = "pip install --no-deps 'litdata>=0.2.76,<0.3'"


def check_litdata() -> None:
    """Refuse early what could not be read or written.

    Raises:
        ValueError: with the command that installs the missing package.
    """
    if find_spec("litdata") is None:
        raise ValueError(f"features are kept in litdata's chunks, and litdata is not installed: {INSTALL}")


def key_of(*parts: str | bytes) -> str:
    """The key of what is named by texts or bytes: 128 bits in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:32]


def to_planes(tensor: Tensor) -> Planes:
    """The bytes of a tensor, uint8 [bytes per element, *shape]."""
    shape, size = tensor.shape, tensor.element_size()
    return tensor.contiguous().view(torch.uint8).reshape(*shape, size).movedim(-1, 0).contiguous().numpy()


def from_planes(planes: Planes, dtype: torch.dtype) -> Tensor:
    """Undo `to_planes`."""
    together = np.empty((*planes.shape[1:], len(planes)), np.uint8)
    for place, plane in enumerate(planes):
        together[..., place] = plane
    return torch.from_numpy(together).view(dtype).squeeze(-1)


def write_chunk(folder: Path, items: Sequence[tuple[str, Item]]) -> Chunk:
    """Write a chunk of items by key; when this returns it is on the disk, and named by what is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    writer_type = importlib.import_module("litdata.streaming.writer").BinaryWriter
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as scratch:
        writer = writer_type(
            scratch, chunk_size=len(items), compression=COMPRESSION, compression_level="sample", chunk_index=0
        )
        for number, (_, tensors) in enumerate(items):
            writer.add_item(number, {name: to_planes(tensor) for name, tensor in tensors.items()})
        writer.done()
        (index_file,) = Path(scratch).glob(f"*.{INDEX}")
        index = json.loads(index_file.read_text(encoding="utf-8"))
        (entry,) = index["chunks"]
        written = Path(scratch) / entry["filename"]
        sync(written)
        checksum = sha256(written)
        config = {name: index["config"].get(name) for name in (*CONFIG, "data_format", "data_spec", "types")}
        with written.open("rb") as stream:
            crc = crc32(stream, written.stat().st_size)
        keys = [key for key, _ in items]
        filename = f"chunk-{key_of(checksum, *keys)[:16]}.bin"  # equal tensors may go by other keys elsewhere
        chunk = Chunk(
            filename,
            written.stat().st_size,
            checksum,
            keys,
            {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in items[0][1].items()},
            {name: entry.get(name) for name in LITDATA} | {"filename": filename},
            config | {"chunk_size": None},
            crc,
        )
        written.replace(folder / chunk.filename)
    write_record(folder, chunk)
    return chunk


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """One at a time fills a folder, also where several nodes share it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print(f"waiting for another process that fills {folder}", flush=True)
        lock.acquire()
    try:
        for scratch in folder.glob(".writing-*"):  # what a kill has left
            shutil.rmtree(scratch, ignore_errors=True)
        yield
    finally:
        lock.release()
