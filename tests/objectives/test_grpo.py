from contextlib import contextmanager

import pytest
import torch

from srpo_lightning import flow
from srpo_lightning.draws import Draws
from srpo_lightning.objectives import GRPO, DanceDiffusion, FlowDiffusion, Rollout
from srpo_lightning.objectives.grpo import advantages
from srpo_lightning.policies import FluxPolicy, Lora
from tests.objectives import toy

SETTINGS = {"num_steps": 6, "group_size": 4, "guidance": 0.7}
each_diffusion = pytest.mark.parametrize("diffusion", [DanceDiffusion(0.7), FlowDiffusion(0.7)], ids=["dance", "flow"])


def sampled(objective, conditions=None):
    policy, conditions = toy.Field(), conditions or toy.batch()
    return policy, conditions, objective.rollout(policy, conditions, Draws(0, 1))


@each_diffusion
def test_the_sde_has_the_marginals_of_the_flow(diffusion):
    """x0 ~ N(m, s^2): x_sigma ~ N((1 - sigma) m, (1 - sigma)^2 s^2 + sigma^2), by the flow and by the SDE."""
    m, s, num_steps, count = 1.5, 0.4, 300, 40_000
    sigmas = flow.schedule(num_steps, 1.0).unsqueeze(1).expand(-1, count)
    draw = torch.Generator().manual_seed(0)
    random = ode = torch.randn(count, 1, generator=draw, dtype=torch.float64)

    def velocity(x, sigma):
        sigma = sigma.unsqueeze(1)
        variance = (1 - sigma) ** 2 * s**2 + sigma**2
        return -m + (sigma - (1 - sigma) * s**2) / variance * (x - (1 - sigma) * m)

    g = diffusion(sigmas)
    for i in range(num_steps - 1):
        mean, std = flow.random_step(random, velocity(random, sigmas[i]), sigmas[i], sigmas[i + 1], g[i])
        random = mean + std * torch.randn(count, 1, generator=draw, dtype=torch.float64)
        ode = flow.step(ode, velocity(ode, sigmas[i]), sigmas[i], sigmas[i + 1])
        if i + 1 in (150, 240, num_steps - 1):
            sigma = float(sigmas[i + 1, 0])
            expected = ((1 - sigma) ** 2 * s**2 + sigma**2) ** 0.5
            for x in (random, ode):
                assert float(x.mean()) == pytest.approx((1 - sigma) * m, abs=0.015)
                assert float(x.std()) == pytest.approx(expected, abs=0.015)
    correlation = torch.corrcoef(torch.cat([random, ode], dim=1).T)[0, 1]
    assert correlation < 0.9  # the paths are others all the same


def test_without_diffusion_a_random_step_is_the_flows():
    x, v = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = torch.full((3,), 0.6, dtype=torch.float64), torch.full((3,), 0.4, dtype=torch.float64)
    mean, std = flow.random_step(x, v, a, b, torch.zeros_like(a))
    assert torch.equal(mean, flow.step(x, v, a, b))
    assert not std.any()


def test_the_mean_is_flow_grpos_closed_form():
    """x (1 + g^2 dt / (2 sigma)) + v (1 + g^2 (1 - sigma) / (2 sigma)) dt, and noise g sqrt(-dt)."""
    x, v = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.0], dtype=torch.float64).unsqueeze(1).expand(-1, 3)
    g = FlowDiffusion(0.9)(sigmas)
    torch.testing.assert_close(g[0], torch.full_like(g[0], 0.9 * 5**0.5))
    torch.testing.assert_close(g[1], torch.full_like(g[1], 0.9 * 2))
    for i in range(3):
        sigma, dt, std = sigmas[i, 0], sigmas[i + 1, 0] - sigmas[i, 0], g[i, 0]
        mean, noise = flow.random_step(x, v, sigmas[i], sigmas[i + 1], g[i])
        closed = x * (1 + std**2 / (2 * sigma) * dt) + v * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
        torch.testing.assert_close(mean, closed, rtol=0, atol=1e-13)
        torch.testing.assert_close(noise, (std * (-dt).sqrt()).expand_as(noise))


def test_the_log_probability_is_the_normal_distributions():
    x, mean = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    std = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64).view(3, 1, 1)
    expected = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x).mean((1, 2))
    torch.testing.assert_close(flow.log_prob(x, mean, std), expected, rtol=0, atol=1e-13)
    assert flow.log_prob(x.bfloat16(), mean.bfloat16(), std.bfloat16()).dtype == torch.float32


@each_diffusion
def test_before_the_first_update_every_ratio_is_exactly_one_and_after_it_none_is(diffusion):
    objective = GRPO(diffusion=diffusion, **SETTINGS)
    policy, conditions, rollout = sampled(objective)
    arguments = policy, toy.Wavy(), conditions, rollout, Draws(0, 1)
    assert objective.loss(*arguments).scalars["ratio_error"] == 0
    with torch.no_grad():
        policy.weight += 0.01
    assert objective.loss(*arguments).scalars["ratio_error"] > 0


