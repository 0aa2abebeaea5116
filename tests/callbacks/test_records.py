"""A run's records hold each step once, however often the run was killed, and whatever a kill or a disk did to files."""

import random

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from srpo_lightning.callbacks import RewardTracking, RunCheckpoint, SampleLogger
from srpo_lightning.files import records
from srpo_lightning.rewards import ClipReward
from srpo_lightning.run_folder import RunFolder
from tests import tiny
from tests.faults import Stop


def fit(models, features, run, *faults, **settings) -> None:
    callbacks = [
        SampleLogger(num_samples=1, max_share=1.0),
        RewardTracking(ClipReward(str(models.judge))),
        *faults,
        RunCheckpoint(2),
    ]
    validated = {"num_sanity_val_steps": -1, "val_check_interval": 1, "limit_val_batches": 1}
    ckpt_path = settings.pop("ckpt_path", None)
    tiny.new_trainer(run, callbacks, **validated | {"max_steps": 4} | settings).fit(
        tiny.new_module(models), tiny.new_data(models, features), ckpt_path=ckpt_path
    )


def recorded(run) -> list[list]:
    """The steps of both files, of the policy's weights."""
    both = (records.read(path) for path in (RunFolder(run).metrics, RunFolder(run).samples.metadata))
    return [[r["step"] for r in own if r["weights"] == "policy"] for own in both]


def test_a_resumed_run_goes_on_from_the_records_up_to_its_checkpoint(models, features, tmp_path):
    """Killed after the evaluation of step 3, of which there is no checkpoint."""
    fit(models, features, tmp_path, max_steps=3)
    RunFolder(tmp_path).checkpoint(3).unlink()
    assert recorded(tmp_path) == [[0, 1, 2, 3]] * 2
    fit(models, features, tmp_path, ckpt_path=RunFolder(tmp_path).checkpoint(2))
    assert recorded(tmp_path) == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize(("num_sanity_val_steps", "steps"), [(-1, [0, 1]), (0, [1])])
def test_a_run_that_begins_leaves_out_what_one_without_a_checkpoint_has_written(
    models, features, tmp_path, num_sanity_val_steps, steps
):
    with pytest.raises(RuntimeError, match="stopped by the test"):
        fit(models, features, tmp_path, Stop(2))
    assert recorded(tmp_path) == [[0, 1]] * 2
    RunFolder(tmp_path).checkpoint(1).unlink(missing_ok=True)
    fit(models, features, tmp_path, max_steps=1, num_sanity_val_steps=num_sanity_val_steps)
    assert recorded(tmp_path) == [steps] * 2


@pytest.mark.parametrize("end", "\u2028\u2029\x85\v\f\r\x1c\x1d\x1e")
def test_letters_that_python_takes_for_the_end_of_a_line_stay_in_a_record(tmp_path, end):
    path = tmp_path / "records.jsonl"
    for step in (0, 1):
        records.append(path, {"step": step, "prompt": f"two{end}lines"})
    records.drop_after(path, 0)
    assert records.read(path) == [{"step": 0, "prompt": f"two{end}lines"}]


def test_records_are_dropped_by_their_steps_and_the_file_with_the_last(tmp_path):
    path = tmp_path / "records.jsonl"
    for step in (0, 3, 1, 2):
        records.append(path, {"step": step, "word": "na\u00efve"})
    records.drop_after(path, 1)
    assert records.read(path) == [{"step": step, "word": "na\u00efve"} for step in (0, 1)]
    records.drop_after(path, -1)
    assert not list(tmp_path.iterdir())


def test_a_line_separator_of_unicode_in_a_prompt_ends_no_line(tmp_path):
    path, prompt = tmp_path / "records.jsonl", "a\u2028b\u0085c\x0bd"
    records.append(path, {"step": 0, "prompt": prompt}, {"step": 1})
    assert records.read(path) == [{"step": 0, "prompt": prompt}, {"step": 1}]


@pytest.mark.parametrize("tail", [b'{"step": 2, "wei', b"\0\0\0", b'{"step": 2}'])
def test_an_unfinished_last_line_is_none_and_the_next_takes_its_place(tmp_path, tail):
    path = tmp_path / "records.jsonl"
    records.append(path, {"step": 0}, {"step": 1})
    with path.open("ab") as stream:
        stream.write(tail)
    assert records.read(path) == [{"step": 0}, {"step": 1}]
    records.append(path, {"step": 3})
    assert records.read(path) == [{"step": 0}, {"step": 1}, {"step": 3}]
    with path.open("ab") as stream:
        stream.write(tail)
    records.drop_after(path, 3)
    assert path.read_bytes() == b'{"step": 0}\n{"step": 1}\n{"step": 3}\n'


@pytest.mark.parametrize("line", [b'{"step": 1', b"[1]", b'{"steq": 1}', b'{"step": "1"}', b"", b"\xff"])
def test_a_damaged_line_is_refused_by_file_and_number(tmp_path, line):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match=f"^line 2 of {path} is no record of a step: delete that line"):
        records.drop_after(path, 5)


def test_a_resumed_run_mends_what_is_torn_measures_the_base_again_and_ends_like_the_unbroken_one(
    models, features, tmp_path
):
    """Cut: both files of records, the base's table, and a picture of step 0, which is not there in the sheets."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for run, max_steps in ((whole, 4), (torn, 2)):
        fit(models, features, run, max_steps=max_steps)
    own, chance = RunFolder(torn), random.Random(0)
    base, measured = own.base_table, own.read_base().columns
    for path in (base, own.metrics, own.samples.metadata, own.samples.picture(0, "policy", 0)):
        if path.suffix == ".jsonl":
            records.append(path, {"step": 3, "of": "a run that was killed"})
        path.write_bytes(path.read_bytes()[: -chance.randint(1, 20)])
    again = pytest.warns(UserWarning, match=f"table {base} is damaged, .*: it is measured again")
    with again, pytest.warns(UserWarning, match="00000.png is damaged: its place stays empty"):
        fit(models, features, torn, ckpt_path=RunFolder(torn).checkpoint(2), logger=TensorBoardLogger(torn))
    assert recorded(torn) == recorded(whole) == [[0, 1, 2, 3, 4]] * 2
    for name, column in own.read_base().columns.items():
        torch.testing.assert_close(column, measured[name], rtol=0, atol=1e-6)
