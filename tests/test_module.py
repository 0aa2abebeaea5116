import csv
import itertools
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from srpo_lightning.callbacks import EMA, RunCheckpoint
from srpo_lightning.objectives import SRPO, ControlWords
from srpo_lightning.run_folder import RunFolder
from srpo_lightning.training import timing
from srpo_lightning.training.timing import seconds_between
from tests import tiny
from tests.faults import History, NanReward


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Durations(Callback):
    """How long each micro-batch took."""

    def __init__(self):
        self.seconds = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seconds.append(-time.perf_counter())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seconds[-1] += time.perf_counter()


def test_only_the_transformers_weights_are_in_the_checkpoint_file(models, features, tmp_path):
    module = tiny.new_module(models)
    tiny.new_trainer(tmp_path, [RunCheckpoint(1)], max_steps=1).fit(module, tiny.new_data(models, features))
    saved = torch.load(RunFolder(tmp_path).checkpoint(1), weights_only=True)
    expected = {f"policy.transformer.{name}" for name, _ in module.policy.transformer.named_parameters()}
    assert saved["state_dict"].keys() == expected
    assert len(saved["optimizer_states"][0]["param_groups"][0]["params"]) == len(expected)


def test_frozen_weights_do_not_change_and_trained_ones_do(models, features, tmp_path):
    module = tiny.new_module(models)
    module.configure_model()
    before = {name: p.clone() for name, p in module.named_parameters()}
    tiny.new_trainer(tmp_path, max_steps=2).fit(module, tiny.new_data(models, features))
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name]) or name.startswith("policy.transformer.")
    changed = [name for name, p in module.named_parameters() if not torch.equal(p, before[name])]
    assert len(changed) > 20


def test_the_same_seed_trains_the_same_weights_and_another_seed_does_not(models, features, tmp_path):
    def weights(seed: int) -> dict:
        history = History()
        trainer = tiny.new_trainer(tmp_path, [history], max_steps=2)
        torch.manual_seed(seed + torch.seed() % 7)  # the global generator plays no part
        trainer.fit(tiny.new_module(models, seed=seed), tiny.new_data(models, features, seed=seed))
        return history.weights[-1]

    first = weights(3)
    assert equal(weights(3), first)
    assert not equal(weights(4), first)


def test_the_micro_step_counts_micro_batches_and_the_words_cycle_with_it(models, features, tmp_path):
    module = tiny.new_module(models)
    trainer = tiny.new_trainer(tmp_path, max_steps=2, accumulate_grad_batches=3)
    trainer.fit(module, tiny.new_data(models, features))
    assert (trainer.global_step, module.micro_step) == (2, 6)


def test_the_scheduler_steps_once_per_optimizer_step(models, features, tmp_path):
    module = tiny.new_module(
        models, lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    )
    trainer = tiny.new_trainer(tmp_path, max_steps=3, accumulate_grad_batches=2)
    trainer.fit(module, tiny.new_data(models, features))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-3 / 4


def test_a_step_that_is_not_finite_leaves_weights_and_optimizer_alone_and_the_next_one_trains(
    models, features, tmp_path
):
    """Steps 0, 1 (bad), 2: the weights after 1 are those after 0, and the optimizer has counted two steps."""
    history, reward = History(), NanReward(str(models.clip), bad=[1])
    trainer = tiny.new_trainer(tmp_path, [history], max_steps=3)
    trainer.fit(tiny.new_module(models, reward), tiny.new_data(models, features))
    after = history.weights
    assert equal(after[0], after[1])
    assert not equal(after[1], after[2])
    assert all(p.isfinite().all() for p in after[2].values())
    assert {int(state["step"]) for state in trainer.optimizers[0].state.values()} == {2}


def test_one_bad_micro_batch_skips_the_whole_accumulated_step(models, features, tmp_path):
    history, reward = History(), NanReward(str(models.clip), bad=[2])
    trainer = tiny.new_trainer(tmp_path, [history], max_steps=3, accumulate_grad_batches=2)
    trainer.fit(tiny.new_module(models, reward), tiny.new_data(models, features))
    after = [weights for weights, step in zip(history.weights[1::2], history.steps[1::2], strict=True)]
    assert equal(after[0], after[1])
    assert not equal(after[1], after[2])


def test_too_many_skipped_steps_in_a_row_stop_the_run_with_the_last_good_weights_saved(models, features, tmp_path):
    history, reward = History(), NanReward(str(models.clip), bad=[1, 3, 4, 5])
    module = tiny.new_module(models, reward, max_skipped_steps=2)
    trainer = tiny.new_trainer(tmp_path, [history, EMA(), RunCheckpoint(100)], max_steps=20)
    with pytest.raises(FloatingPointError, match=r"3 steps in a row .* lower the learning rate"):
        trainer.fit(module, tiny.new_data(models, features))
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == ["step-00000006.ckpt"]
    saved = torch.load(RunFolder(tmp_path).checkpoints()[0], weights_only=True)
    assert equal(saved["state_dict"], history.weights[2])
    assert all(p.isfinite().all() for p in saved["state_dict"].values())


def test_skipped_steps_that_are_not_in_a_row_do_not_stop_the_run(models, features, tmp_path):
    reward = NanReward(str(models.clip), bad=[0, 2, 4])
    module = tiny.new_module(models, reward, max_skipped_steps=1)
    trainer = tiny.new_trainer(tmp_path, max_steps=6)
    trainer.fit(module, tiny.new_data(models, features))
    assert trainer.global_step == 6