def test_the_gradient_is_the_policy_gradient():
    """Of the mean of advantage times log-probability over trained steps and samples."""
    objective = GRPO(**SETTINGS)
    policy, conditions, drawn = sampled(objective)
    groups, draws = conditions.repeat(4), Draws(0, 1)
    rollout = Rollout(*(part.double() for part in drawn[:4]))
    rewards = toy.Wavy()(policy.decode(rollout.x0), groups.prompts).view(4, 2)
    advantage = ((rewards - rewards.mean(0)) / (rewards.std(0) + 1e-8)).flatten().detach()
    sigmas, terms = policy.sigmas(6, 3.0), []
    for b, steps in enumerate(objective.trained_steps(draws, 2).T.tolist()):
        for i in steps:
            x, sigma, dt = rollout.trajectory[i, b], sigmas[i], sigmas[i + 1] - sigmas[i]
            v = policy(x.unsqueeze(0), sigma.expand(1), groups.take(slice(b, b + 1)), 0.7)[0]
            score = -(x - (x - sigma * v) * (1 - sigma)) / sigma**2
            mean = x + dt * v - 0.3**2 / 2 * score * dt
            normal = torch.distributions.Normal(mean, 0.3 * (-dt).sqrt())
            terms.append(advantage[b] * normal.log_prob(rollout.trajectory[i + 1, b]).mean())
    loss = objective.loss(policy, toy.Wavy(), conditions, rollout, draws).loss
    # The ratios of float32 log-probabilities are 1 to 1e-6 in float64.
    toy.assert_same_gradients(policy, loss, -torch.stack(terms).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("log_ratio", "moves"), [(0.5, False), (-0.5, True)])
def test_a_ratio_that_has_left_the_range_is_clipped_where_that_lowers_the_gain(log_ratio, moves):
    """A sample that beats its group gives no gradient above 1 + range, and one that loses none below 1 - range."""
    objective = GRPO(**SETTINGS | {"clip_range": 0.1})
    policy, conditions, rollout = sampled(objective)

    class First(toy.Wavy):
        def forward(self, images, texts):
            return torch.arange(len(images), 0.0, -1)

    beats = torch.tensor([True] * 4 + [False] * 4)
    shifted = rollout._replace(log_probs=rollout.log_probs - torch.where(beats, log_ratio, -log_ratio))
    loss = objective.loss(policy, First(), conditions, shifted, Draws(0, 1)).loss
    assert any(bool(g.abs().max() > 0) for g in toy.gradients(policy, loss)) == moves


