"""RewardTracking against the same scores computed picture by picture."""

import pytest
import torch

from srpo_lightning.callbacks import RewardTracking
from srpo_lightning.callbacks.tracking import append_record, read_records
from srpo_lightning.metrics import saturation
from srpo_lightning.rewards import ClipReward, Reward
from tests import tiny


class Brightness(Reward):
    """A judge that is no CLIP model: it has no image features."""

    def forward(self, images, texts):
        return images.mean((1, 2, 3))


def validate(models, features, run, judge, **settings) -> dict:
    tracking = RewardTracking(judge, **settings)
    trainer = tiny.new_trainer(run, [tracking], limit_val_batches=9)
    module = tiny.new_module(models)
    trainer.validate(module, tiny.new_data(models, features), verbose=False)
    (record,) = read_records(run)
    return record, module


def test_the_record_equals_scores_computed_one_picture_at_a_time(models, features, tmp_path):
    judge = ClipReward(str(models.judge))
    record, module = validate(
        models, features, tmp_path, judge, labels=["x", "z"], candidates=[str(models.train)], top_k=2
    )
    data = tiny.new_data(models, features)
    data.prepare_data()
    pictures = torch.cat([module.sample(batch) for batch in data.val_dataloader()])
    prompts, candidates = data.eval_prompts, data.train_prompts + data.eval_prompts

    def relative(scorer: Reward) -> float:
        return sum(
            (scorer(i[None], [f"x. {p}"]) + scorer(i[None], [f"y. {p}"])) / 2 - scorer(i[None], [f"z. {p}"])
            for i, p in zip(pictures, prompts, strict=True)
        )

    own = [judge(i[None], [p]) for i, p in zip(pictures, prompts, strict=True)]
    better = [sum(bool(judge(i[None], [c]) > o) for c in candidates) for i, o in zip(pictures, own, strict=True)]
    expected = {
        "reward": relative(module.reward) / 3,
        "judge": relative(judge) / 3,
        "prompt": sum(own) / 3,
        "top2": sum(b < 2 for b in better) / 3,
        "saturation": saturation(pictures).mean(),
        "share/x": sum(bool(judge(i[None], ["x"]) > judge(i[None], ["z"])) for i in pictures) / 3,
    }
    for name, value in expected.items():
        assert record[name] == pytest.approx(float(value), abs=1e-5), name
    assert (record["step"], record["weights"]) == (0, "policy")


def test_a_judge_without_image_features_is_tracked_without_diversity(models, features, tmp_path):
    record, _ = validate(models, features, tmp_path, Brightness())
    measured = {"reward", "judge", "prompt", "top5", "held_out", "saturation", "brightness", "high_frequency"}
    assert record.keys() == {"step", "weights", *measured}
    assert record["judge"] == pytest.approx(0, abs=1e-6)


def test_records_are_appended_and_read_back_in_order(tmp_path):
    append_record(tmp_path / "new", {"step": 0})
    append_record(tmp_path / "new", {"step": 2, "weights": "ema"})
    assert read_records(tmp_path / "new") == [{"step": 0}, {"step": 2, "weights": "ema"}]


def test_further_metrics_are_logged_by_their_names(models, features, tmp_path):
    record, module = validate(
        models, features, tmp_path, ClipReward(str(models.judge)), metrics={"light": Brightness()}
    )
    data = tiny.new_data(models, features)
    data.prepare_data()
    pictures = torch.cat([module.sample(batch) for batch in data.val_dataloader()])
    assert record["light"] == pytest.approx(float(pictures.mean()), abs=1e-5)


def test_a_judge_without_text_and_a_metric_with_a_taken_name_are_refused(models):
    class Blind(Brightness):
        reads_text = False

    with pytest.raises(ValueError, match=r"Blind reads no text.*WeightedReward"):
        RewardTracking(Blind())
    with pytest.raises(ValueError, match="metrics has saturation, which is logged already"):
        RewardTracking(Brightness(), metrics={"saturation": Brightness()})
