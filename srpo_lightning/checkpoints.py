"""Checkpoints that are there whole or not at all, and finding the newest one."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

FOLDER = "checkpoints"
SUFFIX = ".ckpt"
PARTIAL = ".partial"
METADATA = "meta.pt"  # of a sharded checkpoint: what is no tensor of a parameter's shape


def checkpoint_path(run_folder: str | Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return Path(run_folder) / FOLDER / f"step-{step:08d}{SUFFIX}"


def checkpoints(run_folder: str | Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted((Path(run_folder) / FOLDER).glob(f"step-*{SUFFIX}"))


def newest(run_folder: str | Path) -> Path:
    """The newest whole checkpoint.

    Raises:
        ValueError: if there is none; a run never starts from scratch where it was asked to resume.
    """
    found = checkpoints(run_folder)
    if not found:
        raise ValueError(
            f"--ckpt_path last: no checkpoint in {Path(run_folder) / FOLDER}. "
            "Point --trainer.default_root_dir at the run to resume, or leave --ckpt_path away to start anew"
        )
    return found[-1]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the final name, flushes to the disk, then renames.

    A kill at any moment leaves the checkpoint complete or absent. Nothing is pickled into a buffer first.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`, complete or absent."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + PARTIAL)
        with partial.open("wb") as stream:
            torch.save(checkpoint, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