def test_the_times_of_logged_steps_are_logged_and_are_within_the_step(models, features, tmp_path, monkeypatch):
    """Those of other steps are not asked for: to read them would make the host wait for the device."""
    history, durations, read = CSVLogger(tmp_path), Durations(), []

    def between(*moments) -> float:
        read.append(seconds_between(*moments))
        return read[-1]

    monkeypatch.setattr(timing, "seconds_between", between)
    trainer = tiny.new_trainer(tmp_path, [durations], logger=history, log_every_n_steps=2, accumulate_grad_batches=2)
    trainer.fit(tiny.new_module(models), tiny.new_data(models, features))
    rows = list(csv.DictReader(Path(history.experiment.metrics_file_path).read_text().splitlines()))
    assert [row["step"] for row in rows] == ["1", "3"]
    assert len(read) == 8  # two parts of two micro-batches of two steps
    for number, row in enumerate(rows):
        rollout, update = (float(row[f"train/seconds_{part}"]) for part in ("rollout", "update"))
        parts = read[4 * number : 4 * number + 4]
        assert (rollout, update) == pytest.approx((sum(parts[:2]), sum(parts[2:])), rel=1e-5)
        assert 0 < rollout + update < sum(durations.seconds[2 + 4 * number : 4 + 4 * number])


def test_a_sample_does_not_depend_on_the_batch_it_is_drawn_in(models):
    module = tiny.new_module(models)
    module.configure_model()
    batch = tiny.new_conditions(3)
    together = module.sample(batch)
    alone = module.sample(
        batch._replace(
            prompts=batch.prompts[1:2],
            text=batch.text.each(lambda rows: rows[1:2]),
            indices=batch.indices[1:2],
        )
    )
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=5e-6)


def save(models, features, folder):
    tiny.new_trainer(folder, [RunCheckpoint(1)], max_steps=1).fit(
        tiny.new_module(models), tiny.new_data(models, features)
    )
    return RunFolder(folder).checkpoint(1)


def test_a_checkpoint_of_another_policy_is_refused_naming_the_cure(models, features, tmp_path):
    path = save(models, features, tmp_path / "run")
    other = models._replace(pipeline=tiny.write_pipeline(tmp_path / "wide", width=24))
    with pytest.raises(ValueError, match=r"(?s)of another policy: set model.policy to the one .*checkpoint: .*config:"):
        tiny.new_trainer(tmp_path).fit(tiny.new_module(other), tiny.new_data(other, features), ckpt_path=path)


def test_a_checkpoint_of_another_program_is_refused(models, features, tmp_path):
    path = save(models, features, tmp_path / "run")
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["srpo"]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="not written by srpo_lightning"):
        tiny.new_trainer(tmp_path).fit(tiny.new_module(models), tiny.new_data(models, features), ckpt_path=path)


def test_a_checkpoint_with_a_missing_parameter_is_refused_naming_it(models, features, tmp_path):
    path = save(models, features, tmp_path / "run")
    checkpoint = torch.load(path, weights_only=True)
    name = sorted(checkpoint["state_dict"])[0]
    del checkpoint["state_dict"][name]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=rf"differs from the policy in 1 parameters, first {name}: found None"):
        tiny.new_trainer(tmp_path).fit(tiny.new_module(models), tiny.new_data(models, features), ckpt_path=path)


class Rollouts(SRPO):
    """Remembers the prompts and the noise of every rollout, and what every update trains on."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.drawn, self.used = [], []

    def rollout(self, policy, conditions, draws):
        rollout = super().rollout(policy, conditions, draws)
        self.drawn.append((draws.step, conditions.prompts))
        return rollout

    def loss(self, policy, reward, conditions, rollout, draws):
        self.used.append((draws.step, conditions.prompts, rollout.x0))
        return super().loss(policy, reward, conditions, rollout, draws)


def test_a_rollout_serves_several_updates_each_with_noise_levels_of_its_own(models, features, tmp_path):
    module = tiny.new_module(models, updates_per_rollout=2)
    module.objective = Rollouts(ControlWords(["x", "y"], ["z"]), num_rollout_steps=2)
    tiny.new_trainer(tmp_path, max_steps=5).fit(module, tiny.new_data(models, features, repeats=2))
    assert [step for step, _ in module.objective.drawn] == [0, 2, 4]
    used = module.objective.used
    assert [step for step, _, _ in used] == [0, 1, 2, 3, 4]
    for first, again in ((0, 1), (2, 3)):
        assert used[first][1] == used[again][1]
        assert torch.equal(used[first][2], used[again][2])
    assert used[0][1] != used[2][1]
    plain = tiny.new_data(models, features)
    once = [pick.row for batch in itertools.islice(iter(plain.train_dataloader().batch_sampler), 3) for pick in batch]
    prompts = [plain.train_prompts[row] for row in once]
    assert [prompt for _, own in module.objective.drawn for prompt in own] == prompts


def test_a_run_that_reuses_rollouts_resumes_exactly_between_them(models, features, tmp_path):
    def run(steps, path=None, folder="whole"):
        history = History()
        trainer = tiny.new_trainer(tmp_path / folder, [history, RunCheckpoint(4)], max_steps=steps)
        data = tiny.new_data(models, features, repeats=2)
        trainer.fit(tiny.new_module(models, updates_per_rollout=2), data, ckpt_path=path)
        return history.weights[-1]

    whole = run(8)
    run(4, folder="halves")
    assert equal(run(8, RunFolder(tmp_path / "halves").checkpoint(4), "halves"), whole)
