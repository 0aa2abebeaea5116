"""The compute of a training step in forward passes of the policy, counted by running the objective without a model."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from srpo_lightning import flow
from srpo_lightning.batch import Conditions, Size, Text
from srpo_lightning.draws import Draws
from srpo_lightning.objectives.base import Objective
from srpo_lightning.policies.base import Policy, Shard
from srpo_lightning.rewards.base import Reward

BACKWARD = 2
"""Forward passes that a backward pass is worth: one product for the inputs, one for the weights."""


class Forwards(NamedTuple):
    """Forward passes of the policy on one sample.

    Args:
        rollout: of the part without gradient.
        update: of the loss and its backward pass.
    """

    rollout: float
    update: float


def count_forwards(objective: Objective, batch_size: int, seed: int, steps: Iterable[int], is_real: bool) -> Forwards:
    """The mean over these steps, with the very draws that training makes.

    Args:
        objective: how is trained.
        batch_size: prompts of a step.
        seed: of the run.
        steps: their numbers.
        is_real: whether they train on real pictures.
    """
    policy, reward, numbers = _Counter(), _Reward(), list(steps)
    latents = torch.zeros(batch_size, *policy.latent_shape())
    features = torch.zeros(batch_size, 1, 1)
    conditions = Conditions(
        [""] * batch_size, Text({"none": features}), torch.arange(batch_size), x0=latents if is_real else None
    )
    rollouts = 0
    for step in numbers:
        draws, before = Draws(seed, step), policy.count
        rollout = objective.rollout(policy, conditions, draws)
        rollouts += policy.count - before
        objective.loss(policy, reward, conditions, rollout, draws).loss.backward()
    return Forwards(rollouts / len(numbers), (policy.count - rollouts) / len(numbers))


class _Counter(Policy):
    """One weight, and a count of what it is asked."""

    fingerprint = "counter"

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.count = 0

    def load(self, shard: Shard | None = None) -> None:
        """Nothing to read."""

    def restart(self) -> None:
        """Nothing was trained."""

    def forward(self, x: Tensor, sigma: Tensor, conditions: Conditions, guidance: float) -> Tensor:
        """Counts; a step that is checkpointed is asked twice, and its gradient comes once."""
        self.count += len(x)
        velocity = self.weight * x
        if velocity.requires_grad:
            velocity.register_hook(self._count_backward)
        return velocity

    def latent_shape(self, size: Size | None = None) -> tuple[int, ...]:
        """One token with a number per colour."""
        return 1, 3

    def decode(self, latents: Tensor, size: Size | None = None) -> Tensor:
        """A pixel."""
        return latents.view(-1, 3, 1, 1)

    def sigmas(self, num_steps: int, shift: float | None = None, size: Size | None = None) -> Tensor:
        """Of any shift: steps are counted, not taken."""
        return flow.schedule(num_steps, shift or 1.0)

    def _count_backward(self, gradient: Tensor) -> None:
        self.count += BACKWARD * len(gradient)


class _Reward(Reward):
    def forward(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))
