"""Chunks of tensors: exact, resumable, and never wrong in silence."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor, wait

import litdata
import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from srpo_lightning.data.chunks import from_planes, key_of, to_planes
from srpo_lightning.data.manifest import MANIFEST
from srpo_lightning.data.store import ChunkStore, per_chunk

DESCRIPTION = {"model": "m", "sequence_length": 12, "fingerprint": "f" * 64}
WANTED = [(key_of(name), name) for name in "abcdefg"]


def tensors(name: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(ord(name))
    return {"wide": torch.randn(5, 3, generator=draw).bfloat16(), "flat": torch.randn(4, generator=draw)}


def encode(names):
    return [tensors(name) for name in names]


def store(folder, **description) -> ChunkStore:
    return ChunkStore(str(folder), DESCRIPTION | description)


def filled(folder, wanted=WANTED) -> ChunkStore:
    own = store(folder)
    assert own.fill(wanted, encode, batch_size=2, items_per_chunk=3) == len(wanted)
    return own


def chunks(own: ChunkStore):
    return sorted(own.folder.glob("chunk-*.bin"))


def content(own: ChunkStore, wanted=WANTED):
    return {name: own.read(int(row)) for (_, name), row in zip(wanted, own.find([k for k, _ in wanted]), strict=True)}


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.lists(st.integers(1, 4), min_size=1, max_size=3)
)
def test_byte_planes_are_the_tensor_bit_for_bit(dtype, shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(from_planes(to_planes(tensor), dtype), tensor)


def test_what_is_read_is_what_was_written_bit_for_bit(tmp_path):
    own = filled(tmp_path)
    assert len(chunks(own)) == 3
    for name, found in content(own).items():
        for key, expected in tensors(name).items():
            assert found[key].dtype == expected.dtype
            assert torch.equal(found[key], expected)


def test_equal_tensors_under_other_keys_are_kept_apart(tmp_path):
    own = store(tmp_path)
    own.fill(WANTED, lambda names: encode(["a"] * len(names)), 1, 1)
    assert own.open().num_items == 7
    assert all(torch.equal(found["flat"], tensors("a")["flat"]) for found in content(own).values())


def test_litdata_reads_the_folder_by_itself(tmp_path):
    own = filled(tmp_path)
    dataset = litdata.StreamingDataset(str(own.folder))
    assert len(dataset) == len(WANTED)
    assert torch.equal(from_planes(dataset[4]["wide"], torch.bfloat16), own.read(4)["wide"])


def test_the_manifest_says_what_is_there(tmp_path):
    own = filled(tmp_path)
    manifest = json.loads((own.folder / MANIFEST).read_text())["manifest"]
    assert manifest["description"] == DESCRIPTION
    assert manifest["count"] == 7
    assert manifest["bytes"] == sum(path.stat().st_size for path in chunks(own))
    assert sorted(chunk["filename"] for chunk in manifest["chunks"]) == [path.name for path in chunks(own)]


def test_what_is_there_is_not_computed_again_and_what_is_new_is_added(tmp_path):
    own = filled(tmp_path, WANTED[:4])
    before = {path: path.read_bytes() for path in chunks(own)}
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
def test_an_interrupted_fill_keeps_its_finished_chunks_and_nothing_else(tmp_path, stop_at):
    """Batches 1 and 2 are the first chunk, 3 and 4 the second."""
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


def test_a_kill_while_a_chunk_is_written_leaves_no_chunk(tmp_path, monkeypatch):
    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("srpo_lightning.data.chunks.sync", killed)
        with pytest.raises(KeyboardInterrupt):
            store(tmp_path).fill(WANTED, encode, 2, 3)
    own = store(tmp_path)
    assert own.open().num_items == 0
    assert own.recover(WANTED) == WANTED


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, expected"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_chunk_that_is_missing_or_cut_off_is_refused_before_anything_is_read(tmp_path, damage, message):
    path = chunks(filled(tmp_path))[1]
    damage(path)
    with pytest.raises(ValueError, match=rf"{path.name} .*{message}.*python -m srpo_lightning cache --config"):
        store(tmp_path).open()


@pytest.mark.parametrize("damage", [damage for damage, _ in DAMAGE.values()], ids=DAMAGE)
def test_a_small_store_makes_missing_chunks_again(tmp_path, damage):
    own = filled(tmp_path)
    path = chunks(own)[1]
    before = path.read_bytes()
    damage(path)
    again = store(tmp_path)
    assert again.open(mend=True).num_items < 7
    assert again.fill(WANTED, encode, 2, 3) in (1, 3)
    assert path.read_bytes() == before
    assert content(again).keys() == set("abcdefg")


def test_a_flipped_bit_is_found_when_the_chunk_is_first_read_and_other_chunks_are_read_on(tmp_path):
    own = filled(tmp_path)
    path = own.folder / own.open().chunks[0].filename
    flip(path)
    opened = store(tmp_path)
    opened.open()
    opened.read(3)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=rf"{path.name} has other bytes .*delete it.*python -m srpo_lightning cache"
        ):
            opened.read(0)


def test_a_damaged_manifest_is_refused(tmp_path):
    path = filled(tmp_path).folder / MANIFEST
    whole = path.read_text()
    for changed in (whole[:-10], whole.replace("bfloat16", "float16"), whole.replace('"count": 7', '"count": 8'), "{}"):
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
    assert "half-written: 1 chunks are finished" in own.others()[0]


def test_pruning_removes_chunks_that_nothing_wants(tmp_path):
    own = filled(tmp_path)
    own.publish(keep=[WANTED[0][0], WANTED[4][0]])
    assert len(chunks(own)) == 2
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


def test_a_remote_store_is_fetched_chunk_by_chunk(tmp_path):
    """litdata's `local:` is fetched like s3://: from the one place, into the other."""
    own = filled(tmp_path / "there")
    remote = ChunkStore(f"local:{tmp_path / 'there'}", DESCRIPTION, str(tmp_path / "here"))
    assert remote.open().num_items == 7
    assert remote.folder != own.folder
    assert not chunks(remote)
    assert torch.equal(remote.read(3)["wide"], own.read(3)["wide"])
    assert len(chunks(remote)) == 1
    assert {name: found["flat"].tolist() for name, found in content(remote).items()} == {
        name: found["flat"].tolist() for name, found in content(own).items()
    }


