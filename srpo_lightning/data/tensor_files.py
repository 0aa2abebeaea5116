"""Parquet files of tensors by key: a row group for each item, which is read and checked by itself.

A file has one column, `elements`: those of an item's tensors, one tensor behind the other. They lie there as so many
bytes each, because Parquet knows no bfloat16; split by bytes (BYTE_STREAM_SPLIT) they compress best. The footer says,
as JSON under `items`, which tensors these are, where the row group of each item ends, and the CRC-32 of its bytes. A
file's name is the SHA-256 of its footer. So no byte is used that is not the one that was written.

What Parquet itself says of a file is compared with that, and not obeyed.
"""

import hashlib
import json
import math
import os
import re
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from isal import isal_zlib
from torch import Tensor

from srpo_lightning.files.checkpoints import sync

FOREIGN = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading JSON raises, whose content may be anything."""

Item: TypeAlias = Mapping[str, Tensor]

NAME, NAMES = re.compile(r"features-[0-9a-f]{32}\.parquet"), "features-*.parquet"
KEY = re.compile(r"[0-9a-f]{32}")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLUMN, ITEMS, ARROW_SCHEMA = "elements", b"items", b"ARROW:schema"
MAGIC = b"PAR1"
TAIL_BYTES = 4 + len(MAGIC)  # the length of what lies before it in the footer, and the magic number
MAX_ROWS = 1 << 26  # elements of an item: what pyarrow puts into a row group at most
OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,  # higher ones gain nothing on split bytes, and take ten times as long
    "use_dictionary": False,
    "column_encoding": {COLUMN: "BYTE_STREAM_SPLIT"},
    "write_page_checksum": True,
    "write_statistics": False,
    "store_schema": False,
    "max_rows_per_page": MAX_ROWS,  # pages of 20,000 elements compress worse
}


class Entry(NamedTuple):
    """What a file's footer says of an item.

    Args:
        key: Key of the item.
        tensors: Type and shape of each tensor, by name.
        end: Byte behind its row group.
        crc32: CRC-32 of the bytes from the end of the item before, or from the beginning of the file.
    """

    key: str
    tensors: dict[str, list[Any]]
    end: int
    crc32: int

    @property
    def num_bytes(self) -> int:
        """Size of its tensors."""
        return sum(DTYPES[dtype].itemsize * math.prod(shape) for dtype, *shape in self.tensors.values())


class StoredFile(NamedTuple):
    """A file of a store.

    Args:
        name: Name within the folder.
        num_bytes: Size in bytes.
        keys: Keys of its items, in order.
    """

    name: str
    num_bytes: int
    keys: list[str]


def key_of(*parts: str | bytes) -> str:
    """The key of what is named by texts or bytes: 128 bits in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:32]


def in_a_line(error: Exception) -> str:
    """What an error says, with the class of those of libraries."""
    text = str(error).partition("\n")[0]
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}"


