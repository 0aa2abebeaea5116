"""SRPO against a second implementation of the algorithm in docs/algorithm.md: one sample at a time, in plain floats."""

from typing import NamedTuple

import pytest
import torch

from srpo_lightning import flow
from srpo_lightning.draws import Draws
from srpo_lightning.objectives import SRPO, ControlWords
from srpo_lightning.objectives.base import Rollout
from tests import tiny

WORDS = ControlWords(["x", "y"], ["z"])
GUIDANCE = 3.5
MARGIN = 0.7


class Reference(NamedTuple):
    """sigma and sigma_next of both branches, and their lambdas."""

    denoise: tuple[float, float, float]
    inversion: tuple[float, float, float]


def reference(mid: int, window=(5, 25), lam=(0.1, 0.25), inverse_lam=(0.3, 0.01)) -> Reference:
    def shift(s: float) -> float:
        return 3 * s / (1 + 2 * s)

    def line(start: float, end: float, position: int) -> float:
        return start + (end - start) * min(position, 999) / 999

    noisy, clean = (shift(1 - w / 50) for w in window)
    k = min(1000 - mid, mid, 100)
    inverse_mid = max(mid - k, 1)
    return Reference(
        (line(noisy, clean, 1000 - mid - k), line(noisy, clean, 1000 - mid), line(*lam, mid)),
        (
            line(noisy, clean, 1000 - inverse_mid),
            line(noisy, clean, 1000 - min(inverse_mid + k, 1000)),
            line(*inverse_lam, inverse_mid),
        ),
    )


PAPERS = {
    "HPSv2.1": ({}, {}),
    "PickScore": (
        {"window": (5, 30), "denoise_lambda": (0.1, 0.5), "inversion_lambda": (0.6, 0.01), "rollout_guidance": 2.0},
        {"window": (5, 30), "lam": (0.1, 0.5), "inverse_lam": (0.6, 0.01)},
    ),
}


@pytest.mark.parametrize("paper", PAPERS)
def test_levels_and_lambdas_of_every_position_equal_the_written_formula(paper):
    settings, constants = PAPERS[paper]
    mid = torch.arange(5, 996)
    branches = SRPO(WORDS, **settings).branches(mid, flow.schedule(50, 3.0))
    expected = [reference(int(m), **constants) for m in mid]
    expected = torch.tensor([r.denoise for r in expected] + [r.inversion for r in expected], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(list(branches), dim=1), expected, rtol=0, atol=1e-14)


def test_denoising_steps_down_and_inversion_up_inside_the_window():
    sigma, sigma_next, _ = SRPO(WORDS).branches(torch.arange(5, 996), flow.schedule(50, 3.0))
    (down, up), (down_next, up_next) = sigma.chunk(2), sigma_next.chunk(2)
    assert (down > down_next).all()
    assert (up < up_next).all()
    levels = torch.cat([sigma, sigma_next])
    assert levels.max() <= 27 / 28 + 1e-12
    assert levels.min() >= 0.75 - 1e-12


def in_double(models) -> tuple:
    policy, reward = tiny.new_policy(models).double(), tiny.new_reward(models.clip).double()
    policy.vae_dtype = torch.float64
    return policy, reward


def batch_of(policy, size: int) -> tuple:
    draw = torch.Generator().manual_seed(5)
    x0, noise = torch.randn(2, size, *policy.latent_shape(), generator=draw, dtype=torch.float64)
    return tiny.new_conditions(size, torch.float64), Rollout(x0, noise)


def gradients(policy) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in policy.transformer.parameters() if p.grad is not None])


def plain_loss(policy, reward, conditions, rollout, mids: list[int], words: tuple[str, str]) -> torch.Tensor:
    """The whole step as one autograd graph, sample by sample and branch by branch."""
    losses = []
    for i, mid in enumerate(mids):
        one = conditions._replace(
            prompts=conditions.prompts[i : i + 1],
            text=conditions.text.each(lambda rows, i=i: rows[i : i + 1]),
        )
        x0, noise = rollout.x0[i : i + 1], rollout.noise[i : i + 1]
        texts = [reward.text_features([f"{word}. {one.prompts[0]}"]) for word in words]
        for (a, b, lam), (towards, away) in zip(reference(mid), (texts, texts[::-1]), strict=True):
            x = (1 - a) * x0 + a * noise
            velocity = policy(x, torch.tensor([a], dtype=torch.float64), one, GUIDANCE)
            x0_hat = (x + (b - a) * velocity - b * noise) / (1 - b)
            f = reward.image_features(policy.decode(x0_hat))
            losses.append(torch.relu(MARGIN - (f * ((1 + lam) * towards - away)).sum()))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("reward_batch_size", [None, 1, 3])
@pytest.mark.parametrize("per_sample", [False, True])
def test_the_gradient_cut_in_two_equals_plain_autograd_end_to_end(models, reward_batch_size, per_sample):
    """Every parameter of the transformer, float64, through transformer, VAE and CLIP."""
    policy, reward = in_double(models)
    conditions, rollout = batch_of(policy, 2)
    objective = SRPO(WORDS, reward_batch_size=reward_batch_size, position_per_sample=per_sample)
    draws = Draws(0, 7)
    outcome = objective.loss(policy, reward, conditions, rollout, draws)
    outcome.loss.backward()
    ours = gradients(policy)
    policy.zero_grad()
    mids = objective.positions(2, draws).tolist()
    loss = plain_loss(policy, reward, conditions, rollout, mids, ("y", "z"))
    loss.backward()
    theirs = gradients(policy)
    assert theirs.norm() > 1e-6
    assert outcome.loss.item() == pytest.approx(loss.item(), abs=1e-12)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12 * float(theirs.abs().max()))


def test_a_batch_equals_its_samples_one_by_one(models):
    """Loss and gradient are means over the samples: no sample leaks into another."""
    policy, reward = in_double(models)
    conditions, rollout = batch_of(policy, 3)
    objective = SRPO(WORDS)
    outcome = objective.loss(policy, reward, conditions, rollout, Draws(0, 1))
    outcome.loss.backward()
    together = gradients(policy)
    policy.zero_grad()
    total = 0.0
    for i in range(3):
        one = conditions._replace(
            prompts=conditions.prompts[i : i + 1],
            text=conditions.text.each(lambda rows, i=i: rows[i : i + 1]),
        )
        own, draws = Rollout(rollout.x0[i : i + 1], rollout.noise[i : i + 1]), Draws(0, 1, micro_batch=i)
        loss = objective.loss(policy, reward, one, own, draws).loss
        (loss / 3).backward()
        total += loss.item() / 3
    apart = gradients(policy)
    assert outcome.loss.item() == pytest.approx(total, abs=1e-12)
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-12 * float(apart.abs().max()))