def test_a_damaged_chunk_of_a_remote_store_is_refused_and_fetched_again_once_deleted(tmp_path):
    filled(tmp_path / "there")
    remote = ChunkStore(f"local:{tmp_path / 'there'}", DESCRIPTION, str(tmp_path / "here"))
    remote.open()
    expected = remote.read(0)["flat"]
    (path,) = chunks(remote)
    flip(path)
    with pytest.raises(ValueError, match=rf"{path.name} has other bytes .*delete it, it is fetched again from local:"):
        pickle.loads(pickle.dumps(remote)).read(0)
    path.unlink()
    assert torch.equal(pickle.loads(pickle.dumps(remote)).read(0)["flat"], expected)


def test_a_remote_store_that_is_not_there_is_refused(tmp_path):
    remote = ChunkStore(f"local:{tmp_path / 'nowhere'}", DESCRIPTION, str(tmp_path / "here"))
    with pytest.raises(ValueError, match=r"manifest.json cannot be fetched .*correct data.cache_dir"):
        remote.open()


def test_without_litdata_the_command_that_installs_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("srpo_lightning.data.chunks.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps 'litdata"):
        store(tmp_path)


def test_keys_are_told_apart_at_their_seams():
    assert key_of("ab", "c") != key_of("a", "bc")


def test_chunks_have_64_mib_and_at_least_one_item():
    assert per_chunk(1 << 30) == 1
    assert per_chunk(4 << 20) == 16
    assert per_chunk(100) == 1024
