"""Parquet files of tensors: exact, resumable, and never wrong in silence."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor, wait
from unittest.mock import Mock

import pytest
import torch
from filelock import FileLock

from srpo_lightning.data.manifest import MANIFEST
from srpo_lightning.data.store import ParquetStore, per_file
from srpo_lightning.data.tensor_files import NAMES, key_of

DESCRIPTION = {"model": "m", "sequence_length": 12, "fingerprint": "f" * 64}
WANTED = [(key_of(name), name) for name in "abcdefg"]


def tensors(name: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(ord(name))
    return {"wide": torch.randn(5, 3, generator=draw).bfloat16(), "flat": torch.randn(4, generator=draw)}


def encode(names):
    return [tensors(name) for name in names]


def store(folder, **description) -> ParquetStore:
    return ParquetStore(str(folder), DESCRIPTION | description)


def filled(folder, wanted=WANTED) -> ParquetStore:
    own = store(folder)
    assert own.fill(wanted, encode, batch_size=2, items_per_file=3) == len(wanted)
    return own


def files(own: ParquetStore):
    return sorted(own.folder.glob(NAMES))


def content(own: ParquetStore, wanted=WANTED):
    return {name: own.read(int(row)) for (_, name), row in zip(wanted, own.find([k for k, _ in wanted]), strict=True)}


def test_what_is_read_is_what_was_written_bit_for_bit(tmp_path):
    own = filled(tmp_path)
    assert len(files(own)) == 3
    for name, found in content(own).items():
        for key, expected in tensors(name).items():
            assert found[key].dtype == expected.dtype
            assert torch.equal(found[key], expected)


def test_equal_tensors_under_other_keys_are_kept_apart(tmp_path):
    own = store(tmp_path)
    own.fill(WANTED, lambda names: encode(["a"] * len(names)), 1, 1)
    assert own.open().num_items == 7
    assert all(torch.equal(found["flat"], tensors("a")["flat"]) for found in content(own).values())


def test_the_manifest_says_what_is_there(tmp_path):
    own = filled(tmp_path)
    manifest = json.loads((own.folder / MANIFEST).read_text())["manifest"]
    assert manifest["description"] == DESCRIPTION
    assert manifest["count"] == 7
    assert manifest["bytes"] == sum(path.stat().st_size for path in files(own))
    assert sorted(file["name"] for file in manifest["files"]) == [path.name for path in files(own)]


def test_what_is_there_is_not_computed_again_and_what_is_new_is_added(tmp_path):
    own = filled(tmp_path, WANTED[:4])
    before = {path: path.read_bytes() for path in files(own)}
    computed = []

    def watched(names):
        computed.extend(names)
        return encode(names)

    more = store(tmp_path)
    assert more.fill([*WANTED, WANTED[5]], watched, 2, 3) == 3
    assert computed == ["e", "f", "g"]
    assert all(path.read_bytes() == bytes_ for path, bytes_ in before.items())
    assert content(more).keys() == set("abcdefg")
    assert store(tmp_path).fill(WANTED, lambda names: pytest.fail("computed again"), 2, 3) == 0


@pytest.mark.parametrize("stop_at", [1, 2, 4])
def test_an_interrupted_fill_keeps_its_finished_files_and_nothing_else(tmp_path, stop_at):
    """Batches 1 and 2 are the first file, 3 and 4 the second."""
    batches = []

    def stopped(names):
        batches.append(names)
        if len(batches) == stop_at:
            raise KeyboardInterrupt
        return encode(names)

    with pytest.raises(KeyboardInterrupt):
        store(tmp_path).fill(WANTED, stopped, 2, 3)
    half = store(tmp_path)
    assert half.open().num_items == 0
    assert half.fill(WANTED, encode, 2, 3) == {1: 7, 2: 7, 4: 4}[stop_at]
    assert all(torch.equal(found["flat"], tensors(name)["flat"]) for name, found in content(half).items())


def test_a_kill_between_the_last_file_and_the_manifest_loses_nothing(tmp_path):
    filled(tmp_path, WANTED[:3])
    killed = store(tmp_path)
    killed.publish = Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        killed.fill(WANTED, encode, batch_size=2, items_per_file=4)
    own = store(tmp_path)
    assert own.fill(WANTED, encode, batch_size=2, items_per_file=4) == 0
    assert (own.find([key for key, _ in WANTED]) >= 0).all()


def test_a_kill_while_a_file_is_written_leaves_no_file(tmp_path, monkeypatch):
    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("srpo_lightning.data.tensor_files.sync", killed)
        with pytest.raises(KeyboardInterrupt):
            store(tmp_path).fill(WANTED, encode, 2, 3)
    own = store(tmp_path)
    assert own.open().num_items == 0
    assert own.recover(WANTED) == WANTED


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, expected"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_file_that_is_missing_or_cut_off_is_refused_before_anything_is_read(tmp_path, damage, message):
    path = files(filled(tmp_path))[1]
    damage(path)
    with pytest.raises(ValueError, match=rf"{path.name} .*{message}.*python -m srpo_lightning cache --config"):
        store(tmp_path).open()


@pytest.mark.parametrize("damage", [damage for damage, _ in DAMAGE.values()], ids=DAMAGE)
def test_a_small_store_makes_missing_files_again(tmp_path, damage):
    own = filled(tmp_path)
    path = files(own)[1]
    before = path.read_bytes()
    damage(path)
    again = store(tmp_path)
    assert again.open(mend=True).num_items < 7
    assert again.fill(WANTED, encode, 2, 3) in (1, 3)
    assert path.read_bytes() == before
    assert content(again).keys() == set("abcdefg")


@pytest.mark.parametrize(("place", "lost"), [(0, [0]), (20, [0]), (-20, [0, 1, 2])])
def test_a_flipped_bit_is_found_when_its_item_is_read_and_others_are_read_on(tmp_path, place, lost):
    """The magic number at the beginning, bytes of the first item, and the footer, without which nothing is read."""
    own = filled(tmp_path)
    (file, *_) = [file for file in own.open().files if len(file.keys) == 3]
    flip(own.folder / file.name, place)
    opened = store(tmp_path)
    opened.open()
    rows = opened.find([key for key, _ in WANTED]).tolist()
    refused = opened.find([file.keys[number] for number in lost]).tolist()
    for row in set(rows) - set(refused):
        opened.read(row)
    for row in refused * 2:
        with pytest.raises(
            ValueError, match=rf"{file.name} has other bytes .*delete it.*python -m srpo_lightning cache"
        ):
            opened.read(row)


def test_a_damaged_manifest_is_refused(tmp_path):
    path = filled(tmp_path).folder / MANIFEST
    whole = path.read_text()
    for changed in (whole[:-10], whole.replace("parquet", "Parquet"), whole.replace('"count": 7', '"count": 8'), "{}"):
        path.write_text(changed)
        with pytest.raises(ValueError, match=rf"{MANIFEST} is damaged .*delete its folder and write it again"):
            store(tmp_path).open()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "n"}, "model is 'm', expected 'n'"),
        ({"sequence_length": 7}, "sequence_length is 12, expected 7"),
        ({}, "the models' files differ"),
    ],
)
def test_a_store_of_another_encoder_under_this_ones_name_is_refused(tmp_path, change, message):
    own = filled(tmp_path)
    other = store(tmp_path, **change, fingerprint="e" * 64)
    own.folder.rename(other.folder)
    with pytest.raises(ValueError, match=rf"{MANIFEST} is of other features \({message}\): write it again"):
        other.open()


def test_a_store_of_another_encoder_beside_it_is_told(tmp_path):
    filled(tmp_path)
    (told,) = store(tmp_path, sequence_length=7, fingerprint="e" * 64).others()
    assert "sequence_length is 12, expected 7" in told


def test_a_half_written_store_is_told(tmp_path):
    own = store(tmp_path)
    own.write(WANTED[:3], encode, 2)
    assert "half-written: 1 files are finished" in own.others()[0]


def test_pruning_removes_files_that_nothing_wants(tmp_path):
    own = filled(tmp_path)
    own.publish(keep=[WANTED[0][0], WANTED[4][0]])
    assert len(files(own)) == 2
    own.open()
    assert (own.find([key for key, _ in WANTED]) >= 0).tolist() == [True] * 6 + [False]


def test_a_second_process_waits_for_the_first_to_fill_a_folder(tmp_path, capsys):
    own = store(tmp_path)
    own.folder.mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool:
        with FileLock(own.folder / ".lock"):
            second = pool.submit(own.fill, WANTED, encode, 2, 3)
            assert wait([second], timeout=1.5).not_done == {second}
        assert second.result(timeout=1200) == 7
    assert f"waiting for another process that fills {own.folder}" in capsys.readouterr().out


def test_a_worker_gets_the_store_by_pickling(tmp_path):
    own = filled(tmp_path)
    own.read(0)
    assert torch.equal(pickle.loads(pickle.dumps(own)).read(5)["flat"], own.read(5)["flat"])


def test_files_have_64_mib_and_at_least_one_item():
    assert per_file(1 << 30) == 1
    assert per_file(4 << 20) == 16
    assert per_file(100) == 1024
