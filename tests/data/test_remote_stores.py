"""Stores on a bucket: read file by file, whatever happens on the way, in as much room as there is."""

import os
import pickle
import signal
import time
from itertools import islice
from multiprocessing import get_context

import pytest
import torch

from srpo_lightning.data.mirror import GIGABYTE, Mirror
from srpo_lightning.data.store import ParquetStore
from srpo_lightning.data.tensor_files import NAMES, key_of
from tests.data.bucket import CREDENTIALS, Line, query, serve
from tests.data.test_store import DESCRIPTION, content, files, filled
from tests.processes import LIMIT_S
from tests.tiny import new_data

LARGE = [(key_of(str(number)), number) for number in range(6)]
MEGABYTE = 1e-3  # of a gigabyte


def megabytes(numbers):
    """Two of noise each, of which nearly as much is stored."""
    return [{"noise": torch.randn(1 << 19, generator=torch.Generator().manual_seed(number))} for number in numbers]


@pytest.fixture(scope="module")
def server():
    with serve() as running:
        yield running


@pytest.fixture(autouse=True)
def _credentials(monkeypatch):
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def large(server, tmp_path_factory):
    """Six files of 1.8 MB each in the bucket `large`."""
    folder = tmp_path_factory.mktemp("large")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        own = ParquetStore(str(folder), DESCRIPTION)
        own.fill(LARGE, megabytes, 1, 1)
        server.upload(folder, "large")
    return own


def remote(url: str, folder, gigabytes: float | None = None) -> ParquetStore:
    return ParquetStore(url, DESCRIPTION, str(folder), gigabytes)


def noise(own: ParquetStore, number: int) -> torch.Tensor:
    (row,) = own.find([LARGE[number][0]])
    return own.read(int(row))["noise"]


def is_right(own: ParquetStore) -> bool:
    return all(torch.equal(noise(own, number), megabytes([number])[0]["noise"]) for number in range(len(LARGE)))


def copies(folder) -> list:
    return sorted(folder.rglob(NAMES))


def in_another_process(function, *arguments):
    process = get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


@pytest.mark.parametrize("where", ["file://", "s3://"])
def test_a_remote_store_is_fetched_file_by_file(tmp_path, server, where):
    own = filled(tmp_path / "there")
    if where == "s3://":
        server.upload(tmp_path / "there", "small")
    there = remote(server.url("small") if where == "s3://" else f"file://{tmp_path / 'there'}", tmp_path / "here")
    assert there.open().num_items == 7
    assert there.folder != own.folder
    assert not files(there)
    assert torch.equal(there.read(3)["wide"], own.read(3)["wide"])
    assert len(files(there)) == 1
    assert {name: found["flat"].tolist() for name, found in content(there).items()} == {
        name: found["flat"].tolist() for name, found in content(own).items()
    }


def test_training_reads_from_a_bucket_in_forked_workers_too(models, tmp_path, server):
    local = new_data(models, tmp_path / "there")
    local.prepare_data()
    server.upload(tmp_path / "there", "training")
    data = new_data(models, server.url("training"), mirror_dir=str(tmp_path / "here"), num_workers=2)
    data.prepare_data()
    for ours, theirs in zip(islice(data.train_dataloader(), 3), islice(local.train_dataloader(), 3), strict=True):
        assert ours.prompts == theirs.prompts
        assert torch.equal(ours.text.tensors["prompt_embeds"], theirs.text.tensors["prompt_embeds"])
    assert len(copies(tmp_path / "here")) == 1


def test_a_damaged_copy_is_refused_and_fetched_again_once_deleted(tmp_path):
    filled(tmp_path / "there")
    there = remote(f"file://{tmp_path / 'there'}", tmp_path / "here")
    there.open()
    expected = there.read(0)["flat"]
    (path,) = files(there)
    path.write_bytes(b"PAR2" + path.read_bytes()[4:])
    with pytest.raises(ValueError, match=rf"{path.name} has other bytes .*delete it, it is fetched again from file:"):
        pickle.loads(pickle.dumps(there)).read(0)
    path.unlink()
    assert torch.equal(pickle.loads(pickle.dumps(there)).read(0)["flat"], expected)


def test_a_store_that_is_not_there_is_refused_in_one_line(tmp_path, server):
    for url in (f"file://{tmp_path / 'nowhere'}", server.url("nowhere"), f"s3://a/b?{query(9)}", "s3://a/b?nothing=7"):
        with pytest.raises(
            ValueError, match=r"\A[^\n]*manifest.json cannot be fetched [^\n]*correct data.cache_dir[^\n]*\Z"
        ):
            remote(url, tmp_path / "here").open()


def test_what_is_asked_for_with_the_url_is_not_told(tmp_path, server):
    with pytest.raises(ValueError, match="cannot be fetched") as told:
        remote(server.url("nowhere"), tmp_path / "here").open()
    assert "endpoint_override" not in str(told.value)


