"""Checkpoints that come from elsewhere, or were damaged: nothing in them runs, and nothing is taken silently."""

import io
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from srpo_lightning.files.checkpoints import METADATA, AtomicCheckpointIO, check_whole, gathered
from srpo_lightning.files.sharded_checkpoint import INDEX, SafeReader, sums_of, write_sums
from srpo_lightning.run_folder import RunFolder
from tests import tiny
from tests.refusals import refused

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # that is how one process saves

CONTENT = {"state_dict": {"a": torch.arange(2560.0).view(40, 64)}, "number": 0.5}
REST = {"global_step": 3, "srpo": {"micro_step": 3, "policy": "p"}}


class Touch:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def write_folder(folder: Path) -> Path:
    """A sharded checkpoint as one rank writes it."""
    save(CONTENT, checkpoint_id=folder, no_dist=True)
    torch.save(REST, folder / METADATA)
    write_sums(folder, sums_of(file for file in folder.iterdir()))
    return folder


def write_file(path: Path) -> Path:
    AtomicCheckpointIO().save_checkpoint(CONTENT | REST, path)
    return path


def seal(folder: Path) -> None:
    """Sums that fit: what is foreign need not be damaged."""
    (folder / "sums.json").unlink()
    write_sums(folder, sums_of(file for file in folder.iterdir()))


def poison_list(folder: Path, mark: Path) -> None:
    found = FileSystemReader(folder).read_metadata()
    found.planner_data = {"a": Touch(mark)}
    (folder / INDEX).write_bytes(pickle.dumps(found))


def poison_object(folder: Path, mark: Path) -> None:
    """What is no tensor lies in the file of tensors, as a pickle."""
    found = FileSystemReader(folder).read_metadata()
    place = next(own for index, own in found.storage_data.items() if index.fqn == "number")
    stream = io.BytesIO()
    torch.save(Touch(mark), stream)
    path = folder / place.relative_path
    whole = path.read_bytes()
    place.offset, place.length = len(whole), len(stream.getvalue())
    path.write_bytes(whole + stream.getvalue())
    (folder / INDEX).write_bytes(pickle.dumps(found))


def poison_rest(folder: Path, mark: Path) -> None:
    torch.save(REST | {"srpo": Touch(mark)}, folder / METADATA)


def read(folder: Path) -> None:
    check_whole(folder)
    gathered(folder)


@pytest.mark.parametrize("poison", [poison_list, poison_object, poison_rest])
def test_nothing_in_a_foreign_folder_runs(tmp_path, poison):
    folder, mark = write_folder(tmp_path / "step-00000001.ckpt"), tmp_path / "mark"
    poison(folder, mark)
    seal(folder)
    with pytest.raises(ValueError, match=r"names pathlib|more than tensors, numbers and texts"):
        read(folder)
    assert not mark.exists()


@pytest.mark.parametrize("command", ["fit", "validate", "predict", "export"])
@pytest.mark.parametrize("poison", [poison_list, poison_rest, None])
def test_no_command_runs_what_a_foreign_checkpoint_holds(models, features, tmp_path, capsys, command, poison):
    run, mark = tmp_path / "run", tmp_path / "mark"
    config = str(tiny.write_config(models, run, features))
    path = RunFolder(run).checkpoint(1)
    path.parent.mkdir(parents=True)
    if poison is None:
        torch.save({"srpo": Touch(mark)}, path)
    else:
        poison(write_folder(path), mark)
        seal(path)
    output = ["--output", str(tmp_path / "out")] if command == "export" else []
    message = refused([command, "--config", config, "--ckpt_path", "last", *output], str(path), capsys)
    assert "\n" not in message
    assert not mark.exists()


def test_a_list_that_names_a_file_elsewhere_is_refused(tmp_path):
    folder = write_folder(tmp_path / "step-00000001.ckpt")
    found = FileSystemReader(folder).read_metadata()
    next(iter(found.storage_data.values())).relative_path = "../elsewhere"
    (folder / INDEX).write_bytes(pickle.dumps(found))
    seal(folder)
    with pytest.raises(ValueError, match=r"names '\.\./elsewhere', which is no file in it"):
        check_whole(folder)


@pytest.mark.parametrize(
    "place", [("x", 0, "much"), ("x", None, 1), ("x", -5, 2), (5, 0, 1), ("x", 0, 1 << 60)], ids=str
)
@pytest.mark.parametrize("name", ["a", "b"])
def test_a_list_of_an_earlier_version_whose_places_are_damaged_is_refused_by_name(tmp_path, place, name):
    """It has no sums."""
    path = tmp_path / "checkpoints" / "step-00000001.ckpt"
    path.mkdir(parents=True)
    stored = {MetadataIndex("a"): _StorageInfo(*place)}
    (path / INDEX).write_bytes(pickle.dumps(Metadata({name: BytesStorageMetadata()}, storage_data=stored)))
    (path / "x").write_bytes(b"123")
    torch.save({}, path / METADATA)
    with pytest.raises(ValueError, match=rf"^checkpoint {path} is damaged: (\{INDEX}|x) .*, or start anew without"):
        check_whole(path)


def test_a_list_of_tensors_is_read_as_torch_reads_it(tmp_path):
    folder = write_folder(tmp_path / "a")
    ours, theirs = SafeReader(folder).read_metadata(), FileSystemReader(folder).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert torch.equal(gathered(folder)["state_dict"]["a"], CONTENT["state_dict"]["a"])


def is_same(path: Path) -> bool:
    """Whether what is read is what was written."""
    found = gathered(path) if path.is_dir() else torch.load(path, weights_only=True)
    return torch.equal(found["state_dict"]["a"], CONTENT["state_dict"]["a"]) and found["srpo"] == REST["srpo"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_no_flipped_bit_and_no_cut_is_taken_silently(tmp_path, kind):
    """200 flips and 50 cuts: refused by name, or, in what the archive does not need, the same content."""
    whole = (write_file if kind == "file" else write_folder)(tmp_path / "checkpoints" / "step-00000001.ckpt")
    chance, harmless = random.Random(0), 0
    for number in range(250):
        path = tmp_path / "checkpoints" / "step-00000002.ckpt"
        (shutil.copyfile if kind == "file" else shutil.copytree)(whole, path)
        files = [path] if kind == "file" else sorted(path.iterdir())
        file = chance.choices(files, [own.stat().st_size for own in files])[0]
        content = bytearray(file.read_bytes())
        if number < 200:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        else:
            del content[chance.randrange(len(content)) :]
        file.write_bytes(content)
        try:
            check_whole(path)
        except ValueError as error:
            assert f"checkpoint {path} is damaged" in str(error)  # noqa: PT017  # both ends are looked at
            assert "resume from one of step-00000001.ckpt beside it" in str(error)  # noqa: PT017
        else:
            assert is_same(path), (number, file.name)
            harmless += 1
        (path.unlink if kind == "file" else lambda path=path: shutil.rmtree(path))()
    assert harmless <= (30 if kind == "file" else 0)
