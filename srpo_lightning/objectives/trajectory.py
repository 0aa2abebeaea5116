"""What objectives share that learn from the policy's own trajectory, `x_{i+1} = x_i + (sigma_{i+1} - sigma_i) v_i`.

Most of them are one formula for `x0_hat`, the end of the trajectory as a differentiable function of the policy.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from jsonargparse.typing import PositiveInt
from torch import Tensor

from srpo_lightning import flow
from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.objectives.base import FormObjective, Outcome, Rollout, reward_gradient, surrogate
from srpo_lightning.policies.base import Policy
from srpo_lightning.rewards.base import Reward


@dataclass(kw_only=True)
class TrajectoryObjective(FormObjective):
    """A rollout whose states are kept.

    Args:
        num_steps: Number N of steps of the whole trajectory, from noise to picture.
    """

    num_steps: PositiveInt = 25

    def check_pictures(self) -> None:
        """Refuse real pictures: they have no trajectory.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__} learns from the policy's own trajectories, and data.offline_ratio gives real "
            "pictures in their place: leave it and data.images out, or train with SRPO or DirectAlign"
        )

    def sigmas(self, policy: Policy, conditions: Conditions, like: Tensor) -> Float[Tensor, "N B"]:
        """The schedule's noise levels, N + 1 for each sample, in the dtype and on the device of `like`."""
        sigmas = policy.sigmas(self.num_steps, self.shift, conditions.size).to(like, non_blocking=True)
        return sigmas.unsqueeze(1).expand(-1, len(like))

    def velocity(self, policy: Policy, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """The policy's velocity under the objective's guidance."""
        velocity: Tensor = policy(x, sigma, conditions, self.guidance)
        return velocity


@dataclass(kw_only=True)
class RewardGradientObjective(TrajectoryObjective):
    """The gradient of a reward at a differentiable end of the trajectory.

    Args:
        margin: Margin of the hinge loss `relu(margin - r)`: a reward above it has no gradient. With null the loss is
            `-r`.
    """

    margin: float | None = None

    def stop(self, draws: Draws) -> int:
        """How many steps of the trajectory run without gradient; all, unless the method stops before."""
        return self.num_steps

    @abstractmethod
    def x0_hat(
        self, policy: Policy, conditions: Conditions, trajectory: Tensor, sigmas: Tensor, draws: Draws
    ) -> Float[Tensor, "M *rest"]:
        """The method: clean latents with a graph, one or several copies of the batch.

        Args:
            policy: Policy that is trained.
            conditions: Conditions of the B samples.
            trajectory: Latents [n + 1, B, ...] at sigmas[0] to sigmas[n], n = `stop(draws)`, without graph.
            sigmas: Noise levels [N + 1, B].
            draws: Random numbers of the step.
        """

    @torch.no_grad()
    def rollout(self, policy: Policy, conditions: Conditions, draws: Draws) -> Rollout:
        """The trajectory, as far as it runs without gradient."""
        if conditions.x0 is not None:
            self.check_pictures()
        shape = (conditions.batch_size, *policy.latent_shape(conditions.size))
        noise = draws.noise(shape, shared=self.shared_noise).to(conditions.device, non_blocking=True)
        states, sigmas = [noise], self.sigmas(policy, conditions, noise)
        for sigma, sigma_next in pairwise(sigmas[: self.stop(draws) + 1]):
            velocity = self.velocity(policy, states[-1], sigma, conditions)
            states.append(flow.step(states[-1], velocity, sigma, sigma_next))
        return Rollout(states[-1], noise, torch.stack(states))

    def loss(self, policy: Policy, reward: Reward, conditions: Conditions, rollout: Rollout, draws: Draws) -> Outcome:
        """The mean over samples of `relu(margin - r(x0_hat))`, or of `-r(x0_hat)`."""
        assert rollout.trajectory is not None
        sigmas = self.sigmas(policy, conditions, rollout.noise)
        x0_hat = self.x0_hat(policy, conditions, rollout.trajectory, sigmas, draws)
        copies = conditions.repeat(len(x0_hat) // conditions.batch_size)

        def reward_of(latents: Tensor, rows: slice) -> Tensor:
            return self.rewards(policy, reward, latents, copies.take(rows), draws)

        def loss_of(rewards: Tensor) -> Tensor:
            return -rewards if self.margin is None else torch.relu(self.margin - rewards)

        feedback = reward_gradient(x0_hat, reward_of, loss_of, self.reward_batch_size)
        return Outcome(surrogate(feedback, x0_hat), {"reward": feedback.rewards.mean()})

    def velocities(
        self, policy: Policy, conditions: Conditions, states: Tensor, sigmas: Tensor, steps: Sequence[int]
    ) -> dict[int, Tensor]:
        """The velocities at several steps of the trajectory, by step, computed as one batch."""
        x, sigma = states[list(steps)].flatten(0, 1), sigmas[list(steps)].flatten()
        velocities = self.velocity(policy, x, sigma, conditions.repeat(len(steps))).chunk(len(steps))
        return dict(zip(steps, velocities, strict=True))


def straight_through(x_hat: Tensor, x: Tensor) -> Tensor:
    """`x_hat + sg(x - x_hat)`: the value of `x`, the gradient of `x_hat`."""
    return x_hat + (x - x_hat).detach()


def scale_gradient(x: Tensor, factor: float | Tensor) -> Tensor:
    """`factor x + (1 - factor) sg(x)`: the value of `x`, its gradient times `factor`."""
    return factor * x + (1 - factor) * x.detach()
