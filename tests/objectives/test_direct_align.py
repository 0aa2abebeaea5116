"""Direct-Align alone, and what is left of SRPO when a part of it is taken away."""

import pytest
import torch

from srpo_lightning import flow
from srpo_lightning.draws import Draws
from srpo_lightning.objectives import SRPO, ControlWords, DirectAlign, Plain, Relative, Rollout
from tests.objectives import toy

WORDS = ControlWords(["Real"], ["Flat oil"])


def step_of(objective, policy):
    x0, noise = torch.randn(2, 2, *toy.SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return objective.loss(policy, toy.Wavy(), toy.batch(), Rollout(x0, noise), Draws(0, 3))


def test_with_relative_reward_and_inversion_it_is_srpo_to_the_bit():
    policy = toy.Field()
    a, b = (step_of(o, policy) for o in (SRPO(WORDS), DirectAlign(Relative(WORDS), inversion=True)))
    assert a.loss == b.loss
    for one, other in zip(toy.gradients(policy, a.loss), toy.gradients(policy, b.loss), strict=True):
        assert torch.equal(one, other)


def test_alone_it_is_one_step_from_injected_noise_under_the_plain_reward():
    policy, objective, conditions = toy.Field(), DirectAlign(margin=2.0), toy.batch()
    x0, noise = torch.randn(2, 2, *toy.SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b, _ = objective.branches(objective.positions(2, Draws(0, 3)), flow.schedule(50, 3.0))
    assert len(a) == 2
    assert (a > b).all()
    a, b = a.view(2, 1, 1, 1), b.view(2, 1, 1, 1)
    x_a = (1 - a) * x0 + a * noise
    x_b = x_a + (b - a) * policy(x_a, a.flatten(), conditions, 3.5)
    rewards = toy.Wavy()(policy.decode((x_b - b * noise) / (1 - b)), conditions.prompts)
    outcome = step_of(objective, policy)
    toy.assert_same_gradients(policy, outcome.loss, torch.relu(2.0 - rewards).mean())
    assert set(outcome.scalars) == {"reward_denoise", "sigma"}


def test_without_inversion_the_denoising_branch_is_srpos():
    policy = toy.Field()
    whole, half = step_of(SRPO(WORDS), policy), step_of(DirectAlign(Relative(WORDS)), policy)
    torch.testing.assert_close(half.scalars["reward_denoise"], whole.scalars["reward_denoise"], **toy.TOLERANCE)
    assert half.loss != whole.loss


def test_with_the_plain_reward_the_inversion_branch_penalises():
    policy = toy.Field()
    scalars = step_of(DirectAlign(Plain(), inversion=True, ground_truth_ratio=0.999), policy).scalars
    total = scalars["reward_denoise"] + scalars["reward_inversion"]
    assert abs(total) < 0.05 < abs(scalars["reward_denoise"])


def test_equal_ends_make_lambda_constant():
    objective = DirectAlign(denoise_lambda=(0.2, 0.2))
    weight = objective.branches(torch.arange(5, 996), flow.schedule(50, 3.0)).weight
    torch.testing.assert_close(weight, torch.full_like(weight, 0.2))


def test_a_late_window_trains_low_noise_only():
    sigma = DirectAlign(window=(40, 49)).branches(torch.arange(5, 996), flow.schedule(50, 3.0)).sigma
    assert sigma.max() < 0.43


def test_only_the_relative_form_needs_a_reward_that_reads_text():
    reward = toy.Wavy()
    reward.reads_text = False
    DirectAlign().check_reward(reward)
    with pytest.raises(ValueError, match="reads no text"):
        DirectAlign(Relative(WORDS)).check_reward(reward)
