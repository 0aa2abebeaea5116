"""RewardTracking against the same scores computed picture by picture."""

import json
from functools import partial

import pytest
import torch
from torch import Tensor

from srpo_lightning.callbacks import RewardTracking, RunCheckpoint
from srpo_lightning.objectives import Plain
from srpo_lightning.picture_statistics import saturation
from srpo_lightning.policies import FluxPolicy
from srpo_lightning.policies.adapters import Lora
from srpo_lightning.rewards import ClipReward, Reward, Term, WeightedReward
from srpo_lightning.rewards.base import evaluated_by
from srpo_lightning.run_folder import RunFolder
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
    (record,) = RunFolder(run).validation.read_metrics()
    del record["key"]
    return record, module


def test_the_record_equals_scores_computed_one_picture_at_a_time(models, features, tmp_path):
    judge = ClipReward(str(models.judge))
    record, module = validate(
        models, features, tmp_path, judge, labels=["x", "z"], candidates=[str(models.train)], top_k=2
    )
    data = tiny.new_data(models, features)
    data.prepare_data()
    pictures = torch.cat([module.sample(batch) for batch in data.val_dataloader()])
    prompts, candidates = data.eval_prompts, data.train_prompts

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
    measured = {"reward", "judge", "prompt", "held_out", "saturation", "brightness", "high_frequency"}
    assert record.keys() == {"step", "weights", *measured}
    assert record["judge"] == pytest.approx(0, abs=1e-6)


def test_records_are_appended_and_read_back_in_order(tmp_path):
    RunFolder(tmp_path / "new").append_metrics({"step": 0})
    RunFolder(tmp_path / "new").append_metrics({"step": 2, "weights": "ema"})
    assert RunFolder(tmp_path / "new").read_metrics() == [{"step": 0}, {"step": 2, "weights": "ema"}]


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


class Moving(Brightness):
    """Remembers where it was sent, and when it scored."""

    def __init__(self):
        super().__init__()
        self.events = []

    def to(self, device):
        self.events.append(str(device))
        return super().to(device)

    def forward(self, images, texts):
        self.events.append("scores")
        return super().forward(images, texts)


def test_judge_and_metrics_are_sent_to_the_device_to_score_and_back_to_host_memory(models, features, tmp_path):
    judge, metric = Moving(), Moving()
    validate(models, features, tmp_path, judge, metrics={"light": metric})
    for model in (judge, metric):
        assert model.events[0] == model.events[-1] == "cpu"  # there and back: here they are one place
        assert set(model.events[1:-1]) == {"scores"}


@pytest.mark.parametrize("adapter", [None, Lora(rank=2)])
def test_the_base_is_measured_where_nobody_has_measured_it_and_then_kept(models, features, tmp_path, adapter):
    """By putting the weights before training in place again, which leaves the trained ones as they were."""
    if adapter:
        pytest.importorskip("peft")

    def evaluate(run, checkpoint=None):
        tracking, module = RewardTracking(ClipReward(str(models.judge))), tiny.new_module(models)
        module.policy = FluxPolicy(str(models.pipeline), 32, 32, adapter=adapter)
        trainer = tiny.new_trainer(run, [tracking], limit_val_batches=9)
        trainer.validate(module, tiny.new_data(models, features), verbose=False, ckpt_path=checkpoint)
        return module, tracking

    _, of_base = evaluate(tmp_path / "before")
    module = tiny.new_module(models)
    module.policy = FluxPolicy(str(models.pipeline), 32, 32, adapter=adapter)
    tiny.new_trainer(tmp_path / "run", [RunCheckpoint()]).fit(module, tiny.new_data(models, features))
    path = RunFolder(tmp_path / "run").checkpoint(4)

    after, tracking = evaluate(tmp_path / "after", path)
    own, base = (
        tracked.evaluations.by_weights[name].table for tracked, name in ((of_base, "policy"), (tracking, "base"))
    )
    for name, column in own.columns.items():
        torch.testing.assert_close(base.columns[name], column, rtol=0, atol=1e-6)
    assert set(tracking.tables) == {"policy", "base"}
    trained = tracking.evaluations.by_weights["policy"].table
    assert not torch.equal(trained.columns["reward"], base.columns["reward"])
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(p, saved[name]) for name, p in after.trainable_parameters())

    _, tracking = evaluate(tmp_path / "after", path)
    assert set(tracking.tables) == {"policy"}
    assert torch.equal(tracking.evaluations.by_weights["base"].table.columns["reward"], base.columns["reward"])


