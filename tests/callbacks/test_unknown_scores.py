"""Evaluations of which a number is none, or is of one sample alone."""

import json
import math

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from srpo_lightning.callbacks import RewardTracking, SampleLogger
from srpo_lightning.callbacks.report import Report
from srpo_lightning.evaluation.pictures import read_record
from srpo_lightning.files import records
from srpo_lightning.files.strict_json import strict_json
from srpo_lightning.rewards import ClipReward
from srpo_lightning.run_folder import RunFolder
from tests import tiny


def strictly(text: str):
    """JSON as other programs read it."""

    def refuse(constant: str):
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def callbacks(models) -> list:
    tracking = RewardTracking(ClipReward(str(models.judge)), labels=["x", "z"], candidates=[str(models.train)], top_k=1)
    return [SampleLogger(max_share=1.0), tracking, Report()]


def test_pictures_that_are_not_numbers_have_no_scores_in_any_file_and_are_told_of(models, features, tmp_path):
    """And TensorBoard, which has no histogram of nothing, is no reason to end."""
    module = tiny.new_module(models)
    module.sample = lambda batch, noise=None: torch.full((batch.batch_size, 3, 32, 32), math.nan)
    trainer = tiny.new_trainer(tmp_path, callbacks(models), limit_val_batches=9, logger=TensorBoardLogger(tmp_path))
    with pytest.warns(UserWarning, match="3 of 3 samples of policy have scores that are not numbers, sample 0 the fi"):
        trainer.validate(module, tiny.new_data(models, features), verbose=False)
    folder = tmp_path / "validation"
    (record,) = RunFolder(folder).read_metrics()
    assert {name for name, value in record.items() if value == value} == {
        "step",
        "weights",
        "key",
        "share/x",
        "share/z",
    }
    assert record["share/x"] == record["share/z"] == 0
    for path in (folder / "metrics.jsonl", folder / "samples" / "metadata.jsonl"):
        assert all(strictly(line) for line in path.read_text().splitlines())
    strictly((folder / "step-00000000.json").read_text())
    assert read_record(next(folder.rglob("00000.png")))["scores"]["top1"] is None


def test_one_evaluation_prompt_is_enough(models, features, tmp_path):
    prompts = tmp_path / "one.txt"
    prompts.write_text("c0")
    models = models._replace(evaluation=prompts)
    settings = {"max_steps": 1, "val_check_interval": 1, "limit_val_batches": 9, "num_sanity_val_steps": -1}
    trainer = tiny.new_trainer(tmp_path, callbacks(models), **settings)
    trainer.fit(tiny.new_module(models), tiny.new_data(models, features))
    trainer.validate(tiny.new_module(models), tiny.new_data(models, features), verbose=False)
    before, after = RunFolder(tmp_path).read_metrics()
    assert (before["step"], after["step"]) == (0, 1)
    assert "diversity" not in after
    assert all(value == value for value in after.values())
    assert 0 <= after["win/judge"] <= 1


def test_numbers_that_are_none_are_null_in_json_and_nan_when_read(tmp_path):
    assert (
        strict_json({"a": [math.inf, 1.5, (math.nan,)], "b": "\u00e9"}) == '{"a": [null, 1.5, [null]], "b": "\u00e9"}'
    )
    RunFolder(tmp_path).append_metrics({"step": 1, "weights": "ema", "judge": math.nan})
    assert strictly((tmp_path / "metrics.jsonl").read_text())["judge"] is None
    assert math.isnan(RunFolder(tmp_path).read_metrics()[0]["judge"])
    assert records.read(tmp_path / "nothing.jsonl") == []
    RunFolder(tmp_path).checkpoint(1).parent.mkdir()
    RunFolder(tmp_path).checkpoint(1).touch()
    assert RunFolder(tmp_path).ranked_checkpoints("ema/judge", "max") == []
