"""A disk that is full, or a quota that is used up: told from what libraries raise then, and said in one line."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
WORDS = tuple(os.strerror(number) for number in FULL)
GIB = 1 << 30
CURE = "make room (a run that has ended goes on with --ckpt_path last)"


class FullDiskError(ValueError):
    """What was to be written has no room; nothing of it is left."""


def is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error; torch and safetensors raise errors of their own in its place."""
    if error is None:
        return False
    if getattr(error, "errno", None) in FULL or any(words in str(error) for words in WORDS):
        return True
    of_ranks = [own for own, *_ in getattr(error, "failures", {}).values()]  # of torch.distributed.checkpoint
    return any(is_full(other) for other in (error.__cause__, error.__context__, *of_ranks))


def told(path: Path) -> str:
    """What a user is told, and what to do."""
    free = shutil.disk_usage(path.parent).free / GIB
    return f"the disk is full, {path} has no room in the {free:.2f} GiB that are free, or a quota is used up: {CURE}"


@contextmanager
def room_for(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Leave nothing of what finds no room.

    Args:
        path: File or folder that the message names.
        partial: File or folder that is written to, and removed if there is no room.

    Raises:
        FullDiskError: in the place of whatever a full disk makes others raise.
    """
    try:
        yield
    except Exception as error:
        is_told = isinstance(error, FullDiskError)
        if not is_told and not is_full(error):
            raise
        if partial is not None and partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        elif partial is not None:
            partial.unlink(missing_ok=True)
        if is_told:
            raise
        raise FullDiskError(told(path)) from error