@pytest.fixture(scope="module")
def key(models, features, tmp_path_factory):
    """The key of a tracking; what is given takes the place of what is usual."""
    trainers = {}

    def find(tracking=None, module=None, data=None, trainer=None, evaluation=None) -> str:
        own = models._replace(evaluation=evaluation or models.evaluation)
        if str(trainer) not in trainers:
            trainers[str(trainer)] = tiny.new_trainer(tmp_path_factory.mktemp("keys"), **(trainer or {}))
        used = trainers[str(trainer)]
        used.datamodule = tiny.new_data(own, features, **(data or {}))
        settings = {"judge": ClipReward(str(models.judge))} | (tracking or {})
        return RewardTracking(**settings).key(used, tiny.new_module(models, **(module or {})))

    return find


def test_the_base_has_one_key_as_long_as_nothing_changes(key, models):
    judge = ClipReward(str(models.judge), processor=None, dtype="float32")
    assert key() == key() == key({"judge": judge, "metrics": {}, "top_k": 5})


MEASURED_OTHERWISE = {
    "noise": {"module": {"seed": 4}},
    "steps": {"module": {"num_sample_steps": 3}},
    "guidance": {"module": {"sample_guidance": 1.0}},
    "precision": {"trainer": {"precision": "bf16-mixed"}},
    "samples": {"data": {"eval_samples_per_prompt": 2}},
    "sizes": {"data": {"sizes": [(16, 32)]}},
    "length of the text": {"data": {"max_sequence_length": 5}},
    "labels": {"tracking": {"labels": ["x", "y"]}},
    "candidates": {"tracking": {"candidates": ["srpo_lightning/assets/prompts/train.txt"]}},
    "metrics": {"tracking": {"metrics": {"light": Brightness()}}},
    "held_out": {"tracking": {"held_out": {"judge": 1.0}}},
    "form": {"tracking": {"form": Plain("x. {prompt}")}},
}


@pytest.mark.parametrize("change", MEASURED_OTHERWISE.values(), ids=MEASURED_OTHERWISE)
def test_the_base_of_another_measurement_is_not_taken_for_this_ones(key, change):
    assert key(**change) != key()


def test_the_base_under_other_reward_models_is_not_taken_for_this_ones(key, models):
    """Their settings count, not only their class and their folder."""
    weights = [(1.0, 0.0, 1.0), (2.0, 0.0, 1.0), (1.0, 0.5, 1.0), (1.0, 0.0, 2.0)]
    rewards = [
        *(ClipReward(str(models.clip), logit_scale_divisor=divisor) for divisor in (None, 20.0)),
        ClipReward(str(models.clip), processor=str(models.judge)),
        *(WeightedReward([Term(ClipReward(str(models.clip)), *numbers)]) for numbers in weights),
    ]
    judged = {key({"judge": reward}) for reward in rewards}
    trained_for = {key(module={"reward": reward}) for reward in rewards}
    logged = {key({"metrics": {"more": reward}}) for reward in rewards}
    assert len(judged) == len(trained_for) == len(logged) == len(rewards)


def test_the_base_of_prompts_with_other_seeds_or_sizes_is_not_taken_for_this_ones(key, tmp_path):
    path, keys = tmp_path / "prompts.jsonl", set()
    for own in ({}, {"seed": 3}, {"width": 16, "height": 32}):
        path.write_text(json.dumps({"prompt": "c0"} | own))
        keys.add(key(evaluation=path))
    assert len(keys) == 3


def test_a_held_out_score_of_what_is_not_measured_is_refused(models):
    with pytest.raises(ValueError, match=r"held_out has reward: choose among judge, prompt and the names"):
        RewardTracking(Brightness(), held_out={"reward": 1.0})
    with pytest.raises(ValueError, match="held_out has nothing"):
        RewardTracking(Brightness(), held_out={})


def test_a_pictures_own_prompt_competes_with_the_candidates_and_not_with_those_of_its_batch(models):
    judge = tiny.new_reward(models.judge)
    tracking = RewardTracking(judge, candidates=[str(models.train)], top_k=2)
    pictures, prompts = torch.rand(6, 3, 32, 32), [f"c{number}" for number in range(6)]

    def top(rows: slice) -> Tensor:
        shown = partial(evaluated_by, judge, pictures[rows], range(1))
        return tracking._judged(judge, shown, Plain(), prompts[rows])["top2"]

    alone = torch.cat([top(slice(row, row + 1)) for row in range(6)])
    assert torch.equal(top(slice(0, 6)), alone)
    better = judge.compare(pictures, [f"a{i} b" for i in range(7)]) > judge(pictures, prompts)[:, None]
    assert torch.equal(alone.bool(), better.sum(1) < 2)
    assert 0 < alone.sum() < 6
