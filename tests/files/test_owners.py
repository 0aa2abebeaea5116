"""One process trains in a run folder; what another is writing, or has left there, is told apart by host and process."""

import errno
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from srpo_lightning.files import owners
from srpo_lightning.files.checkpoints import begin_folder, complete_or_absent
from srpo_lightning.files.owners import LOCK, PARTIAL, Owner, partial_path, run_lock, this_process
from srpo_lightning.run_folder import RunFolder
from tests import processes, tiny
from tests.refusals import refused

HERE = socket.gethostname()


def lock(folder: Path, owner: Owner) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(owner._asdict()))
    return folder / LOCK


def ended() -> int:
    """The number of a process that is no more."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


@pytest.fixture
def other():
    """A process that does nothing."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def owner_of(process: subprocess.Popen) -> Owner:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getpid", lambda: process.pid)
        return this_process()


def test_a_folder_is_held_while_a_run_lasts_and_given_back_by_an_error_and_by_sigterm(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with run_lock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run").exists()  # nothing was written
    with pytest.raises(RuntimeError, match="stop"), run_lock(tmp_path):
        raise RuntimeError("stop")
    with pytest.raises(SystemExit) as left, run_lock(tmp_path):
        signal.raise_signal(signal.SIGTERM)
    assert left.value.code == 143
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == before


def test_fit_in_a_folder_in_which_another_process_trains_is_refused(models, features, tmp_path, other, capsys):
    run = tmp_path / "run"
    config = str(tiny.write_config(models, run, features))
    path = lock(run, owner_of(other))
    told = f"process {other.pid} on host {HERE} has been training in .*: wait for it, or name another folder"
    message = refused(["fit", "--config", config], told, capsys)
    assert "delete" not in message
    lock(run, Owner("elsewhere", os.getpid(), 0.0, "yesterday"))
    refused(["fit", "--config", config], f"on host elsewhere .*; if that process is no more, delete {path}", capsys)
    path.write_text("")
    refused(["fit", "--config", config], "says of no process: if nothing trains in this folder, delete it", capsys)
    assert [left.name for left in run.iterdir()] == [LOCK]


@pytest.mark.parametrize("end", ["killed", "gone", "another of its number"])
def test_the_lock_of_a_process_that_is_gone_is_taken_over_in_one_line(tmp_path, other, end, caplog):
    """Also while its parent has not asked for its status yet."""
    held = owner_of(other)
    if end == "another of its number":
        held = held._replace(started_s=held.started_s - 60)
    else:
        other.kill()
        if end == "gone":
            other.wait()
        else:
            os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    path = lock(tmp_path, held)
    with caplog.at_level("INFO"), run_lock(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert [r.message for r in caplog.records] == [
        f"{tmp_path}: process {held.pid}, which trained in it since {held.since}, is gone"
    ]


def hold(folder: Path, has_begun, may_end) -> None:
    """Look for long at a lock before it is taken over, so that others look meanwhile."""
    look = owners._started_s
    owners._started_s = lambda pid: time.sleep(0.3) or look(pid)
    try:
        with run_lock(folder):
            has_begun.put(os.getpid())
            may_end.wait()
    except ValueError as error:
        has_begun.put(str(error))


def test_of_processes_that_find_the_lock_of_a_dead_one_at_once_one_gets_it(tmp_path):
    lock(tmp_path, Owner(HERE, ended(), 0.0, "yesterday"))
    found, may_end = processes.CONTEXT.Queue(), processes.CONTEXT.Event()
    ranks = [processes.CONTEXT.Process(target=hold, args=(tmp_path, found, may_end)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    outcomes = [found.get() for _ in ranks]
    may_end.set()
    for rank in ranks:
        rank.join()
    (holder,) = [outcome for outcome in outcomes if isinstance(outcome, int)]
    assert all(f"process {holder} on host" in outcome for outcome in outcomes if outcome != holder)


def test_who_holds_the_folder_removes_what_others_left_unfinished(tmp_path, other):
    """Among checkpoints all, since nobody else writes any; elsewhere what surely nobody is writing."""
    checkpoint, table = RunFolder(tmp_path).checkpoint(2), tmp_path / "tables" / "base.safetensors"
    for folder in (checkpoint.parent, table.parent):
        folder.mkdir()
    (checkpoint.parent / f"step-00000001.ckpt{PARTIAL}-elsewhere-1").mkdir()
    (checkpoint.parent / "step-00000001.ckpt.deleted").mkdir()
    kept = [checkpoint, table, *(Path(f"{table}{PARTIAL}-{who}") for who in ("elsewhere-1", f"{HERE}-{other.pid}"))]
    for path in (*kept, Path(f"{checkpoint}{PARTIAL}"), Path(f"{table}{PARTIAL}-{HERE}-{ended()}")):
        path.touch()
    with RunFolder(tmp_path).lock():
        pass
    assert {path for path in tmp_path.rglob("*") if not path.is_dir()} == set(kept)


def test_a_run_in_a_folder_below_keeps_what_it_is_writing(tmp_path, other):
    writing = RunFolder(tmp_path / "below").checkpoint(3)
    writing = writing.with_name(f"{writing.name}{PARTIAL}-{HERE}-{other.pid}")
    writing.mkdir(parents=True)
    with RunFolder(tmp_path).lock():
        pass
    assert writing.is_dir()


def test_a_lock_that_finds_no_room_is_nobodys_lock(tmp_path, monkeypatch):
    def no_room(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("srpo_lightning.files.owners.json.dump", no_room)
        with pytest.raises(OSError, match="No space left"), run_lock(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_made_a_moment_ago_is_asked_again(tmp_path, other, monkeypatch):
    path = tmp_path / LOCK
    path.touch()
    monkeypatch.setattr(time, "sleep", lambda _: lock(tmp_path, owner_of(other)))
    with pytest.raises(ValueError, match=f"process {other.pid} on host {HERE} has been training"), run_lock(tmp_path):
        pass


def test_two_processes_never_write_to_the_same_unfinished_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    with complete_or_absent(path) as mine:
        mine.write_text("mine")
        for host, pid in ((HERE, ended()), ("elsewhere", os.getpid())):
            monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
            monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
            with complete_or_absent(path) as theirs:
                theirs.write_text("theirs")
            assert path.read_text() == "theirs"
    assert path.read_text() == "mine"
    assert [left.name for left in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_begun_takes_away_what_dead_processes_began(tmp_path, other):
    kept = tmp_path / f"out{PARTIAL}-{HERE}-{other.pid}"
    for left in (kept, tmp_path / f"out{PARTIAL}-{HERE}-{ended()}", partial_path(tmp_path / "out")):
        left.mkdir()
        (left / "half").touch()
    own = begin_folder(tmp_path / "out")
    assert not list(own.iterdir())
    assert set(tmp_path.iterdir()) == {own, kept}
