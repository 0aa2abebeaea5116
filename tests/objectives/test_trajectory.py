"""Each estimator against plain autograd through its formula, written out here from objectives' papers."""

from functools import partial
from itertools import pairwise

import pytest
import torch

from srpo_lightning.draws import Draws
from srpo_lightning.objectives import (
    ControlWords,
    DRaFT,
    DRTune,
    FlowBPBridge,
    FlowBPLagrange,
    FlowBPSparse,
    LeapAlign,
    ReFL,
    Relative,
)
from tests.objectives import toy
from tests.objectives.formula import GUIDANCE, SETTINGS, Formula, N, mixed

ESTIMATORS = {
    "refl": ReFL(late_steps=(4, 7), **SETTINGS),
    "draft-1": DRaFT(**SETTINGS),
    "draft-3": DRaFT(num_trained_steps=3, **SETTINGS),
    "draft-lv": DRaFT(num_variants=2, **SETTINGS),
    "drtune": DRTune(num_trained_steps=2, **SETTINGS),
    "leap": LeapAlign(min_distance=0.01, **SETTINGS),
    "sparse": FlowBPSparse(**SETTINGS),
    "bridge": FlowBPBridge(**SETTINGS),
    "lagrange": FlowBPLagrange(min_distance=0.01, **SETTINGS),
}
each = pytest.mark.parametrize("objective", ESTIMATORS.values(), ids=ESTIMATORS.keys())


@pytest.mark.parametrize("step", range(3))
def test_refl_is_the_reward_of_the_picture_predicted_from_the_late_step(step):
    f = Formula(ESTIMATORS["refl"], step)
    i, x = len(f.states) - 1, f.states[-1]
    loss = torch.relu(2.0 - f.rewards(x - f.sigma[i] * f.v(x, i))).mean()
    assert 4 <= i <= 7
    torch.testing.assert_close(f.estimate(), loss, **toy.TOLERANCE)
    toy.assert_same_gradients(f.policy, f.estimate(), loss)


def test_refl_draws_every_late_step_and_the_same_on_every_rank():
    stops = [ESTIMATORS["refl"].stop(Draws(0, step)) for step in range(40)]
    assert set(stops) == {4, 5, 6, 7}
    assert stops == [ESTIMATORS["refl"].stop(Draws(0, step, rank=3)) for step in range(40)]


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("k", [1, 3, N])
def test_draft_is_autograd_through_the_last_k_steps_with_checkpoints_and_without(k, checkpointing):
    f = Formula(DRaFT(num_trained_steps=k, step_checkpointing=checkpointing, **SETTINGS))
    x = f.states[-1]
    for i in range(N - k, N):
        x = x + f.d(i) * f.v(x, i)
    toy.assert_same_gradients(f.policy, f.estimate(), -f.rewards(x).mean(), rtol=1e-12, atol=1e-14)


def test_draft_lv_averages_the_last_step_and_steps_from_other_noise():
    f = Formula(ESTIMATORS["draft-lv"])
    x0 = f.states[-1] + f.d(N - 1) * f.v(f.states[-1], N - 1)
    rewards = [f.rewards(x0)]
    for n in range(2):
        noise = f.draws.noise(x0.shape, shared=False, purpose=f"variant {n}").double()
        x = (1 - f.sigma[N - 1]) * x0.detach() + f.sigma[N - 1] * noise
        rewards.append(f.rewards(x + f.d(N - 1) * f.v(x, N - 1)))
    assert not torch.equal(rewards[1], rewards[2])
    toy.assert_same_gradients(f.policy, f.estimate(), -torch.stack(rewards).mean())


@pytest.mark.parametrize("step", range(6))
def test_drtune_is_autograd_through_the_chain_with_detached_inputs(step):
    f = Formula(ESTIMATORS["drtune"], step)
    stop = len(f.states) - 1
    trained, x = f.objective.trained_steps(stop, f.draws), f.states[0]
    assert len(trained) == 2
    for i in range(stop + 1):
        v = f.v(x.detach(), i)
        x = x + (f.d(i) if i < stop else -f.sigma[i]) * (v if i in trained else v.detach())
    toy.assert_same_gradients(f.policy, f.estimate(), -f.rewards(x).mean())


def test_drtune_stops_in_the_last_part_and_spaces_its_steps_equally_from_a_drawn_first_one():
    objective = DRTune(num_steps=25)
    assert {objective.stop(Draws(0, step)) for step in range(200)} == set(range(15, 25))
    drawn = {tuple(objective.trained_steps(20, Draws(0, step))) for step in range(200)}
    assert drawn == {(first, first + 7, first + 14) for first in range(7)}
    assert objective.trained_steps(20, Draws(0, 5)) == objective.trained_steps(20, Draws(0, 5, rank=3))
    at_the_end = [
        stop in objective.trained_steps(stop, d) for d in map(partial(Draws, 0), range(1000)) for stop in (15, 24)
    ]
    assert 0.09 < sum(at_the_end) / 2000 < 0.19  # one in 6 and one in 9


