"""The order in which a configuration lists its callbacks changes nothing."""

import json

import pytest

from srpo_lightning.callbacks import EMA, OverOptimizationGuard, Report, RewardTracking, RunCheckpoint, SampleLogger
from srpo_lightning.rewards import ClipReward
from srpo_lightning.run_folder import RunFolder
from tests import tiny
from tests.report.made_up import content_of


def listed(models, is_reversed: bool) -> list:
    callbacks = [
        EMA(decay=0.5, evaluate="both"),
        SampleLogger(num_samples=2, max_share=9.0),
        RewardTracking(ClipReward(str(models.judge))),
        Report(),
        OverOptimizationGuard(patience=2, max_drift=1e-9),
    ]
    return [*(reversed(callbacks) if is_reversed else callbacks), RunCheckpoint(1, keep=9)]


@pytest.fixture(scope="module")
def runs(models, features, tmp_path_factory):
    """Two runs whose callbacks are listed in opposite orders; `validate` measures the base of one step anew."""
    found = []
    for is_reversed in (False, True):
        run = RunFolder(tmp_path_factory.mktemp("run"))
        settings = {"max_steps": 3, "val_check_interval": 1, "limit_val_batches": 9, "num_sanity_val_steps": -1}
        trainer = tiny.new_trainer(run.path, listed(models, is_reversed), **settings)
        trainer.fit(tiny.new_module(models), tiny.new_data(models, features))
        run.base_table.unlink()
        trainer = tiny.new_trainer(run.path, listed(models, is_reversed), limit_val_batches=9)
        trainer.validate(
            tiny.new_module(models), tiny.new_data(models, features), ckpt_path=run.checkpoint(1), verbose=False
        )
        found.append(run)
    return found


def test_metrics_and_pictures_are_recorded_alike(runs):
    for part in (lambda run: run, lambda run: run.validation):
        one, other = map(part, runs)
        assert one.metrics.read_bytes() == other.metrics.read_bytes()
        assert one.samples.metadata.read_bytes() == other.samples.metadata.read_bytes()
        assert one.prompts.read_bytes() == other.prompts.read_bytes()
    weights = [json.loads(line)["weights"] for line in runs[1].validation.samples.metadata.read_text().splitlines()]
    assert weights == ["policy", "policy", "ema", "ema", "base", "base"]


def test_the_guard_stops_both_at_the_same_step(runs):
    steps = [[path.name for path in run.checkpoints()] for run in runs]
    assert steps[0] == steps[1]
    said = [run.advice.read_text() for run in runs]
    assert said[0] == said[1]
    assert steps[0] == ["step-00000001.ckpt", "step-00000002.ckpt"]
    told = [json.loads(line) for line in said[0].splitlines()]
    assert [(line["step"], line["action"]) for line in told] == [(1, "wait"), (2, "stop")]
    assert "drift from the base" in told[1]["reasons"][0]


def test_the_pages_show_the_last_evaluation_and_what_the_guard_said(runs):
    pages = [content_of(run.page.read_text()) for run in runs]
    for name in ("advice", "samples", "grid", "last"):
        assert pages[0][name] == pages[1][name]
    assert [own["acts"] for own in pages[0]["advice"]] == [False, True]
    assert pages[0]["samples"]["step"] == pages[0]["grid"]["steps"][-1] == 2


def test_pictures_have_the_scores_of_their_own_evaluation(runs):
    for run in runs:
        lines = [json.loads(line) for line in run.samples.metadata.read_text().splitlines()]
        for line in lines:
            table = run.read_table(line["step"], line["weights"])
            assert line["scores"]["judge"] == pytest.approx(float(table.columns["judge"][line["index"]]), abs=1e-5)