def write_file(folder: Path, items: Sequence[tuple[str, Item]]) -> StoredFile:
    """Write a file of items by key; when this returns it is on the disk, and named by what is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    schema = _schema(min(own.element_size() for _, tensors in items for own in tensors.values()))
    entries: list[Entry] = []
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as scratch:
        path = Path(scratch) / "file"
        with pa.OSFile(str(path), "wb") as sink, pq.ParquetWriter(sink, schema, **OPTIONS) as writer:
            for key, tensors in items:
                assert all(own.dtype in DTYPES.values() for own in tensors.values()), key
                start = entries[-1].end if entries else 0
                writer.write_table(_table(tensors, schema), row_group_size=MAX_ROWS)
                with pa.OSFile(str(path)) as written:
                    crc = isal_zlib.crc32(written.read_at(sink.tell() - start, start))
                told = {name: [str(own.dtype).removeprefix("torch."), *own.shape] for name, own in tensors.items()}
                entries.append(Entry(key, told, sink.tell(), crc))
            writer.add_key_value_metadata({ITEMS: json.dumps(entries).encode()})
        sync(path)
        with pa.OSFile(str(path)) as written:
            name = _name(_footer(written))
        file = StoredFile(name, path.stat().st_size, [key for key, _ in items])
        path.replace(folder / name)
    sync(folder)
    return file


class TensorFile:
    """A file that is open to be read.

    Args:
        path: Path of the file, by its own name.
        held: File descriptor that is closed with it.

    Raises:
        ValueError: telling what is wrong with the file, if it is damaged or foreign.
        OSError: if it cannot be read.
    """

    def __init__(self, path: Path, held: int | None = None) -> None:
        if held is not None:
            weakref.finalize(self, os.close, held)
        self._file = pa.OSFile(str(path))
        footer = _footer(self._file)
        if _name(footer) != path.name:
            raise ValueError("has other bytes than were written (the checksum of its footer differs)")
        if ARROW_SCHEMA in footer:  # pyarrow would make the types that it names, by whatever code they have registered
            raise ValueError("is foreign (it has an Arrow schema)")
        try:
            self._parquet = pq.ParquetFile(self._file, page_checksum_verification=True)
            self.entries = _entries(self._parquet)
        except (*FOREIGN, OSError, pa.ArrowException) as error:
            raise ValueError(f"is foreign ({in_a_line(error)})") from error

    def read(self, number: int) -> dict[str, Tensor]:
        """The tensors of an item.

        Raises:
            ValueError: telling what is wrong with the file.
        """
        entry, start = self.entries[number], self.entries[number - 1].end if number else 0
        if isal_zlib.crc32(self._file.read_at(entry.end - start, start)) != entry.crc32:
            raise ValueError(f"has other bytes than were written (the checksum of its item {number} differs)")
        try:
            column = self._parquet.read_row_group(number, use_threads=False).column(0).combine_chunks()
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"cannot be read ({in_a_line(error)})") from error
        if len(column) * column.type.byte_width != entry.num_bytes:
            raise ValueError(f"is foreign (its item {number} has {len(column)} elements)")
        content, place = np.frombuffer(column.buffers()[1] or b"", np.uint8), 0
        tensors = {}
        for name, (dtype, *shape) in entry.tensors.items():
            size = math.prod(shape) * DTYPES[dtype].itemsize
            own = content[place : place + size]
            if 2 * size > len(content) and place % DTYPES[dtype].itemsize == 0:  # copying the largest costs most
                tensors[name] = torch.from_numpy(own).view(DTYPES[dtype]).reshape(shape)
            else:
                tensors[name] = torch.empty(shape, dtype=DTYPES[dtype])
                _bytes(tensors[name])[:] = own
            place += size
        return tensors


def _schema(width: int) -> pa.Schema:
    return pa.schema([pa.field(COLUMN, pa.binary(width), nullable=False)])


def _table(tensors: Item, schema: pa.Schema) -> pa.Table:
    kind, content = schema.field(COLUMN).type, np.concatenate([_bytes(own) for own in tensors.values()])
    count = len(content) // kind.byte_width
    assert count <= MAX_ROWS, f"an item of {count} elements"
    return pa.Table.from_arrays([pa.Array.from_buffers(kind, count, [None, pa.py_buffer(content)])], schema=schema)


def _bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _footer(file: pa.NativeFile) -> bytes:
    """The last bytes of a file, from where its row groups end."""
    size = file.size()
    tail = file.read_at(min(TAIL_BYTES, size), max(0, size - TAIL_BYTES))
    length = int.from_bytes(tail[:4], "little") + TAIL_BYTES
    if not tail.endswith(MAGIC) or length > size:
        raise ValueError("has other bytes than were written (it has no footer)")
    return bytes(file.read_at(length, size - length))


def _name(footer: bytes) -> str:
    return f"features-{hashlib.sha256(footer).hexdigest()[:32]}.parquet"


def _entries(parquet: pq.ParquetFile) -> list[Entry]:
    """What a footer says of its items, if that is what this program writes."""
    if parquet.schema_arrow not in map(_schema, (2, 4, 8)):
        raise ValueError(f"its columns are {str(parquet.schema_arrow)!r:.80}")
    entries = [Entry(*own) for own in json.loads(parquet.metadata.metadata[ITEMS])]
    for entry in entries:
        numbers = [entry.end, entry.crc32, *(size for _, *shape in entry.tensors.values() for size in shape)]
        is_ours = KEY.fullmatch(entry.key) and {dtype for dtype, *_ in entry.tensors.values()}.issubset(DTYPES)
        if not is_ours or not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"one of its items is {entry!r:.80}")
    if parquet.num_row_groups != len(entries):
        raise ValueError(f"it has {parquet.num_row_groups} row groups for {len(entries)} items")
    return entries
