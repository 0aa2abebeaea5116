"""Checkpoints that are there whole or not at all."""

import os
import pickle
import shutil
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.load import _METADATA_FILENAME
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner

from srpo_lightning.files.full_disk import room_for
from srpo_lightning.files.owners import PARTIAL, discard, is_left, partial_path
from srpo_lightning.files.pretrained import UNPICKLING, check_archive
from srpo_lightning.files.sharded_checkpoint import (
    INDEX,
    SUMS,
    SafeReader,
    TensorsOnly,
    damage,
    foreign_object,
    read_alone,
)

METADATA = _METADATA_FILENAME  # where Lightning looks for what of a sharded checkpoint is no tensor


def check_whole(path: Path, content: bool = True) -> None:
    """Refuse a checkpoint that is damaged, or holds more than tensors, numbers and texts, before anything is read.

    Args:
        path: File of a checkpoint, or folder of a sharded one.
        content: Whether to compare the sums of all bytes, at about 2 GB a second; otherwise names and sizes.

    Raises:
        ValueError: naming the file, and the checkpoints that there are instead.
    """
    found = _damage_of_folder(path, content) if path.is_dir() else _damage_of_file(path, content)
    if found is None:
        return
    others = sorted(other.name for other in path.parent.glob("*.ckpt") if other != path)
    cure = f"resume from one of {', '.join(others)} beside it" if others else "start anew without --ckpt_path"
    raise ValueError(f"checkpoint {path} is damaged: {found}. Copy it again from where it was written, or {cure}")


def _damage_of_folder(path: Path, content: bool) -> str | None:
    for name in (INDEX, METADATA):
        if not (path / name).is_file():
            return f"{name} is missing"
    if (found := damage(path, content)) is not None:
        return found
    try:
        stored = SafeReader(path).read_metadata().storage_data
    except ValueError as error:
        return str(error)
    sizes: dict[str, int] = {}
    for tensor in stored.values():
        sizes[tensor.relative_path] = max(sizes.get(tensor.relative_path, 0), tensor.offset + tensor.length)
    for name, size in sizes.items():
        if not (path / name).is_file():
            return f"{name} is missing, one of the {len(sizes)} files that hold its tensors"
        if (actual := (path / name).stat().st_size) < size:
            return f"{name} ends after {actual} of {size} bytes"
    if content and (foreign := foreign_object(path)) is not None:
        return f"{foreign} in it is more than tensors, numbers and texts"
    if not (path / SUMS).is_file():
        rank_zero_info(f"{path} has no {SUMS}, as an earlier version wrote it: its tensors are not compared with sums")
    return _damage_of_file(path / METADATA, content)


def _damage_of_file(path: Path, content: bool) -> str | None:
    # torch.save writes a zip archive, whose list of contents is at its end.
    try:
        if not zipfile.is_zipfile(path):
            return f"{path.name} is cut off, or no file of torch.save"
        if content:
            check_archive(path)
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # reads what is no tensor
    except pickle.UnpicklingError:
        return f"{path.name} holds more than tensors, numbers and texts"
    except (OSError, *UNPICKLING) as error:
        return f"{path.name} cannot be read ({next(iter(str(error).splitlines()), type(error).__name__)})"
    return None


def remove(path: Path) -> None:
    """Delete a checkpoint, at no moment leaving a part of it under its name."""
    gone = path.with_name(path.name + ".deleted")
    shutil.rmtree(gone, ignore_errors=True)  # what a kill in here has left
    path.rename(gone)
    if gone.is_dir():
        shutil.rmtree(gone)
    else:
        gone.unlink()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the final name, flushes to the disk, then renames.

    A kill at any moment leaves the checkpoint complete or absent. Nothing is pickled into a buffer first. A sharded
    checkpoint is read whole, so that a run on several ranks can go on in one process.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`, complete or absent."""
        path = Path(path)
        with complete_or_absent(path) as partial:
            with partial.open("wb") as stream:
                torch.save(checkpoint, stream)
            if path.is_dir():  # an earlier run's, on several ranks
                remove(path)
        sync(path.parent)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a file, or gather a sharded checkpoint."""
        if Path(path).is_dir():
            return gathered(Path(path))
        # Lightning's own place for tensors is a function, which torch does not take for 8-bit optimizer states.
        return super().load_checkpoint(path, *args, **{"map_location": "cpu"} | kwargs)


class _Everything(TensorsOnly, _EmptyStateDictLoadPlanner):  # public is only dcp_to_torch_save, which unpickles
    """All that a folder holds, without asking for it by name."""


def gathered(path: Path) -> dict[str, Any]:
    """A sharded checkpoint as one process would have written it."""
    checkpoint: dict[str, Any] = torch.load(path / METADATA, weights_only=True)
    read_alone({}, SafeReader(path), planner := _Everything())
    sharded = planner.original_state_dict
    optimizers = [sharded.pop(key) for key in sorted(sharded) if key.startswith("optimizer_")]
    return checkpoint | sharded | {"optimizer_states": [_numbered(state) for state in optimizers]}


def _numbered(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state by the numbers of its parameters instead of their names."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    number = {name: i for i, name in enumerate(names)}
    groups = [group | {"params": [number[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {number[name]: own for name, own in state["state"].items()}, "param_groups": groups}


@contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """A name beside a file's own to write to, which becomes it when it is on the disk; each process has one of its own.

    What fails leaves nothing.

    Raises:
        FullDiskError: in one line, where there is no room.
    """
    partial = partial_path(path)
    try:
        with room_for(path, partial):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            sync(partial)
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def complete_or_absent_folder(path: Path) -> Iterator[Path]:
    """The same for a folder, which stays to be looked at if what is done in it fails for another reason than room."""
    partial = partial_path(path)
    with room_for(path, partial):
        yield begin_folder(path)
        finish_folder(partial, path)


def begin_folder(path: Path) -> Path:
    """An empty folder beside the final name, this process's own, for what `finish_folder` is to put there."""
    partial = partial_path(path)
    beside = path.parent.glob(f"{escape(path.name)}{PARTIAL}-*")
    for left in [partial, *(other for other in beside if is_left(other))]:
        discard(left)
    partial.mkdir(parents=True)
    return partial


def finish_folder(partial: Path, path: Path) -> None:
    """Flush a folder that is whole now, and give it its name; all whom the umask lets read it can."""
    readable = stat.S_IMODE(partial.stat().st_mode) & 0o666
    for written in filter(Path.is_file, partial.rglob("*")):
        if stat.S_IMODE(written.stat().st_mode) != readable:  # safetensors writes for its owner alone
            with suppress(OSError):  # a file system without modes
                written.chmod(readable)
    for written in [*partial.rglob("*"), partial]:
        sync(written)
    if path.exists():
        remove(path)
    partial.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
