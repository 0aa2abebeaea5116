"""Tensors by key in litdata's chunks: compressed without loss, with checksums, there whole or not at all.

A folder holds `chunk-*.bin` files and, once it is whole, `manifest.json`, which says what the tensors are, which keys
lie in which chunk, and every chunk's size and SHA-256, and `index.json`, with which litdata's StreamingDataset reads
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from srpo_lightning.checkpoints import complete_or_absent, sync

Item: TypeAlias = Mapping[str, Tensor]
Planes: TypeAlias = npt.NDArray[np.uint8]
Description: TypeAlias = dict[str, str | int]

MANIFEST, INDEX = "manifest.json", "index.json"
COMPRESSION = "zstd:1"  # on byte planes higher levels gain nothing and take ten times as long
CURE = "write it again with `python -m srpo_lightning cache --config CONFIG`"
INSTALL = "pip install --no-deps 'litdata>=0.2.76,<0.3'"


class Chunk(NamedTuple):
    """A file of items.

    Args:
        filename: within the folder.
        num_bytes: its size.
        sha256: of its bytes.
        keys: of its items, in order.
        dtypes: of each item's tensors, by name.
        litdata: what litdata's index says of it.
        config: what litdata's index says of all.
    """

    filename: str
    num_bytes: int
    sha256: str
    keys: list[str]
    dtypes: dict[str, str]
    litdata: dict[str, Any]
    config: dict[str, Any]


class Manifest(NamedTuple):
    """What a whole folder says of itself.

    Args:
        description: what the tensors were computed with.
        chunks: in the order of litdata's index.
    """

    description: Description
    chunks: list[Chunk]

    @property
    def num_items(self) -> int:
        """Items in all chunks."""
        return sum(len(chunk.keys) for chunk in self.chunks)

    @property
    def num_bytes(self) -> int:
        """Size of all chunks."""
        return sum(chunk.num_bytes for chunk in self.chunks)


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
        config = {name: value for name, value in index["config"].items() if name not in ("item_loader", "chunk_size")}
        keys = [key for key, _ in items]
        filename = f"chunk-{key_of(checksum, *keys)[:16]}.bin"  # equal tensors may go by other keys elsewhere
        chunk = Chunk(
            filename,
            written.stat().st_size,
            checksum,
            keys,
            {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in items[0][1].items()},
            entry | {"filename": filename},
            config | {"chunk_size": None},
        )
        written.replace(folder / chunk.filename)
    _write_json(folder / Path(chunk.filename).with_suffix(".json"), chunk._asdict())
    return chunk


def read_manifest(path: Path) -> Manifest:
    """The manifest of a whole folder.

    Raises:
        ValueError: with the cure, if it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        body, checksum = content["manifest"], content["sha256"]
        chunks = [Chunk(**chunk) for chunk in body["chunks"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}): delete its folder and {CURE}") from error
    if _checksum(body) != checksum:
        raise ValueError(f"{path} is damaged (its checksum differs): delete its folder and {CURE}")
    return Manifest(body["description"], chunks)


def finished_chunks(folder: Path) -> list[Chunk]:
    """Chunks that are whole: those of the manifest, and those written since, each key once."""
    chunks = read_manifest(folder / MANIFEST).chunks if (folder / MANIFEST).is_file() else []
    known = {chunk.filename for chunk in chunks}
    for record in sorted(folder.glob("chunk-*.json")):
        chunk = Chunk(**json.loads(record.read_text(encoding="utf-8")))
        if chunk.filename not in known:
            chunks.append(chunk)
    keys: set[str] = set()
    kept = []
    for chunk in chunks:
        if not keys.issuperset(chunk.keys):
            keys.update(chunk.keys)
            kept.append(chunk)
    return kept


def publish(folder: Path, description: Description, chunks: Iterable[Chunk]) -> Manifest:
    """Make a folder whole: from now on it is read. Chunk files that are not named go."""
    manifest = Manifest(description, list(chunks))
    body = {
        "description": description,
        "count": manifest.num_items,
        "bytes": manifest.num_bytes,
        "chunks": [chunk._asdict() for chunk in manifest.chunks],
    }
    config = manifest.chunks[0].config if manifest.chunks else {}
    index = {"chunks": [chunk.litdata for chunk in manifest.chunks], "config": config, "updated_at": _checksum(body)}
    _write_json(folder / INDEX, index)
    _write_json(folder / MANIFEST, {"manifest": body, "sha256": _checksum(body)})
    named = {chunk.filename for chunk in manifest.chunks}
    for file in folder.glob("chunk-*"):
        if file.name not in named:
            file.unlink()
    return manifest


def damage(path: Path, chunk: Chunk) -> str | None:
    """What is wrong with a chunk's file, as far as its size tells."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    return None if size == chunk.num_bytes else f"has {size} bytes, expected {chunk.num_bytes}"


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


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with complete_or_absent(path) as partial:
        partial.write_text(json.dumps(content), encoding="utf-8")
        sync(partial)
    sync(path.parent)
