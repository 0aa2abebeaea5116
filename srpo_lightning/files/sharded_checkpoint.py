"""The folder of a sharded checkpoint: read without running what a foreign one could hold, and the sums of its files.

torch.distributed.checkpoint keeps a list of its tensors in `.metadata`, a pickle, and objects that are no tensors as
pickles beside them; left to itself it runs both.
"""

import io
import json
import pickle
import warnings
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from srpo_lightning.files.crc import crc32
from srpo_lightning.files.pretrained import UNPICKLING

INDEX = ".metadata"  # where torch.distributed.checkpoint writes which tensor lies in which file
SUMS = "sums.json"

Sums: TypeAlias = Mapping[str, tuple[int, int]]
"""Size and CRC-32 of each file, by its name."""

LISTED: Mapping[str, frozenset[str]] = {
    "torch.distributed.checkpoint.metadata": frozenset(
        [
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        ]
    ),
    "torch.distributed.checkpoint.filesystem": frozenset(["_StorageInfo"]),
    "torch.serialization": frozenset(["_get_layout"]),
    "torch": frozenset(["Size", *(name for name, own in vars(torch).items() if isinstance(own, torch.dtype))]),
    "pathlib": frozenset(["PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"]),
    "collections": frozenset(["OrderedDict"]),
}
"""What a list of tensors is made of, by module; nothing else is imported for it, and so nothing else can be called."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in LISTED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no list of tensors holds")
        return super().find_class(module, name)


class SafeReader(FileSystemReader):
    """A reader for which a list of tensors is a list of tensors, and is read once.

    Args:
        path: Folder of the checkpoint.

    Raises:
        ValueError: where the list is used, if it is damaged, or names what no list of tensors holds.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._folder = path
        self._list: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the folder holds."""
        if self._list is None:
            self._list = read_list(self._folder)
        if self._list.storage_meta is None:
            self._list.storage_meta = StorageMeta()
        self._list.storage_meta.load_id = self.load_id
        return self._list


def read_list(folder: Path) -> Metadata:
    """The list of what a folder holds.

    Raises:
        ValueError: if it is damaged, or names what no list of tensors holds, a file elsewhere among that.
    """
    path = folder / INDEX
    try:
        found = _Unpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError(f"it is a {type(found).__name__}")
        names = {own.relative_path for own in found.storage_data.values()}
        for index, own in found.storage_data.items():
            found.state_dict_metadata[index.fqn]
            if not isinstance(own.relative_path, str) or min(own.offset, own.length) < 0:
                raise pickle.UnpicklingError(f"{index.fqn} is at no place in a file")
    except (OSError, *UNPICKLING) as error:
        raise ValueError(f"{INDEX} cannot be read as a list of tensors ({error})") from error
    for name in names:
        if PurePosixPath(name).name != name:
            raise ValueError(f"{INDEX} names {name!r}, which is no file in it")
    return found


def foreign_object(folder: Path) -> str | None:
    """The first object of a folder that is more than tensors, numbers and texts; None if there is none."""
    found = read_list(folder)
    for index, place in found.storage_data.items():
        if isinstance(found.state_dict_metadata[index.fqn], BytesStorageMetadata):
            with (folder / place.relative_path).open("rb") as stream:
                stream.seek(place.offset)
                content = io.BytesIO(stream.read(place.length))
            try:
                torch.load(content, weights_only=True)
            except UNPICKLING:
                return index.fqn
    return None


class TensorsOnly(DefaultLoadPlanner):
    """Reads objects that are no tensors with `weights_only`."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Raise before what is more than numbers and texts is unpickled for good."""
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def read_into(state: dict[str, Any], folder: Path) -> None:
    """Fill a state dict from a folder, every rank its own part."""
    load(state, storage_reader=SafeReader(folder), planner=TensorsOnly())


def read_alone(state: dict[str, Any], reader: SafeReader, planner: TensorsOnly | None = None) -> None:
    """Fill a state dict from all ranks' parts, in one process, whatever others do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is asked for here
        load(state, storage_reader=reader, planner=planner or TensorsOnly(), no_dist=True)


def sums_of(paths: Iterable[Path]) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of files, by their names."""
    return {path.name: _sum(path) for path in paths}


def write_sums(folder: Path, sums: Sums) -> None:
    """Keep the sums of a folder's files in it, with one of themselves."""
    body = json.dumps({name: list(own) for name, own in sorted(sums.items())})
    (folder / SUMS).write_text(json.dumps({"files": body, "crc32": zlib.crc32(body.encode())}), encoding="utf-8")


def damage(folder: Path, content: bool = True) -> str | None:
    """What is wrong with a folder's files by their sums; None if nothing is, or there are no sums (older checkpoints).

    Args:
        content: Whether to read all files; otherwise their sizes are compared.
    """
    if not (folder / SUMS).is_file():
        return None
    try:
        kept = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        files = json.loads(kept["files"])
        is_whole = zlib.crc32(kept["files"].encode()) == kept["crc32"] and set(kept) == {"files", "crc32"}
    except (ValueError, KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        return f"{SUMS} is damaged"
    for name, (size, crc) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) != size:
            return f"{name} has {found} bytes instead of {size}"
        if content and _sum(path) != (size, crc):
            return f"{name} has another sum than it was written with"
    return None


def _sum(path: Path) -> tuple[int, int]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        return size, crc32(stream, size)