@pytest.mark.parametrize("step", range(3))
def test_leap_align_is_two_leaps_straight_through_weighted_by_how_far_they_miss(step):
    f = Formula(ESTIMATORS["leap"], step)
    k, j = f.objective.anchors(f.draws)
    assert k < j
    leap_j = f.states[k] + (f.sigma[j] - f.sigma[k]) * f.v(f.states[k], k)
    x_j = leap_j + (f.states[j] - leap_j).detach()
    leap_0 = x_j - f.sigma[j] * f.v(mixed(x_j, 0.3), j)
    x_0 = leap_0 + (f.states[-1] - leap_0).detach()
    d_j = (leap_j - f.states[j]).abs().mean((1, 2, 3)).clamp(min=0.01)
    d_0 = (leap_0 - f.states[-1]).abs().mean((1, 2, 3)).clamp(min=0.01)
    loss = -(f.rewards(x_0) / (d_j + d_0).detach()).mean()
    toy.assert_same_gradients(f.policy, f.estimate(), loss)


@each
def test_along_the_exact_flow_every_estimator_arrives_at_the_picture(objective):
    policy, conditions = toy.Point(), toy.batch()
    for step in range(5):
        draws = Draws(0, step)
        rollout = toy.rollout(policy, objective, conditions, draws)
        end = objective.x0_hat(policy, conditions, rollout.trajectory, toy.levels(policy, N, 2), draws)
        torch.testing.assert_close(end, policy.picture.expand_as(end), rtol=0, atol=1e-12)


@each
def test_the_rollout_is_the_objectives_own_start_of_the_euler_chain(objective):
    policy, conditions, draws = toy.Field(), toy.batch(), Draws(0, 1)
    rollout = objective.rollout(policy, conditions, draws)
    assert len(rollout.trajectory) == objective.stop(draws) + 1
    assert not rollout.trajectory.requires_grad
    assert torch.equal(rollout.trajectory[0], draws.noise((2, *toy.SHAPE), shared=False))
    assert torch.equal(rollout.trajectory[-1], rollout.x0)
    sigmas = policy.sigmas(N)
    for i, (x, x_next) in enumerate(pairwise(rollout.trajectory)):
        v = policy(x, sigmas[i].expand(2), conditions, GUIDANCE)
        torch.testing.assert_close(x_next, x + (sigmas[i + 1] - sigmas[i]).float() * v, rtol=1e-5, atol=1e-6)


def test_any_estimator_takes_srpos_relative_reward():
    f = Formula(DRaFT(Relative(ControlWords(["Real"], ["Flat oil"]), extra_weight=0.2), **SETTINGS))
    x0 = f.states[-1] + f.d(N - 1) * f.v(f.states[-1], N - 1)
    images = f.policy.decode(x0)
    positive, negative = ([f"{word}. {p}" for p in f.conditions.prompts] for word in ("Real", "Flat oil"))
    relative = 1.2 * f.reward(images, positive) - f.reward(images, negative)
    toy.assert_same_gradients(f.policy, f.estimate(), -relative.mean())
    score = f.objective.score(f.reward, images, f.conditions.prompts)
    torch.testing.assert_close(score, f.reward(images, positive) - f.reward(images, negative))


def test_scoring_in_micro_batches_changes_nothing():
    whole, parts = (DRaFT(num_variants=2, reward_batch_size=size, **SETTINGS) for size in (None, 4))
    a, b = Formula(whole), Formula(parts)
    for one, other in zip(toy.gradients(a.policy, a.estimate()), toy.gradients(b.policy, b.estimate()), strict=True):
        torch.testing.assert_close(one, other, **toy.TOLERANCE)


@each
def test_pictures_in_place_of_trajectories_are_refused(objective):
    conditions = toy.batch()._replace(x0=torch.zeros(2, *toy.SHAPE))
    with pytest.raises(ValueError, match=r"data.offline_ratio .* leave it and data.images out"):
        objective.rollout(toy.Field(), conditions, Draws(0))


@pytest.mark.parametrize(
    ("objective", "settings", "cure"),
    [
        (ReFL, {"num_steps": 10}, "the last is at most 9"),
        (ReFL, {"late_steps": (5, 4)}, "first must not come after"),
        (DRaFT, {"num_trained_steps": 26}, "train fewer"),
        (DRaFT, {"num_trained_steps": 2, "num_variants": 2}, "set num_trained_steps to 1"),
        (DRTune, {"num_trained_steps": 20}, "lower early_stop"),
        (LeapAlign, {"num_steps": 1}, "set 2 or more"),
        (FlowBPSparse, {"num_trained_steps": 26}, "at most all 25"),
        (FlowBPBridge, {"num_trained_steps": 1}, "trains 2 or more"),
        (FlowBPLagrange, {"num_steps": 2}, "need 3 steps or more"),
        (FlowBPLagrange, {"num_trained_supports": 4}, "train fewer"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_with_its_cure(objective, settings, cure):
    with pytest.raises(ValueError, match=cure):
        objective(**settings)
