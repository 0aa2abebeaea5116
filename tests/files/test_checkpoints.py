import itertools
import os
import stat
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict_saver import save

from srpo_lightning.files.checkpoints import (
    INDEX,
    METADATA,
    AtomicCheckpointIO,
    begin_folder,
    check_whole,
    finish_folder,
    remove,
)
from srpo_lightning.files.owners import PARTIAL, partial_path
from srpo_lightning.run_folder import RunFolder
from tests.processes import CONTEXT, LIMIT_S


def save_forever(run: Path) -> None:
    for step in itertools.count():
        saved = {"step": step, "x": torch.full((4_000_000,), step)}
        AtomicCheckpointIO().save_checkpoint(saved, RunFolder(run).checkpoint(step))


def test_what_was_saved_is_what_is_loaded(tmp_path):
    path = RunFolder(tmp_path).checkpoint(7)
    AtomicCheckpointIO().save_checkpoint({"x": torch.arange(3)}, path)
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(path, weights_only=True)["x"], torch.arange(3))
    assert [p.name for p in path.parent.iterdir()] == ["step-00000007.ckpt"]


def test_an_error_in_the_middle_of_writing_leaves_the_older_file_of_that_name_whole(tmp_path, monkeypatch):
    path = RunFolder(tmp_path).checkpoint(1)
    AtomicCheckpointIO().save_checkpoint({"x": 1}, path)

    def fail_half_way(checkpoint, stream):
        stream.write(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("srpo_lightning.files.checkpoints.torch.save", fail_half_way)
        for step in (1, 2):
            with pytest.raises(OSError, match="disk full"):
                AtomicCheckpointIO().save_checkpoint({"x": 2}, RunFolder(tmp_path).checkpoint(step))
    assert RunFolder(tmp_path).find_checkpoint("last", None, "max") == path
    assert torch.load(path, weights_only=True) == {"x": 1}


def test_a_kill_while_writing_leaves_every_checkpoint_whole(tmp_path):
    """SIGKILL at two moments, each seen to be in the middle of a file."""
    for delay_s in (0.0, 0.004):
        run = tmp_path / str(delay_s)
        process = CONTEXT.Process(target=save_forever, args=(run,))
        process.start()
        try:
            deadline = time.monotonic() + LIMIT_S
            while len(RunFolder(run).checkpoints()) < 2 or not list(run.rglob(f"*{PARTIAL}-*")):
                assert time.monotonic() < deadline
                assert process.is_alive()
            time.sleep(delay_s)
        finally:
            process.kill()
            process.join()
        for path in RunFolder(run).checkpoints():
            saved = torch.load(path, weights_only=True)
            assert path == RunFolder(run).checkpoint(saved["step"])
            assert (saved["x"] == saved["step"]).all()


def test_the_newest_is_the_one_with_most_steps_and_partial_files_do_not_count(tmp_path):
    for step in (9, 100, 20):
        AtomicCheckpointIO().save_checkpoint({}, RunFolder(tmp_path).checkpoint(step))
    partial_path(RunFolder(tmp_path).checkpoint(200)).write_bytes(b"half")
    assert RunFolder(tmp_path).find_checkpoint("last", None, "max") == RunFolder(tmp_path).checkpoint(100)
    steps = [path.stem for path in RunFolder(tmp_path).checkpoints()]
    assert steps == ["step-00000009", "step-00000020", "step-00000100"]


def test_no_checkpoint_at_all_is_refused_with_the_cure(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint in .*Point --trainer.default_root_dir"):
        RunFolder(tmp_path).find_checkpoint("last", None, "max")


def test_the_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Order of calls: fsync of the file, rename, fsync of the folder."""
    calls = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("fsync") or fsync(descriptor))
    monkeypatch.setattr(Path, "replace", lambda self, target: calls.append("rename") or replace(self, target))
    AtomicCheckpointIO().save_checkpoint({}, RunFolder(tmp_path).checkpoint(1))
    assert calls == ["fsync", "rename", "fsync"]


def test_a_folder_is_removed_although_a_kill_left_a_part_of_its_removal(tmp_path):
    for folder in (tmp_path / "step-00000001.ckpt", tmp_path / "step-00000001.ckpt.deleted"):
        folder.mkdir()
        (folder / "part").touch()
    remove(tmp_path / "step-00000001.ckpt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_finished_folder_has_the_modes_that_the_umask_says_whoever_wrote_its_files(tmp_path, umask):
    before = os.umask(umask)
    try:
        partial = begin_folder(tmp_path / "out")
        (partial / "ema").mkdir()
        for file in (partial / "a.safetensors", partial / "ema" / "b.safetensors"):
            save_file({"x": torch.zeros(1)}, file)
        finish_folder(partial, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.is_dir(): stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*")}
    assert modes == {True: 0o777 & ~umask, False: 0o666 & ~umask}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.fixture
def sharded(tmp_path) -> Path:
    path = RunFolder(tmp_path).checkpoint(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is one process
        save({"state_dict": {"x": torch.arange(1000), "y": torch.arange(5)}}, checkpoint_id=path, no_dist=True)
    torch.save({"epoch": 0}, path / METADATA)
    return path


def test_whole_checkpoints_pass(sharded):
    check_whole(sharded)
    AtomicCheckpointIO().save_checkpoint({"x": 1}, RunFolder(sharded.parents[1]).checkpoint(2))
    check_whole(RunFolder(sharded.parents[1]).checkpoint(2))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("__0_0.distcp", Path.unlink, "__0_0.distcp is missing, one of the 1 files that hold its tensors"),
        ("__0_0.distcp", cut, r"__0_0.distcp ends after \d+ of \d+ bytes"),
        (INDEX, Path.unlink, f"{INDEX} is missing"),
        (INDEX, cut, f"{INDEX} cannot be read"),
        (METADATA, Path.unlink, f"{METADATA} is missing"),
        (METADATA, cut, f"{METADATA} is cut off"),
    ],
)
def test_a_damaged_part_of_a_sharded_checkpoint_is_named(sharded, name, damage, message):
    damage(sharded / name)
    with pytest.raises(ValueError, match=f"{sharded} is damaged: {message}.* start anew without --ckpt_path"):
        check_whole(sharded)


def test_a_file_that_was_cut_off_is_named_with_the_checkpoints_that_are_whole(tmp_path):
    for step in (1, 2):
        AtomicCheckpointIO().save_checkpoint({"x": torch.arange(1000)}, RunFolder(tmp_path).checkpoint(step))
    path = RunFolder(tmp_path).checkpoint(2)
    cut(path)
    with pytest.raises(ValueError, match=f"{path} is damaged: .* cut off.* resume from one of step-00000001.ckpt"):
        check_whole(path)
