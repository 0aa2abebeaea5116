"""Feature caches that were damaged, or written by someone else: refused by name, and nothing of them is obeyed."""

import hashlib
import json
import random
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from srpo_lightning.data import tensor_files
from srpo_lightning.data.manifest import MANIFEST
from srpo_lightning.data.store import ParquetStore
from srpo_lightning.data.tensor_files import TensorFile
from tests.data.test_store import DESCRIPTION, WANTED, content, encode, filled, store, tensors

CURES = r"delete it|[Dd]elete its folder|write it again"


def read_all(folder) -> dict:
    own = store(folder)
    own.open()
    return content(own)


def is_right(found: dict) -> bool:
    return all(torch.equal(found[name][key], value) for name in found for key, value in tensors(name).items())


@pytest.mark.parametrize("kind", ["flips", "cuts"])
def test_every_damage_is_refused_in_one_line_with_the_file_and_the_cure(tmp_path, kind):
    folder, draw = filled(tmp_path).folder, random.Random(0)
    files = [path for path in folder.iterdir() if path.stat().st_size]
    assert {path.suffix for path in files} == {".parquet", ".json"}
    for number in range({"flips": 200, "cuts": 50}[kind]):
        path = files[number % len(files)]
        whole = path.read_bytes()
        place = draw.randrange(len(whole))
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed if kind == "flips" else whole[:place])
        with pytest.raises(ValueError, match=rf"\A[^\n]*{path.name}[^\n]*({CURES})[^\n]*\Z"):
            read_all(tmp_path)
        path.write_bytes(whole)
    assert is_right(read_all(tmp_path))


def test_what_was_damaged_is_there_again_once_it_is_deleted(tmp_path):
    folder = filled(tmp_path).folder
    for path in sorted(folder.glob("*.*")):
        path.unlink()
        again = store(tmp_path)
        again.open(mend=True)
        again.fill(WANTED, encode, 2, 3)
        assert is_right(read_all(tmp_path)), path.name


