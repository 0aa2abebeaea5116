"""Policies of a few numbers, in float64, and what it takes to compare an estimator with its formula written out."""

from itertools import pairwise

import torch
from torch import Tensor

from srpo_lightning import flow
from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.objectives import Rollout
from srpo_lightning.policies.base import Policy
from srpo_lightning.rewards import Reward
from tests import tiny

SHAPE = (3, 2, 2)
TOLERANCE = {"rtol": 1e-11, "atol": 1e-13}


class Field(Policy):
    """A velocity that is not linear in anything, of 12 + 12 x 12 numbers."""

    fingerprint = "Field"

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(12, 12, generator=draw, dtype=torch.float64) / 3)
        self.bias = torch.nn.Parameter(torch.randn(12, generator=draw, dtype=torch.float64))

    def load(self, shard=None):
        pass

    def restart(self):
        raise NotImplementedError

    def forward(self, x, sigma, conditions, guidance):
        level = sigma.double().unsqueeze(1)
        text = conditions.text.tensors["pooled_prompt_embeds"].double()[:, :12]
        out = torch.tanh(x.double().flatten(1) @ self.weight + level * self.bias + text) * guidance
        return out.view_as(x).to(x.dtype)

    def latent_shape(self, size=None):
        return SHAPE

    def decode(self, latents, size=None):
        return latents.sigmoid()

    def sigmas(self, num_steps, shift=None, size=None):
        return flow.schedule(num_steps, shift or 3.0)


class Point(Field):
    """The exact flow to one picture: every straight line ends at it."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.picture = torch.nn.Parameter(torch.randn(SHAPE, generator=draw, dtype=torch.float64))

    def forward(self, x, sigma, conditions, guidance):
        return (x - self.picture.to(x.dtype)) / sigma.view(-1, 1, 1, 1)


class Wavy(Reward):
    """A reward that is not linear, and another one for every text."""

    def forward(self, images, texts):
        lengths = torch.tensor([float(len(text)) for text in texts], dtype=images.dtype)
        return (3 * images.flatten(1).mean(1) + lengths).sin() + images[:, 0].square().mean((1, 2))


def batch(size: int = 2) -> Conditions:
    return tiny.new_conditions(size, torch.float64)


def levels(policy: Policy, num_steps: int, size: int) -> Tensor:
    return policy.sigmas(num_steps).unsqueeze(1).expand(-1, size)


@torch.no_grad()
def rollout(policy: Policy, objective, conditions: Conditions, draws: Draws) -> Rollout:
    """The whole trajectory in float64, cut where the objective stops."""
    draw = torch.Generator().manual_seed(2)
    noise = torch.randn(conditions.batch_size, *SHAPE, generator=draw, dtype=torch.float64)
    states, sigmas = [noise], levels(policy, objective.num_steps, conditions.batch_size)
    for a, b in list(pairwise(sigmas))[: objective.stop(draws)]:
        x = states[-1]
        states.append(x + (b - a).view(-1, 1, 1, 1) * policy(x, a, conditions, objective.guidance))
    return Rollout(states[-1], noise, torch.stack(states))


def gradients(policy: Policy, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True))


def assert_same_gradients(policy: Policy, a: Tensor, b: Tensor, **tolerance: float) -> None:
    for one, other in zip(gradients(policy, a), gradients(policy, b), strict=True):
        assert other.abs().max() > 1e-4
        torch.testing.assert_close(one, other, **tolerance or TOLERANCE)
