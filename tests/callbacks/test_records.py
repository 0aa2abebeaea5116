"""A run's records hold each step once, however often the run was killed."""

import pytest

from srpo_lightning.callbacks import RewardTracking, RunCheckpoint, SampleLogger, records
from srpo_lightning.callbacks.samples import METADATA, SAMPLES
from srpo_lightning.callbacks.tracking import FILE
from srpo_lightning.checkpoints import checkpoint_path
from srpo_lightning.rewards import ClipReward
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
    """The steps of both files."""
    return [[r["step"] for r in records.read(run / file)] for file in (FILE, f"{SAMPLES}/{METADATA}")]


def test_a_resumed_run_goes_on_from_the_records_up_to_its_checkpoint(models, features, tmp_path):
    """Killed after the evaluation of step 3, of which there is no checkpoint."""
    fit(models, features, tmp_path, max_steps=3)
    checkpoint_path(tmp_path, 3).unlink()
    assert recorded(tmp_path) == [[0, 1, 2, 3]] * 2
    fit(models, features, tmp_path, ckpt_path=checkpoint_path(tmp_path, 2))
    assert recorded(tmp_path) == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize(("num_sanity_val_steps", "steps"), [(-1, [0, 1]), (0, [1])])
def test_a_run_that_begins_leaves_out_what_one_without_a_checkpoint_has_written(
    models, features, tmp_path, num_sanity_val_steps, steps
):
    with pytest.raises(RuntimeError, match="stopped by the test"):
        fit(models, features, tmp_path, Stop(2))
    assert recorded(tmp_path) == [[0, 1]] * 2
    checkpoint_path(tmp_path, 1).unlink(missing_ok=True)
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
