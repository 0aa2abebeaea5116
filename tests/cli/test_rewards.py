"""Rewards as a configuration names them."""

import json

import pytest

from srpo_lightning.cli import main
from srpo_lightning.run_folder import RunFolder
from tests import tiny

BRIGHTNESS = {"class_path": "tests.rewards.test_weighted.Brightness"}


@pytest.fixture
def config(models, features, tmp_path):
    return tiny.config(models, tmp_path / "run", features)


def fit(config, tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    main(["fit", "--config", str(tmp_path / "run.yaml"), "--trainer.max_steps", "2"])


def test_a_weighted_sum_and_further_metrics_train_from_a_configuration(config, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["srpo_lightning"])
    terms = [{"reward": config["model"]["reward"], "std": 0.5}, {"reward": BRIGHTNESS, "weight": -0.1, "mean": 0.3}]
    config["model"]["reward"] = {"class_path": "WeightedReward", "init_args": {"terms": terms}}
    tracking = config["trainer"]["callbacks"][2]["init_args"]
    tracking["metrics"] = {"light": BRIGHTNESS}
    fit(config, tmp_path)
    records = RunFolder(tmp_path / "run").read_metrics()
    assert [record["step"] for record in records] == [0, 2, 2]
    assert all(0 < record["light"] < 1 for record in records)


def test_a_reward_that_reads_no_text_is_refused_before_anything_is_read(config, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["srpo_lightning"])
    config["model"]["reward"] = BRIGHTNESS
    with pytest.raises(SystemExit, match="Brightness reads no text, so that no control words can steer by it"):
        fit(config, tmp_path)
    assert not (tmp_path / "run").exists()