def test_advantages_have_mean_0_and_deviation_1_in_every_group_and_are_clipped():
    rewards = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 7 + 3
    normal = advantages(rewards, 5.0)
    torch.testing.assert_close(normal.mean(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(normal.std(0), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-7)
    assert advantages(rewards, 0.5).abs().max() == 0.5
    assert not advantages(torch.ones(4, 2), 5.0).any()


def test_a_group_shares_its_first_noise_if_asked_and_never_its_steps():
    for shared in (True, False):
        _, _, rollout = sampled(GRPO(shared_noise=shared, **SETTINGS))
        groups = rollout.noise.view(4, 2, *toy.SHAPE)
        assert torch.equal(groups[0], groups[1]) == shared
        assert not torch.equal(groups[:, 0], groups[:, 1])
        assert len(rollout.x0.flatten(1).unique(dim=0)) == 8


def test_a_prompts_rollouts_do_not_depend_on_how_prompts_are_divided_over_ranks():
    objective, policy, both = GRPO(**SETTINGS), toy.Field(), toy.batch()
    together = objective.rollout(policy, both, Draws(0, 1)).trajectory.unflatten(1, (4, 2))
    for rank in range(2):
        alone = objective.rollout(policy, both.take(slice(rank, rank + 1)), Draws(0, 1, rank)).trajectory
        torch.testing.assert_close(alone, together[:, :, rank], rtol=1e-6, atol=1e-6)


def test_the_last_step_is_the_flows_and_not_trained():
    objective = GRPO(timestep_fraction=1.0, **SETTINGS)
    policy, conditions, rollout = sampled(objective)
    assert objective.trained_steps(Draws(0), 2).sort(0).values.tolist() == [[i] * 8 for i in range(5)]
    assert rollout.log_probs.shape == (5, 8)
    x, sigma = rollout.trajectory[-2], policy.sigmas(6)[-2].float()
    x0 = x - sigma * policy(x, sigma.expand(8), conditions.repeat(4), 0.7)
    torch.testing.assert_close(rollout.x0, x0)


def test_every_sample_trains_steps_of_its_own_drawn_anew_at_every_update():
    objective = GRPO()
    drawn = torch.stack([objective.trained_steps(Draws(0, step), 2) for step in range(10)])
    assert drawn.shape == (10, 9, 24)  # 0.6 of 15
    assert (drawn.sort(1).values.diff(dim=1) > 0).all()
    assert drawn.unique().tolist() == list(range(15))
    assert len(drawn.transpose(1, 2).flatten(0, 1).unique(dim=0)) == 240
    by_rank = [objective.trained_steps(Draws(0, 3, rank=rank), 1).view(9, 12) for rank in range(2)]
    assert torch.equal(torch.stack(by_rank, dim=2), drawn[3].view(9, 12, 2))


@pytest.mark.parametrize("split", [True, False])
def test_several_updates_divide_every_group_or_train_all_of_it_at_other_steps(split):
    """Over its updates each sample is trained once, or every time."""
    objective = GRPO(split_groups=split, timestep_fraction=1.0, **SETTINGS)
    policy, conditions, drawn = sampled(objective)
    rollout = Rollout(*(part.double() for part in drawn[:4]))

    def gradients(turn):
        loss = objective.loss(policy, toy.Wavy(), conditions, rollout._replace(turn=turn), Draws(0, 1)).loss
        return torch.cat([g.flatten() for g in toy.gradients(policy, loss)])

    whole, halves = gradients((0, 1)), [gradients((u, 2)) for u in range(2)]
    torch.testing.assert_close(sum(halves) / 2, whole, rtol=1e-9, atol=1e-12)
    assert torch.allclose(halves[0], halves[1]) != split
    assert objective.rows_of((1, 2), 2) == (slice(4, 8) if split else slice(0, 8))


def test_updates_that_do_not_divide_a_group_are_refused():
    with pytest.raises(ValueError, match="set split_groups to false"):
        GRPO(**SETTINGS).check_updates(3)
    GRPO(split_groups=False, **SETTINGS).check_updates(3)
    GRPO(**SETTINGS).check_updates(2)


class Adapted(toy.Field):
    """Keeps what it was before training."""

    has_reference = True

    @contextmanager
    def as_reference(self):
        with torch.no_grad():
            self.weight -= 0.1
            try:
                yield
            finally:
                self.weight += 0.1


def test_the_divergence_is_the_normal_distributions():
    mean, other = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    std = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64).view(3, 1, 1)
    p, q = (torch.distributions.Normal(each, std.expand_as(mean)) for each in (mean, other))
    expected = torch.distributions.kl_divergence(p, q).mean((1, 2))
    torch.testing.assert_close(flow.normal_kl(mean, other, std), expected, rtol=1e-12, atol=0)


def test_the_penalty_is_the_divergence_from_the_base_over_the_trained_steps():
    policy, conditions = Adapted(), toy.batch()
    plain, penalised = GRPO(**SETTINGS), GRPO(kl_weight=0.3, **SETTINGS)
    drawn = plain.rollout(policy, conditions, Draws(0, 1))
    rollout, draws, groups = Rollout(*(part.double() for part in drawn[:4])), Draws(0, 1), conditions.repeat(4)
    losses = [o.loss(policy, toy.Wavy(), conditions, rollout, draws) for o in (plain, penalised)]
    sigmas, kls = policy.sigmas(6, 3.0), []
    for b, steps in enumerate(plain.trained_steps(draws, 2).T.tolist()):
        for i in steps:
            x, sigma, dt = rollout.trajectory[i, b].unsqueeze(0), sigmas[i], sigmas[i + 1] - sigmas[i]
            group = groups.take(slice(b, b + 1))
            with policy.as_reference():
                reference = policy(x, sigma.expand(1), group, 0.7)
            gap = policy(x, sigma.expand(1), group, 0.7) - reference
            # mean = x + v dt - g^2 score dt / 2 and score = -(x + (1 - sigma) v) / sigma
            gap = gap * dt * (1 + 0.3**2 * (1 - sigma) / (2 * sigma))
            kls.append((gap / (0.3 * (-dt).sqrt())).square().mean() / 2)
    kl = torch.stack(kls).mean()
    torch.testing.assert_close(losses[1].scalars["kl"], kl.detach(), rtol=1e-9, atol=0)
    difference = losses[1].loss - losses[0].loss
    toy.assert_same_gradients(policy, difference, 0.3 * kl, rtol=1e-6, atol=1e-9)


def test_a_penalty_is_refused_where_nothing_keeps_the_base():
    with pytest.raises(ValueError, match="train an adapter"):
        GRPO(kl_weight=0.1).check_policy(toy.Field())
    GRPO().check_policy(toy.Field())


@pytest.mark.parametrize(
    ("settings", "cure"),
    [({"group_size": 1}, "set 2 or more"), ({"num_steps": 2, "timestep_fraction": 0.5}, "raise either")],
)
def test_a_setting_that_cannot_work_is_refused_with_its_cure(settings, cure):
    with pytest.raises(ValueError, match=cure):
        GRPO(**settings)


def test_pictures_in_place_of_trajectories_are_refused():
    with pytest.raises(ValueError, match=r"leave it and data\.images out"):
        sampled(GRPO(**SETTINGS), toy.batch()._replace(x0=torch.zeros(2, 1, 1)))


@pytest.mark.parametrize("settings", [{"rollout_cache": 0.2}, {"adapter": Lora(rank=2, dropout=0.1)}])
def test_a_rollout_by_another_model_than_is_trained_is_refused(models, settings):
    policy = FluxPolicy(str(models.pipeline), 32, 32, **settings)
    with pytest.raises(ValueError, match=r"two models: set rollout_cache to null and dropout to 0"):
        GRPO().check_policy(policy)
