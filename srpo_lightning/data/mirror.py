"""Copies on this machine of the files of a store elsewhere: fetched when they are needed, evicted for want of room."""

import fcntl
import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock
from pyarrow.fs import FileSystem, LocalFileSystem, copy_files

from srpo_lightning.data.manifest import CURE
from srpo_lightning.data.tensor_files import NAMES, in_a_line

PROTOCOLS = ("s3://", "gs://", "hf://", "abfs://", "abfss://", "file://")
PART_BYTES = 8 << 20  # of one request
GIGABYTE = 10**9


class FetchError(ValueError):
    """A file that cannot be reached, with the cure."""


class Mirror:
    """Copies of the files of one store.

    Args:
        parent: URL of the folder of all stores, which may end in `?endpoint_override=...&scheme=...`.
        name: Name of the store in that folder.
        root: Folder of the copies of all stores on this machine.
        gigabytes: Most that they take together. None: no limit.
    """

    def __init__(self, parent: str, name: str, root: str, gigabytes: float | None) -> None:
        self.parent, self.name, self.gigabytes = parent, name, gigabytes
        self.root = Path(root).expanduser().resolve()
        self.folder = self.root / hashlib.sha256(parent.encode()).hexdigest()[:16] / name
        self.url = f"{parent.partition('?')[0].rstrip('/')}/{name}"
        self._source: tuple[int, FileSystem, str] | None = None

    def fetch(self, filename: str, num_bytes: int = 0, again: bool = False) -> None:
        """Bring a file here; another process that does so is waited for.

        Args:
            filename: Name of the file within the store.
            num_bytes: Size for which room is made.
            again: Also if there is a copy.

        Raises:
            FetchError: with the cure, if it cannot be reached.
        """
        target, partial = self.folder / filename, self.folder / ".fetching" / f"{filename}.partial"
        partial.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(partial.with_suffix(".one-at-a-time")):
            if target.is_file() and not again:
                return
            self._make_room(num_bytes)
            try:
                source, folder = self._open_source()
                copy_files(
                    f"{folder}/{self.name}/{filename}",
                    str(partial),
                    source_filesystem=source,
                    destination_filesystem=LocalFileSystem(),
                    chunk_size=PART_BYTES,
                    use_threads=False,
                )
            except (OSError, RuntimeError, ValueError, ImportError, pa.ArrowException) as error:
                raise FetchError(
                    f"{self.url}/{filename} cannot be fetched ({in_a_line(error)}): correct "
                    f"data.cache_dir or the credentials, or {CURE} and upload the folder"
                ) from error
            partial.replace(target)

    def hold(self, filename: str, num_bytes: int) -> int:
        """Fetch a file if it is not here; while the descriptor that is returned is open, no process evicts it."""
        while True:
            self.fetch(filename, num_bytes)
            with suppress(FileNotFoundError):  # evicted since then
                held = os.open(self.folder / filename, os.O_RDONLY)
                fcntl.flock(held, fcntl.LOCK_SH)
                if os.fstat(held).st_nlink:
                    os.utime(held)
                    return held
                os.close(held)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker: it connects by itself."""
        return self.__dict__ | {"_source": None}

    def _open_source(self) -> tuple[FileSystem, str]:
        if self._source is None or self._source[0] != os.getpid():
            self._source = os.getpid(), *FileSystem.from_uri(self.parent)
        return self._source[1], self._source[2].rstrip("/")

    def _make_room(self, num_bytes: int) -> None:
        """Evict the copies that were not used for longest, unless a process has them open."""
        if self.gigabytes is None:
            return
        with FileLock(self.root / ".one-evicts"):
            files = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in self.root.rglob(NAMES))
            excess = sum(size for _, size, _ in files) + num_bytes - self.gigabytes * GIGABYTE
            for _, size, path in files:
                if excess > 0:
                    with path.open("rb") as file, suppress(BlockingIOError):  # a process has it open
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        path.unlink()
                        excess -= size
