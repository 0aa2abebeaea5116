"""A folder of chunks as a store of tensors by key: opened, filled, and read anywhere in it, here or on a bucket."""

import hashlib
import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from srpo_lightning.data.chunks import Item, check_litdata, from_planes, write_chunk, writing
from srpo_lightning.data.manifest import (
    CURE,
    INDEX,
    MANIFEST,
    Chunk,
    Description,
    Manifest,
    check_index,
    damage,
    damage_of_content,
    finished_chunks,
    publish,
    read_manifest,
)

CHUNK_BYTES = 64 << 20  # of tensors, before compression
CHUNK_ITEMS = 1024
REMOTE = ("s3://", "gs://", "hf://", "r2://", "azure://", "local:")
FINGERPRINT = "fingerprint"

Encode = Callable[[list[Any]], list[Item]]
Progress = Callable[[int, int], None]


class ChunkStore:
    """Tensors by key, in `folder`/`fingerprint`.

    Args:
        folder: of all stores; here, or on s3://, gs:// or hf://, from where chunks are fetched when they are needed.
        description: what the tensors are computed with; its `fingerprint` tells stores apart.
        mirror: where chunks of a remote store are kept on this machine; they are not removed.
    """

    def __init__(self, folder: str, description: Description, mirror: str = ".cache/mirror") -> None:
        check_litdata()
        self.description = description
        name = str(description[FINGERPRINT])[:16]
        self.parent = folder
        self.remote = f"{folder.rstrip('/')}/{name}" if folder.startswith(REMOTE) else None
        local = Path(mirror).expanduser() / _name_of(folder) if self.remote else Path(folder).expanduser()
        self.folder = (local / name).resolve()
        self._manifest: Manifest | None = None
        self._rows: npt.NDArray[np.bytes_] = np.empty(0, "S32")
        self._order: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._starts: npt.NDArray[np.int64] = np.zeros(1, np.int64)
        self._checked: set[int] = set()
        self._reader: tuple[int, Any] | None = None

    def open(self, mend: bool = False) -> Manifest:
        """Read what is there, and refuse what was not computed with the same models, or is not whole.

        Args:
            mend: leave out chunks that are missing or cut off, so that `fill` makes them again.

        Raises:
            ValueError: with the file's name and the cure.
        """
        if self.remote:
            self._fetch(MANIFEST, again=True)
            self._fetch(INDEX, again=True)
        path = self.folder / MANIFEST
        if not path.is_file():
            return self._set(Manifest(self.description, []))
        try:
            manifest = read_manifest(path)
            self._check_description(path, manifest)
            check_index(self.folder / INDEX, manifest)
        except ValueError as error:
            raise ValueError(f"{error}, and upload it to {self.remote}" if self.remote else str(error)) from error
        if self.remote:
            return self._set(manifest)
        whole = []
        for chunk in manifest.chunks:
            problem = damage(self.folder / chunk.filename, chunk)
            if problem is None:
                whole.append(chunk)
            elif not mend:
                raise ValueError(f"{self.folder / chunk.filename} {problem}: {CURE}")
        return self._set(manifest._replace(chunks=whole))

    def fill(self, wanted: Sequence[tuple[str, Any]], encode: Encode, batch_size: int, items_per_chunk: int) -> int:
        """Compute what is missing, chunk by chunk, and open the store; returns how many items that were.

        Args:
            wanted: each item's key, and what `encode` takes.
            encode: computes a batch of items.
            batch_size: how many at once.
            items_per_chunk: see `per_chunk`.
        """
        assert self.remote is None, "a remote store is only read"
        with writing(self.folder):
            missing = self.recover(wanted)
            for group in in_groups(missing, items_per_chunk):
                self.write(group, encode, batch_size)
            if missing or not (self.folder / MANIFEST).is_file():
                self.publish()
        self.open()
        return len(missing)

    def recover(self, wanted: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
        """What of the wanted is not in whole chunks, each key once. Damaged chunks are named and count as missing."""
        have = {key for chunk in self._whole() for key in chunk.keys}
        return [(key, value) for key, value in dict(wanted).items() if key not in have]

    def write(self, group: Sequence[tuple[str, Any]], encode: Encode, batch_size: int) -> Chunk:
        """Compute and write one chunk."""
        items: list[tuple[str, Item]] = []
        for start in range(0, len(group), batch_size):
            keys, values = zip(*group[start : start + batch_size], strict=True)
            items += zip(keys, encode(list(values)), strict=True)
        return write_chunk(self.folder, items)

    def publish(self, keep: Iterable[str] | None = None) -> Manifest:
        """Make what was written the store's content; of chunks none of whose keys are in `keep` the files go."""
        chunks = self._whole()
        if keep is not None:
            wanted = set(keep)
            chunks = [chunk for chunk in chunks if wanted.intersection(chunk.keys)]
        return publish(self.folder, self.description, chunks)

    def find(self, keys: Sequence[str]) -> npt.NDArray[np.int64]:
        """The rows of keys; -1 for what is not there."""
        if not len(self._rows):
            return np.full(len(keys), -1)
        names = np.array(keys, "S32")
        places = np.minimum(np.searchsorted(self._rows, names), len(self._rows) - 1)
        return np.where(self._rows[places] == names, self._order[places], -1)

    def read(self, row: int) -> dict[str, Tensor]:
        """The tensors of a row; the chunk's checksum is compared when a process first reads from it.

        Raises:
            ValueError: naming the file and the cure, if the chunk is missing or damaged.
        """
        assert self._manifest is not None, "open() comes first"
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        chunk = self._manifest.chunks[number]
        if number not in self._checked:
            self._check(chunk)
            self._checked.add(number)
        planes = self._dataset()[row]
        return {name: from_planes(planes[name], getattr(torch, dtype)) for name, dtype in chunk.dtypes.items()}

    def __getstate__(self) -> dict[str, Any]:
        """For a worker: it opens and checks files by itself."""
        return self.__dict__ | {"_reader": None, "_checked": set()}

    def _set(self, manifest: Manifest) -> Manifest:
        keys = np.array([key for chunk in manifest.chunks for key in chunk.keys], "S32")
        self._order = np.argsort(keys, kind="stable")
        self._rows = keys[self._order]
        self._starts = np.cumsum([0, *(len(chunk.keys) for chunk in manifest.chunks)])
        self._manifest, self._reader, self._checked = manifest, None, set()
        return manifest

    def _whole(self) -> list[Chunk]:
        chunks = []
        for chunk in finished_chunks(self.folder):
            problem = damage(self.folder / chunk.filename, chunk)
            if problem:
                rank_zero_info(f"{self.folder / chunk.filename} {problem}: its {len(chunk.keys)} items are made again")
            else:
                chunks.append(chunk)
        return chunks

    def _check(self, chunk: Chunk) -> None:
        path = self.folder / chunk.filename
        if self.remote:
            self._fetch(chunk.filename)
        if problem := damage_of_content(path, chunk):
            cure = f"delete it, it is fetched again from {self.remote}" if self.remote else f"delete it, and {CURE}"
            raise ValueError(f"{path} {problem}: {cure}")

    def _dataset(self) -> Any:
        if self._reader is None or self._reader[0] != os.getpid():
            # Rows are read in any order: nothing is gained by decoding those beside them.
            dataset = importlib.import_module("litdata").StreamingDataset(str(self.folder), batch_decode=False)
            self._reader = os.getpid(), dataset
        return self._reader[1]

    def _fetch(self, filename: str, again: bool = False) -> None:
        """Bring a file of a remote store here; another process that does so is waited for."""
        target, partial = self.folder / filename, self.folder / ".fetching" / filename
        partial.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".fetching" / f"{filename}.one-at-a-time"):
            if target.is_file() and not again:
                return
            partial.unlink(missing_ok=True)
            get = importlib.import_module("litdata.streaming.downloader").get_downloader
            try:
                get(self.remote, str(partial.parent), []).download_file(f"{self.remote}/{filename}", str(partial))
            except (OSError, RuntimeError, ImportError) as error:
                raise ValueError(
                    f"{self.remote}/{filename} cannot be fetched ({type(error).__name__}: {error}): correct "
                    f"data.cache_dir or the credentials, or {CURE} and upload the folder"
                ) from error
            partial.replace(target)

    def _check_description(self, path: Path, manifest: Manifest) -> None:
        # The rest is for people to read: a copied model folder with another name makes the same features.
        if manifest.description.get(FINGERPRINT) != self.description[FINGERPRINT]:
            raise ValueError(f"{path} is of other features ({self.difference(manifest.description)}): {CURE}")

    def difference(self, other: Description) -> str:
        """In what another description differs."""
        names = [name for name in {**self.description, **other} if name != FINGERPRINT]
        told = [
            f"{name} is {other.get(name)!r}, expected {self.description.get(name)!r}"
            for name in names
            if other.get(name) != self.description.get(name)
        ]
        return "; ".join(told) or "the models' files differ"

    def others(self) -> list[str]:
        """What else is in the folder of all stores, and in what it differs."""
        if self.remote:
            return []
        found = sorted(Path(self.parent).expanduser().glob(f"*/{MANIFEST}"))
        told = [
            f"{path.parent}, where {self.difference(read_manifest(path).description)}"
            for path in found
            if path.parent.resolve() != self.folder
        ]
        half = len(list(self.folder.glob("chunk-*.json")))
        return told + [f"{self.folder}, half-written: {half} chunks are finished and will be kept"] * bool(half)


def per_chunk(item_bytes: int) -> int:
    """How many items make a chunk."""
    return max(1, min(CHUNK_ITEMS, CHUNK_BYTES // item_bytes))


def in_groups(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Consecutive parts of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def _name_of(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:16]
