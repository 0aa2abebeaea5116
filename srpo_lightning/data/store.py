"""A folder of Parquet files as a store of tensors by key: opened, filled, and read anywhere, here or on a bucket."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from srpo_lightning.data.manifest import (
    CURE,
    MANIFEST,
    Description,
    Manifest,
    damage,
    finished_files,
    is_earlier,
    read_manifest,
    write_manifest,
)
from srpo_lightning.data.mirror import PROTOCOLS, FetchError, Mirror
from srpo_lightning.data.tensor_files import NAMES, Item, StoredFile, TensorFile, in_a_line, write_file

FILE_BYTES = 64 << 20  # of tensors, before compression
FILE_ITEMS = 1024
OPEN_FILES = 32  # of one process
FINGERPRINT = "fingerprint"

Encode = Callable[[list[Any]], list[Item]]


class ParquetStore:
    """Tensors by key, in `folder`/`fingerprint`.

    Args:
        folder: Folder of all stores; here, or on s3://, gs:// or hf://, from where files are fetched when needed.
        description: What the tensors are computed with; its `fingerprint` tells stores apart.
        mirror: Folder for copies of the files of remote stores.
        mirror_gigabytes: Most that they take together. None: no limit.
    """

    def __init__(
        self,
        folder: str,
        description: Description,
        mirror: str = ".cache/mirror",
        mirror_gigabytes: float | None = None,
    ) -> None:
        self.description = description
        name = str(description[FINGERPRINT])[:16]
        self.parent = folder
        self.mirror = Mirror(folder, name, mirror, mirror_gigabytes) if folder.startswith(PROTOCOLS) else None
        self.folder = self.mirror.folder if self.mirror else (Path(folder).expanduser() / name).resolve()
        self._set(Manifest(description, []))

    @property
    def remote(self) -> str | None:
        """URL of a store that is only read; None: it is here."""
        return self.mirror.url if self.mirror else None

    def open(self, mend: bool = False) -> Manifest:
        """Read what is there, and refuse what was not computed with the same models, or is not whole.

        Args:
            mend: Leave out files that are missing or cut off, so that `fill` makes them again.

        Raises:
            ValueError: with the file's name and the cure.
        """
        path = self.folder / MANIFEST
        if self.mirror:
            self.mirror.fetch(MANIFEST, again=True)
        elif not path.is_file():
            if is_earlier(self.folder):
                rank_zero_info(
                    f"{self.folder} was written by an earlier version, in litdata's chunks: it is not read, its "
                    "features are computed again, and then its files are deleted"
                )
            return self._set(Manifest(self.description, []))
        try:
            manifest = read_manifest(path)
            self._check_description(path, manifest)
        except ValueError as error:
            raise ValueError(f"{error}, and upload it to {self.remote}" if self.remote else str(error)) from error
        if self.mirror:
            return self._set(manifest)
        whole = []
        for file in manifest.files:
            problem = damage(self.folder / file.name, file)
            if problem is None:
                whole.append(file)
            elif not mend:
                raise ValueError(f"{self.folder / file.name} {problem}: {CURE}")
        return self._set(manifest._replace(files=whole))

    def fill(self, wanted: Sequence[tuple[str, Any]], encode: Encode, batch_size: int, items_per_file: int) -> int:
        """Compute what is missing, file by file, and open the store; returns how many items that were.

        Args:
            wanted: Key of each item, and what `encode` takes.
            encode: Function that computes a batch of items.
            batch_size: Items that are computed at once.
            items_per_file: See `per_file`.
        """
        assert self.mirror is None, "a remote store is only read"
        with writing(self.folder):
            missing = self.recover(wanted)
            for group in in_groups(missing, items_per_file):
                self.write(group, encode, batch_size)
            path = self.folder / MANIFEST
            listed = {key for file in read_manifest(path).files for key in file.keys} if path.is_file() else None
            if missing or listed is None or not listed.issuperset(dict(wanted)):
                self.publish()  # of what is not missing too: a process may have been killed just before it came to this
        self.open()
        return len(missing)

    def recover(self, wanted: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
        """What of the wanted is not in whole files, each key once. Damaged files are named and count as missing."""
        have = {key for file in finished_files(self.folder) for key in file.keys}
        return [(key, value) for key, value in dict(wanted).items() if key not in have]

    def write(self, group: Sequence[tuple[str, Any]], encode: Encode, batch_size: int) -> StoredFile:
        """Compute and write one file."""
        items: list[tuple[str, Item]] = []
        for start in range(0, len(group), batch_size):
            keys, values = zip(*group[start : start + batch_size], strict=True)
            items += zip(keys, encode(list(values)), strict=True)
        return write_file(self.folder, items)

    def publish(self, keep: Iterable[str] | None = None) -> Manifest:
        """Make what was written the store's content; files go none of whose keys are in `keep`."""
        files = finished_files(self.folder)
        if keep is not None:
            wanted = set(keep)
            files = [file for file in files if wanted.intersection(file.keys)]
        manifest = Manifest(self.description, files)
        write_manifest(self.folder, manifest)
        return manifest

    def find(self, keys: Sequence[str]) -> npt.NDArray[np.int64]:
        """The rows of keys; -1 for what is not there."""
        if not len(self._rows):
            return np.full(len(keys), -1)
        names = np.array(keys, "S32")
        places = np.minimum(np.searchsorted(self._rows, names), len(self._rows) - 1)
        return np.where(self._rows[places] == names, self._order[places], -1)

    def read(self, row: int) -> dict[str, Tensor]:
        """The tensors of a row, whose checksums are compared.

        Raises:
            ValueError: naming the file and the cure, if the file is missing or damaged.
        """
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        try:
            return self._opened(number).read(row - int(self._starts[number]))
        except FetchError:
            raise
        except (OSError, ValueError) as error:
            path = self.folder / self._manifest.files[number].name
            cure = f"delete it, it is fetched again from {self.remote}" if self.remote else f"delete it, and {CURE}"
            raise ValueError(f"{path} {in_a_line(error)}: {cure}") from error

    def __getstate__(self) -> dict[str, Any]:
        """For a worker: it opens files by itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._opened = lru_cache(OPEN_FILES)(self._open_file)

    def _set(self, manifest: Manifest) -> Manifest:
        keys = np.array([key for file in manifest.files for key in file.keys], "S32")
        self._order = np.argsort(keys, kind="stable")
        self._rows = keys[self._order]
        self._starts = np.cumsum([0, *(len(file.keys) for file in manifest.files)])
        self._manifest = manifest
        self._opened = lru_cache(OPEN_FILES)(self._open_file)
        return manifest

    def _open_file(self, number: int) -> TensorFile:
        file = self._manifest.files[number]
        held = self.mirror.hold(file.name, file.num_bytes) if self.mirror else None
        opened = TensorFile(self.folder / file.name, held)
        if [entry.key for entry in opened.entries] != file.keys:
            raise ValueError(f"is foreign (it holds other keys than {MANIFEST} says)")
        return opened

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
        half = len(list(self.folder.glob(NAMES))) - len(self._manifest.files)
        return told + [f"{self.folder}, half-written: {half} files are finished and will be kept"] * (half > 0)


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


def per_file(item_bytes: int) -> int:
    """How many items make a file."""
    return max(1, min(FILE_ITEMS, FILE_BYTES // item_bytes))


def in_groups(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Consecutive parts of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]
