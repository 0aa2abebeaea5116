"""What objectives share that learn by the reward's gradient from the policy's own Euler trajectory.

Each of them is one formula for `x0_hat`, the end of the trajectory as a differentiable function of the policy.
"""

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from srpo_lightning import flow
from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.objectives.base import Objective, Outcome, Rollout, refuse_pictures, reward_gradient, surrogate
from srpo_lightning.objectives.reward_forms import Plain, RewardForm
from srpo_lightning.policies.base import Policy
from srpo_lightning.rewards.base import Reward


class TrajectoryObjective(Objective):
    """A rollout that is kept, an end point with a graph, and the gradient of a reward there.

    Args:
        form: what is asked of the reward; None: the plain reward.
        num_steps: Euler steps of the whole trajectory, N.
        guidance: distilled guidance, of the rollout and of the trained steps alike.
        shift: of the noise levels; None takes the one of the model's scheduler.
        margin: the hinge `relu(margin - r)`: a reward above it has no gradient; None: the loss is `-r`.
        shared_noise: all samples of a step, on every rank, have the same noise.
        reward_batch_size: images decoded and scored at once; None: the whole batch.
    """

    def __init__(
        self,
        form: RewardForm | None = None,
        num_steps: PositiveInt = 25,
        guidance: NonNegativeFloat = 3.5,
        shift: PositiveFloat | None = None,
        margin: float | None = None,
        shared_noise: bool = False,
        reward_batch_size: PositiveInt | None = None,
    ) -> None:
        self.form = form or Plain()
        self.num_steps = num_steps
        self.guidance = guidance
        self.shift = shift
        self.margin = margin
        self.shared_noise = shared_noise
        self.reward_batch_size = reward_batch_size

    def stop(self, draws: Draws) -> int:
        """How many steps of the trajectory run without gradient; all, unless the method stops before."""
        return self.num_steps

    @abstractmethod
    def end(
        self, policy: Policy, conditions: Conditions, trajectory: Tensor, sigmas: Tensor, draws: Draws
    ) -> Float[Tensor, "M *rest"]:
        """The method: clean latents with a graph, one or several whole copies of the batch.

        Args:
            policy: what is trained.
            conditions: of the B samples.
            trajectory: [n + 1, B, ...], the latents at `sigmas[0]` to `sigmas[n]`, n = `stop(draws)`, without graph.
            sigmas: [N + 1, B], the noise levels.
            draws: of the step.
        """

    def check_pictures(self) -> None:
        """They have no trajectory."""
        refuse_pictures(self)

    @torch.no_grad()
    def rollout(self, policy: Policy, conditions: Conditions, draws: Draws) -> Rollout:
        """The trajectory, as far as it runs without gradient."""
        if conditions.x0 is not None:
            self.check_pictures()
        shape = (conditions.batch_size, *policy.latent_shape(conditions.size))
        noise = draws.noise(shape, shared=self.shared_noise).to(conditions.device, non_blocking=True)
        states, sigmas = [noise], self.sigmas(policy, conditions, noise)
        for sigma, sigma_next in pairwise(sigmas[: self.stop(draws) + 1]):
            states.append(
                flow.step(states[-1], self.velocity(policy, states[-1], sigma, conditions), sigma, sigma_next)
            )
        return Rollout(states[-1], noise, torch.stack(states))

    def loss(self, policy: Policy, reward: Reward, conditions: Conditions, rollout: Rollout, draws: Draws) -> Outcome:
        """The mean loss of the rewards at the end points."""
        assert rollout.trajectory is not None
        sigmas = self.sigmas(policy, conditions, rollout.noise)
        x0_hat = self.end(policy, conditions, rollout.trajectory, sigmas, draws)
        copies = conditions.repeat(len(x0_hat) // conditions.batch_size)

        def reward_of(latents: Tensor, rows: slice) -> Tensor:
            return self.form(reward, policy.decode(latents, conditions.size), copies.take(rows), draws)

        def loss_of(rewards: Tensor) -> Tensor:
            return -rewards if self.margin is None else torch.relu(self.margin - rewards)

        pull = reward_gradient(x0_hat, reward_of, loss_of, self.reward_batch_size)
        return Outcome(surrogate(pull, x0_hat), {"reward": pull.rewards.mean()})

    def sigmas(self, policy: Policy, conditions: Conditions, like: Tensor) -> Float[Tensor, "N B"]:
        """The schedule's levels, one for each sample, in the dtype and on the device of `like`."""
        sigmas = policy.sigmas(self.num_steps, self.shift, conditions.size).to(like, non_blocking=True)
        return sigmas.unsqueeze(1).expand(-1, len(like))

    def velocity(self, policy: Policy, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """The policy's, under the objective's guidance."""
        velocity: Tensor = policy(x, sigma, conditions, self.guidance)
        return velocity

    def velocities(
        self, policy: Policy, conditions: Conditions, states: Tensor, sigmas: Tensor, indices: Sequence[int]
    ) -> dict[int, Tensor]:
        """The velocities at several steps of the trajectory, by step, in one batch."""
        x, sigma = states[list(indices)].flatten(0, 1), sigmas[list(indices)].flatten()
        each = self.velocity(policy, x, sigma, conditions.repeat(len(indices))).chunk(len(indices))
        return dict(zip(indices, each, strict=True))

    def score(self, reward: Reward, images: Tensor, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """What the form rewards."""
        return self.form.score(reward, images, prompts)

    def check_reward(self, reward: Reward) -> None:
        """Refuse a reward that the form cannot use."""
        self.form.check(reward)


def with_value(x_hat: Tensor, x: Tensor) -> Tensor:
    """Straight-through: the value of `x`, the gradient of `x_hat`."""
    return x_hat + (x - x_hat).detach()


def scale_gradient(x: Tensor, factor: float | Tensor) -> Tensor:
    """`factor x + (1 - factor) sg(x)`: the value of `x`, its gradient times `factor`."""
    return factor * x + (1 - factor) * x.detach()