def test_damage_of_a_half_written_store_is_said_and_computed_again(tmp_path, caplog):
    draw = random.Random(0)
    own = store(tmp_path)
    written = own.write(WANTED[:3], encode, 2)
    path = own.folder / written.name
    whole = path.read_bytes()
    footer = TensorFile(path).entries[-1].end
    for _ in range(40):
        changed = bytearray(whole)
        changed[draw.randrange(footer, len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
            assert len(store(tmp_path).recover(WANTED)) == 7
        assert f"{path} has other bytes than were written" in caplog.text
        caplog.clear()
    assert store(tmp_path).fill(WANTED, encode, 2, 3) == 7
    assert is_right(read_all(tmp_path))


def test_a_store_that_litdata_read_is_named_and_made_again(tmp_path, caplog):
    folder = store(tmp_path).folder
    folder.mkdir(parents=True)
    old = [folder / name for name in ("manifest.json", "index.json", "chunk-0123456789abcdef.bin")]
    for path in old:
        path.write_text("{}")
    own = store(tmp_path)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        assert own.open().num_items == 0
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith(f"{folder} was written by an earlier version, in litdata's chunks: it is not read")
    own.write(WANTED[:3], encode, 2)
    assert all(path.is_file() for path in old)
    caplog.clear()
    assert own.fill(WANTED, encode, 2, 3) == 4
    assert not any(path.exists() for path in old)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        assert is_right(read_all(tmp_path))
    assert not caplog.records


def sign(folder, files: list[dict], **more) -> None:
    """Write a manifest as it would be, were that right."""
    body = {"description": DESCRIPTION, "count": 7, "bytes": 1, "files": files} | more
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({"manifest": body, "sha256": checksum}))


def opened(tmp_path, where: str) -> ParquetStore:
    if where == "local":
        return store(tmp_path / "there")
    return ParquetStore(f"file://{tmp_path / 'there'}", DESCRIPTION, str(tmp_path / "here"))


FOREIGN_MANIFESTS = {
    "absolute": ({"name": "/etc/passwd"}, "file name '/etc/passwd'"),
    "above": ({"name": f"../features-{'0' * 32}.parquet"}, r"file name '\.\./features"),
    "other name": ({"name": "features-0.parquet"}, "file name"),
    "no name": ({"name": 7}, "TypeError"),
    "size": ({"num_bytes": "7"}, "keys"),
    "more fields": ({"reader": "pickle"}, "TypeError"),
    "keys": ({"keys": [1, 2, 3]}, "TypeError"),
    "long keys": ({"keys": ["0" * 33]}, "keys"),
}


@pytest.mark.parametrize("where", ["local", "remote"])
@pytest.mark.parametrize(("change", "told"), FOREIGN_MANIFESTS.values(), ids=FOREIGN_MANIFESTS)
def test_a_manifest_that_this_program_did_not_write_is_refused(tmp_path, change, told, where):
    own = filled(tmp_path / "there")
    sign(own.folder, [file._asdict() | change for file in own.open().files])
    own = opened(tmp_path, where)
    cure = f"upload it to {own.remote}" if own.remote else "delete its folder"
    with pytest.raises(ValueError, match=rf"{MANIFEST} is damaged or foreign .*{told}.*{cure}"):
        own.open()
    assert not list((tmp_path / "here").rglob("*.parquet"))


KEY = WANTED[0][0]
FLOATS = pa.schema([pa.field("elements", pa.binary(4), nullable=False)])
EXECUTED = []


class Boom(pa.ExtensionType):
    """Whoever reads its name runs its code."""

    def __init__(self) -> None:
        super().__init__(pa.binary(4), "tests.boom")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        EXECUTED.append(serialized)
        return cls()


def foreign(folder, schema=FLOATS, entry=None, groups=1, footer=True, store_schema=False) -> None:
    """A store of one file, with right sums, whose one item may be anything."""
    folder.mkdir(parents=True)
    path = folder / "file"
    columns = [pa.array([b"1234"] * 6, pa.binary(4)) for _ in schema]
    table = pa.Table.from_arrays(
        [column.cast(field.type) for column, field in zip(columns, schema, strict=True)], schema=schema
    )
    with pq.ParquetWriter(path, schema, store_schema=store_schema) as writer:
        for _ in range(groups):
            writer.write_table(table)
        with path.open("rb") as written:
            end = len(written.read())
            written.seek(0)
            crc = zlib.crc32(written.read())
        told = {"key": KEY, "tensors": {"flat": ["float32", 6]}, "end": end, "crc32": crc} | (entry or {})
        writer.add_key_value_metadata({"items": json.dumps([list(told.values())])} if footer else {"pickle": "x"})
    with pa.OSFile(str(path)) as written:
        name = tensor_files._name(tensor_files._footer(written))
    path.rename(folder / name)
    sign(folder, [{"name": name, "num_bytes": (folder / name).stat().st_size, "keys": [KEY]}])


BOOM = pa.schema([pa.field("elements", Boom(), nullable=False)])
NULLABLE = pa.schema([pa.field("elements", pa.binary(4))])
FOREIGN_FILES = {
    "nothing": ({}, None),
    "arrow's schema": ({"schema": BOOM, "store_schema": True}, "it has an Arrow schema"),
    "no items": ({"footer": False}, "KeyError: b'items'"),
    "nullable": ({"schema": NULLABLE}, "its columns are"),
    "other name": ({"schema": pa.schema([pa.field("e", pa.binary(4), nullable=False)])}, "its columns are"),
    "two columns": ({"schema": pa.schema([*FLOATS, pa.field("e", pa.binary(4), nullable=False)])}, "its columns are"),
    "groups": ({"groups": 2}, "it has 2 row groups for 1 items"),
    "dtype": ({"entry": {"tensors": {"flat": ["load", 6]}}}, "one of its items is"),
    "shape": ({"entry": {"tensors": {"flat": ["float32", -1, -6]}}}, "one of its items is"),
    "no shape": ({"entry": {"tensors": {"flat": ["float32", "6"]}}}, "one of its items is"),
    "nested": ({"entry": {"tensors": [["float32", 6]]}}, "AttributeError"),
    "larger": ({"entry": {"tensors": {"flat": ["float32", 10**12]}}}, "has 6 elements"),
    "smaller": ({"entry": {"tensors": {"flat": ["float32", 5]}}}, "has 6 elements"),
    "key": ({"entry": {"key": "../x"}}, "one of its items is"),
    "other key": ({"entry": {"key": "0" * 32}}, "it holds other keys than"),
    "end": ({"entry": {"end": 30}}, "the checksum of its item 0 differs"),
}  # fmt: skip


@pytest.mark.parametrize("where", ["local", "remote"])
@pytest.mark.parametrize(("change", "told"), FOREIGN_FILES.values(), ids=FOREIGN_FILES)
def test_a_file_that_this_program_did_not_write_is_refused_and_nothing_runs(tmp_path, change, told, where):
    pa.register_extension_type(Boom())
    try:
        foreign(store(tmp_path / "there").folder, **change)
        EXECUTED.clear()
        own = opened(tmp_path, where)
        own.open()
        if told is None:
            assert own.read(0)["flat"].shape == (6,)
            return
        with pytest.raises(
            ValueError, match=rf"\A[^\n]*parquet (is foreign|has other)[^\n]*{told}[^\n]*delete it[^\n]*\Z"
        ):
            own.read(0)
        assert not EXECUTED
    finally:
        pa.unregister_extension_type("tests.boom")


def test_a_file_under_another_ones_name_is_refused(tmp_path):
    own = filled(tmp_path)
    first, second, *_ = [file for file in own.open().files if len(file.keys) == 3]
    content = (own.folder / second.name).read_bytes()
    (own.folder / first.name).write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"{first.name} has other bytes .*delete it|{first.name} has .* bytes, expected"
    ):
        read_all(tmp_path)
