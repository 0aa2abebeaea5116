"""A disk that is full costs a checkpoint and nothing that was whole; a run goes on when there is room again."""

import errno
import json
import os

import pytest
import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from srpo_lightning.cli import main
from srpo_lightning.errors import one_line
from srpo_lightning.files import checkpoints as writing
from srpo_lightning.files import records
from srpo_lightning.files.checkpoints import complete_or_absent, complete_or_absent_folder
from srpo_lightning.files.full_disk import FullDiskError, is_full
from srpo_lightning.run_folder import RunFolder
from tests import tiny
from tests.kill.test_kill import assert_equal
from tests.refusals import refused

NO_ROOM = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_from_what_libraries_make_of_it():
    """torch.save's own error hides the system's, safetensors has its words alone, of other ranks there is a list."""
    of_torch = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    of_torch.__context__ = NO_ROOM
    of_safetensors = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    of_ranks = CheckpointException("write", {1: (NO_ROOM, None)})
    for error in (NO_ROOM, OSError(errno.EDQUOT, "quota"), of_torch, of_safetensors, of_ranks):
        assert is_full(error)
        assert "make room" in one_line(error)
    assert not is_full(OSError(errno.EIO, "Input/output error"))
    assert not is_full(ValueError("no room for doubt"))


@pytest.mark.parametrize("kind", [complete_or_absent, complete_or_absent_folder])
def test_nothing_is_left_of_what_finds_no_room(tmp_path, kind):
    def write() -> None:
        with kind(tmp_path / "out") as partial:
            (partial / "part" if partial.is_dir() else partial).write_bytes(b"half")
            raise NO_ROOM

    told = f"the disk is full, {tmp_path}/out has no room in the .* GiB that are free, .*: make room .*ckpt_path last"
    with pytest.raises(FullDiskError, match=told):
        write()
    assert not list(tmp_path.iterdir())


def test_records_that_find_no_room_are_as_before(tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    records.append(path, {"step": 0})

    def fail(descriptor: int) -> None:
        path.write_bytes(path.read_bytes()[:-3])
        raise NO_ROOM

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(FullDiskError, match="make room"):
            records.append(path, {"step": 1})
    records.append(path, {"step": 2})
    assert records.read(path) == [{"step": 0}, {"step": 2}]


@pytest.fixture
def config(models, features, tmp_path):
    settings = tiny.config(models, tmp_path / "run", features)
    settings["checkpoint"] = {"every_n_steps": 1, "keep": 9}
    settings["trainer"] |= {"limit_val_batches": 0, "callbacks": settings["trainer"]["callbacks"][:1]}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))
    return str(path)


def without_room(monkeypatch, *calls: int) -> None:
    """The disk is full in the middle of these checkpoints, by their numbers."""
    save, count = torch.save, iter(range(1, 99))

    def fill(checkpoint, stream) -> None:
        if next(count) in calls:
            stream.write(b"half a checkpoint")
            raise NO_ROOM
        save(checkpoint, stream)

    monkeypatch.setattr(writing.torch, "save", fill)


def test_training_goes_on_without_a_checkpoint_that_finds_no_room(config, tmp_path, monkeypatch):
    without_room(monkeypatch, 1, 3)
    with pytest.warns(UserWarning, match="training goes on without a checkpoint of step [13]: the disk is full, .*"):
        main(["fit", "--config", config])
    run = tmp_path / "run"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {f"step-0000000{n}.ckpt" for n in (2, 4)}


def test_a_last_checkpoint_without_room_is_one_line_and_the_run_goes_on_to_the_same_end(
    config, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    main(["fit", "--config", config, "--trainer.default_root_dir", str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        without_room(patch, 3, 4, 5, 6)
        with pytest.warns(UserWarning, match="without a checkpoint of step [34]"):
            refused(["fit", "--config", config], f"{RunFolder(run).checkpoint(4)} has no room in", capsys)
    assert list((run / "checkpoints").iterdir()) == RunFolder(run).checkpoints()
    assert RunFolder(run).checkpoints()[-1] == RunFolder(run).checkpoint(2)
    main(["fit", "--config", config, "--ckpt_path", "last"])
    a, b = (torch.load(RunFolder(tmp_path / name).checkpoint(4), weights_only=True) for name in ("whole", "run"))
    for part in ("state_dict", "optimizer_states", "ema", "srpo", "PromptData"):
        assert_equal(a[part], b[part], part)
