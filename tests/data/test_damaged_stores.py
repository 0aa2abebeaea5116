"""Feature caches that were damaged, or written by someone else: refused by name before litdata reads them."""

import hashlib
import json
import pickle
import random

import pytest
import torch

from srpo_lightning.data.manifest import INDEX, MANIFEST
from srpo_lightning.data.store import ChunkStore
from tests.data.test_store import DESCRIPTION, WANTED, chunks, content, encode, filled, store, tensors

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
    assert {path.suffix for path in files} == {".bin", ".json"}
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
    own.write(WANTED[:3], encode, 2)
    (record,) = own.folder.glob("chunk-*.json")
    whole = record.read_bytes()
    for _ in range(40):
        changed = bytearray(whole)
        changed[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        record.write_bytes(changed)
        with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
            assert len(store(tmp_path).recover(WANTED)) == 7
        assert f"{record} is damaged" in caplog.text
        caplog.clear()
    assert store(tmp_path).fill(WANTED, encode, 2, 3) == 7
    assert is_right(read_all(tmp_path))


def test_a_store_of_an_earlier_version_is_read_and_its_damage_found(tmp_path):
    folder = filled(tmp_path).folder
    sign(folder, lambda chunk: chunk.pop("crc32"))
    assert is_right(read_all(tmp_path))
    path = next(folder.glob("*.bin"))
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match=rf"{path.name} has other bytes than were written"):
        read_all(tmp_path)


def sign(folder, change) -> None:
    """Change each chunk of a manifest, and write manifest and index as they would be, were that right."""
    body = json.loads((folder / MANIFEST).read_text())["manifest"]
    for chunk in body["chunks"]:
        change(chunk)
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    entries, config = [chunk["litdata"] for chunk in body["chunks"]], body["chunks"][0]["config"]
    (folder / MANIFEST).write_text(json.dumps({"manifest": body, "sha256": checksum}))
    (folder / INDEX).write_text(json.dumps({"chunks": entries, "config": config, "updated_at": checksum}))


class Boom:
    """Whoever unpickles it writes a file."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def named(name: str):
    def change(chunk) -> None:
        chunk["filename"] = chunk["litdata"]["filename"] = name

    return change


FOREIGN = {
    "pickle": (lambda chunk: chunk["config"].update(data_format=["pickle", "numpy"]), "data format"),
    "unknown": (lambda chunk: chunk["config"].update(data_format=["numpy", "jpeg"]), "data format"),
    "fewer": (lambda chunk: chunk["config"].update(data_format=["numpy"]), "data format"),
    "absolute": (named("/etc/passwd"), "file name '/etc/passwd'"),
    "above": (named("../chunk-0000000000000000.bin"), r"file name '\.\./chunk"),
    "other name": (lambda chunk: chunk["litdata"].update(filename="../../x.bin"), "name for litdata"),
    "structure": (lambda chunk: chunk["config"].update(data_spec="[1, {}]"), "structure"),
    "compression": (lambda chunk: chunk["config"].update(compression="gz"), "compression 'gz'"),
    "encryption": (lambda chunk: chunk["config"].update(encryption={"level": "chunk"}), "encryption"),
    "item loader": (lambda chunk: chunk["config"].update(item_loader="TokensLoader"), "settings"),
    "dtype": (lambda chunk: chunk["dtypes"].update(wide="load"), "dtypes"),
    "more fields": (lambda chunk: chunk.update(reader="pickle"), "TypeError"),
    "keys": (lambda chunk: chunk.update(keys=[1, 2, 3]), "TypeError"),
    "counts": (lambda chunk: chunk["litdata"].update(chunk_size=99), "number of items"),
}


@pytest.mark.parametrize("where", ["local", "remote"])
@pytest.mark.parametrize(("change", "told"), FOREIGN.values(), ids=FOREIGN)
def test_a_store_that_this_program_did_not_write_is_refused_before_litdata_sees_it(
    tmp_path, change, told, where, monkeypatch
):
    sign(filled(tmp_path / "there").folder, change)
    own = store(tmp_path / "there")
    if where == "remote":
        own = ChunkStore(f"local:{tmp_path / 'there'}", DESCRIPTION, str(tmp_path / "here"))
    monkeypatch.setattr(own, "_dataset", lambda: pytest.fail("litdata saw it"))
    before = {path for path in tmp_path.parent.rglob("*") if path.suffix == ".bin"}
    cure = f"upload it to {own.remote}" if own.remote else "delete its folder"
    with pytest.raises(ValueError, match=rf"{MANIFEST} is damaged or foreign .*{told}.*{cure}"):
        own.open()
    assert {path for path in tmp_path.parent.rglob("*") if path.suffix == ".bin"} == before


@pytest.mark.parametrize("where", ["local", "remote"])
def test_an_index_of_pickles_beside_an_honest_manifest_is_refused_and_nothing_runs(tmp_path, where):
    folder = filled(tmp_path / "there").folder
    index = json.loads((folder / INDEX).read_text())
    index["config"]["data_format"] = ["pickle", "pickle"]
    (folder / INDEX).write_text(json.dumps(index))
    for path in folder.glob("*.bin"):
        path.write_bytes(pickle.dumps(Boom(tmp_path / "ran")))
    own = store(tmp_path / "there")
    if where == "remote":
        own = ChunkStore(f"local:{tmp_path / 'there'}", DESCRIPTION, str(tmp_path / "here"))
    with pytest.raises(ValueError, match=rf"{INDEX} is foreign or damaged .*delete it"):
        own.open()
    assert not (tmp_path / "ran").exists()


def test_a_missing_index_is_written_again_from_the_manifest(tmp_path):
    own = filled(tmp_path)
    index = own.folder / INDEX
    before = index.read_bytes()
    index.unlink()
    assert is_right(read_all(tmp_path))
    assert index.read_bytes() == before
    assert len(chunks(own)) == 3