@pytest.mark.parametrize(("what", "times"), [("slow", 1 << 62), ("cut", 2), ("silent", 1)])
def test_a_line_that_is_slow_or_broken_now_and_then_gives_what_was_written(large, server, tmp_path, what, times):
    with Line(server.port, what, bytes_before=600_000, times=times) as line:
        there = remote(server.url("large", line.port), tmp_path)
        there.open()
        assert is_right(there)
        assert line.happened.is_set()


def test_a_line_that_stays_broken_is_told_and_leaves_no_copy(large, server, tmp_path):
    with Line(server.port, "cut", bytes_before=600_000) as line:
        there = remote(server.url("large", line.port), tmp_path)
        there.open()
        with pytest.raises(ValueError, match=r"\As3://large/[^\n]*parquet cannot be fetched [^\n]*\Z"):
            noise(there, 0)
        assert not copies(tmp_path)
        line.times = 0
        assert is_right(there)


def test_a_server_that_ends_in_the_middle_is_told_and_another_one_is_read_on(tmp_path, large):
    with serve() as first:
        first.upload(large.folder.parent, "large")
        with Line(first.port, "slow", bytes_before=600_000) as line:
            there = remote(first.url("large", line.port), tmp_path)
            there.open()
            noise(there, 0)
            line.happened.clear()
            killer = in_another_process(lambda: (time.sleep(0.3), os.kill(first.process.pid, signal.SIGKILL)))
            with pytest.raises(ValueError, match="cannot be fetched"):
                is_right(there)
            killer.join(LIMIT_S)
        before = copies(tmp_path)
    assert all(path.stat().st_size > 1 << 20 for path in before)


def test_a_reader_that_is_killed_in_the_middle_leaves_no_half_copy(large, server, tmp_path):
    with Line(server.port, "slow", bytes_before=600_000) as line:
        there = remote(server.url("large", line.port), tmp_path)
        there.open()
        for _ in range(3):
            line.happened.clear()
            reader = in_another_process(noise, there, 0)
            assert line.happened.wait(LIMIT_S)
            os.kill(reader.pid, signal.SIGKILL)
            reader.join(LIMIT_S)
            assert not copies(tmp_path)
        line.times = 0
        assert is_right(there)


def test_the_copies_that_were_not_used_for_longest_are_evicted_but_none_that_is_open(large, tmp_path, monkeypatch):
    monkeypatch.setattr("srpo_lightning.data.store.OPEN_FILES", 2)
    there = remote(f"file://{large.folder.parent}", tmp_path, 8 * MEGABYTE)
    there.open()
    names = {number: there.open().files[int(there.find([key])[0])].name for key, number in LARGE}

    def here() -> set[int]:
        return {number for number, name in names.items() if (there.folder / name).is_file()}

    for number, expected in (
        (0, {0}),
        (1, {0, 1}),
        (2, {0, 1, 2}),
        (3, {0, 1, 2, 3}),
        (0, {0, 1, 2, 3}),
        (4, {0, 2, 3, 4}),
    ):
        noise(there, number)
        assert here() == expected
        time.sleep(0.01)
    other = pickle.loads(pickle.dumps(there))
    noise(other, 2)
    noise(other, 3)
    noise(there, 5)
    assert here() == {0, 2, 3, 4, 5}
    assert is_right(there)


def test_a_limit_below_what_is_open_evicts_nothing_that_is_read(large, tmp_path):
    there = remote(f"file://{large.folder.parent}", tmp_path, 1e-9)
    there.open()
    assert is_right(there)
    assert len(copies(tmp_path)) == len(LARGE)
    there.open()  # which closes them
    there.open()
    assert not copies(tmp_path)


def test_several_processes_share_a_mirror_that_is_too_small_for_all(large, tmp_path, monkeypatch):
    monkeypatch.setattr("srpo_lightning.data.store.OPEN_FILES", 1)
    there = remote(f"file://{large.folder.parent}", tmp_path, 4 * MEGABYTE)
    there.open()

    def read() -> None:
        own = pickle.loads(pickle.dumps(there))
        assert all(is_right(own) for _ in range(3))

    readers = [in_another_process(read) for _ in range(4)]
    for reader in readers:
        reader.join(LIMIT_S)
        assert reader.exitcode == 0
    there.open()  # evicts what was kept while the others had it open
    assert sum(path.stat().st_size for path in copies(tmp_path)) <= 4e6


def test_a_copy_that_was_used_again_stays_where_one_that_was_not_goes(tmp_path):
    names = [f"features-{letter * 32}.parquet" for letter in "abc"]
    (tmp_path / "there" / "store").mkdir(parents=True)
    for name in names:
        (tmp_path / "there" / "store" / name).write_bytes(bytes(1000))
    mirror = Mirror(f"file://{tmp_path / 'there'}", "store", str(tmp_path / "here"), 2500 / GIGABYTE)
    for name in (names[0], names[1], names[0], names[2]):
        os.close(mirror.hold(name, 1000))
        time.sleep(0.02)  # the clock of the file system
    assert {path.name for path in (tmp_path / "here").rglob("*.parquet")} == {names[0], names[2]}
