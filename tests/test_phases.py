"""Phases of a step: who listens hears them in their order, in the backward pass of decoding too."""

from types import SimpleNamespace

import torch

from srpo_lightning import phases
from srpo_lightning.callbacks import EMA, Progress
from srpo_lightning.draws import Draws
from srpo_lightning.objectives import GRPO
from srpo_lightning.phases import AVERAGING, BACKWARD, DECODE, FORWARD, REWARD, ROLLOUT, STEP
from tests import tiny


def test_listeners_hear_phases_until_they_stop():
    heard = []
    stop = phases.listen(heard.append)
    phases.enter(ROLLOUT)
    stop()
    phases.enter(REWARD)
    assert heard == [ROLLOUT]


def test_what_follows_has_the_phase_and_keeps_the_last_when_the_context_ends():
    seen = SimpleNamespace(phase="")
    with phases.followed_by(seen):
        phases.enter(REWARD)
    phases.enter(STEP)
    assert seen.phase == REWARD


def test_a_phase_is_entered_again_when_gradients_reach_its_results():
    heard = []
    stop = phases.listen(heard.append)
    x = torch.ones(2, requires_grad=True)
    result, constant = 2 * x, torch.ones(2)
    phases.enter_backward(DECODE, [result, constant])
    assert heard == []
    (result + constant).sum().backward()
    stop()
    assert heard == [DECODE]
    assert torch.equal(x.grad, torch.full((2,), 2.0))


def test_a_step_of_training_says_its_phases_in_their_order(models, features, tmp_path):
    heard = []
    stop = phases.listen(heard.append)
    trainer = tiny.new_trainer(tmp_path, [Progress(), EMA()], max_steps=1)
    trainer.fit(tiny.new_module(models), tiny.new_data(models, features))
    stop()
    assert heard == [ROLLOUT, FORWARD, DECODE, REWARD, DECODE, BACKWARD, STEP, AVERAGING]


def test_rewards_of_grpo_come_before_its_transformer_passes(models):
    heard = []
    policy, reward = tiny.new_policy(models), tiny.new_reward(models.clip)
    objective, conditions, draws = GRPO(num_steps=3, group_size=2), tiny.new_conditions(2), Draws(0)
    rollout = objective.rollout(policy, conditions, draws)
    stop = phases.listen(heard.append)
    objective.loss(policy, reward, conditions, rollout, draws)
    stop()
    assert heard == [DECODE, REWARD, FORWARD]
