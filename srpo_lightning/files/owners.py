"""Which process a file belongs to: the lock of a run folder, and names of unfinished files that no two processes share.

Both say host and process, so that they work on file systems that several machines share, and a person can find out.
"""

import fcntl
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from lightning.pytorch.utilities import rank_zero_info

LOCK = "run.lock"
PARTIAL = ".partial"
TOLERANCE_S = 2.0  # of a process's start, which is counted from the machine's, whose clock is set now and then

BEGINNING_S = 1.0  # a process that has made a lock has said in it by then who it is


class Owner(NamedTuple):
    """A process, on whatever machine.

    Args:
        host: Name of the machine.
        pid: Number of the process there.
        started_s: Start of the process, in seconds after the machine's: process numbers come again.
        since: Start of the process as people write it.
    """

    host: str
    pid: int
    started_s: float
    since: str

    @property
    def is_gone(self) -> bool:
        """Whether it has surely ended; of another machine's process nobody knows."""
        found = _started_s(self.pid) if self.host == socket.gethostname() else self.started_s
        return found is None or abs(found - self.started_s) > TOLERANCE_S


def this_process() -> Owner:
    """The one that asks."""
    started_s = _started_s(os.getpid())
    assert started_s is not None
    return Owner(socket.gethostname(), os.getpid(), started_s, time.strftime("%Y-%m-%d %H:%M:%S"))


def _started_s(pid: int) -> float | None:
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:  # it has ended, and its parent has not asked how
            return None
        return process.create_time() - psutil.boot_time()
    except psutil.NoSuchProcess:
        return None


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Be the only process that trains in a run folder, for as long as it lasts; SIGTERM ends it as an error does.

    Raises:
        ValueError: if another process holds it, naming that, and the cure.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path, own = folder / LOCK, this_process()
    before = _on_sigterm(_leave)
    try:
        while not _begin(path, own) and _held_by(path) != own:
            _take_over(path, own)
        yield
    finally:
        _on_sigterm(before)
        if _held_by(path) == own:
            path.unlink()
        if is_new:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _begin(path: Path, own: Owner) -> bool:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump(own._asdict(), stream)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:  # a full disk: it would be a lock of nobody's
        path.unlink(missing_ok=True)
        raise
    return True


def _take_over(path: Path, own: Owner) -> None:
    """Put this process in the place of one that is gone; two that try at once are on one machine, and take turns."""
    try:
        stream = path.open(encoding="utf-8")
    except FileNotFoundError:
        return  # given back a moment ago
    with stream:
        with suppress(OSError):  # a file system without it: two processes would have to be in this very moment
            fcntl.flock(stream, fcntl.LOCK_EX)
        if not path.exists() or path.stat().st_ino != os.fstat(stream.fileno()).st_ino:
            return  # somebody else's turn was first
        held = _read(stream.read())
        if held is None:  # perhaps it was made a moment ago
            time.sleep(BEGINNING_S)
            held = _held_by(path)
        if held is None:
            raise ValueError(f"{path} says of no process: if nothing trains in this folder, delete it")
        if not held.is_gone:
            cure = "" if held.host == own.host else f"; if that process is no more, delete {path}"
            raise ValueError(
                f"process {held.pid} on host {held.host} has been training in {path.parent} since {held.since}: wait "
                f"for it, or name another folder with --trainer.default_root_dir{cure}"
            )
        mine = partial_path(path)
        mine.write_text(json.dumps(own._asdict()), encoding="utf-8")
        mine.replace(path)
    rank_zero_info(f"{path.parent}: process {held.pid}, which trained in it since {held.since}, is gone")


def _held_by(path: Path) -> Owner | None:
    try:
        return _read(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _read(text: str) -> Owner | None:
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _leave(*_: Any) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _on_sigterm(handler: Any) -> Any:
    is_main = threading.current_thread() is threading.main_thread()
    return signal.signal(signal.SIGTERM, handler) if is_main and handler is not None else None


def partial_path(path: Path) -> Path:
    """The name beside a file's own that this process alone writes to."""
    return path.with_name(f"{path.name}{PARTIAL}-{socket.gethostname()}-{os.getpid()}")


def is_left(path: Path) -> bool:
    """Whether the process that an unfinished file is named by has ended."""
    host, _, pid = path.name.rpartition(f"{PARTIAL}-")[2].rpartition("-")
    return pid.isdecimal() and host == socket.gethostname() and _started_s(int(pid)) is None


def discard(path: Path) -> None:
    """Remove a file or a folder, or what is left of it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
