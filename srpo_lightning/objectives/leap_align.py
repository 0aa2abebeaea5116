"""LeapAlign: two leaps in place of a trajectory (arXiv 2604.15311)."""

from collections.abc import Sequence

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from srpo_lightning import flow
from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.objectives.reward_forms import RewardForm
from srpo_lightning.objectives.trajectory import TrajectoryObjective, scale_gradient, with_value
from srpo_lightning.policies.base import Policy


class LeapAlign(TrajectoryObjective):
    """From a state of the rollout one leap to a later state, and from there one to the picture.

    Both leaps land on the rollout's own states, straight through, so that the reward sees the real picture. A sample
    whose leaps miss them by more weighs less.

    What the paper leaves open is as in github.com/RuoyuWang-2077/FlowBP (July 2026): the two states are drawn evenly
    among all pairs of them, and the distance of a leap from its state is the mean absolute one. The weight multiplies
    the gradient, and the loss is logged without it.

    Args:
        form: what is asked of the reward; None: the plain reward.
        num_steps: Euler steps of the whole trajectory.
        input_gradient: alpha, the share of the gradient that passes through the second leap's input.
        min_distance: tau, below which distances are taken for it.
        guidance: distilled guidance, of the rollout and of the trained steps alike.
        shift: of the noise levels; None takes the one of the model's scheduler.
        margin: the hinge `relu(margin - r)`; None: the loss is `-r`.
        shared_noise: all samples of a step, on every rank, have the same noise.
        reward_batch_size: images decoded and scored at once; None: the whole batch.

    Raises:
        ValueError: if there are no two steps to leap from.
    """

    def __init__(
        self,
        form: RewardForm | None = None,
        num_steps: PositiveInt = 25,
        input_gradient: ClosedUnitInterval = 0.3,
        min_distance: PositiveFloat = 0.1,
        guidance: NonNegativeFloat = 3.5,
        shift: PositiveFloat | None = None,
        margin: float | None = None,
        shared_noise: bool = False,
        reward_batch_size: PositiveInt | None = None,
    ) -> None:
        super().__init__(form, num_steps, guidance, shift, margin, shared_noise, reward_batch_size)
        if num_steps < 2:
            raise ValueError(f"num_steps is {num_steps}: two leaps start from two different steps, set 2 or more")
        self.input_gradient = input_gradient
        self.min_distance = min_distance

    def anchors(self, draws: Draws) -> tuple[int, int]:
        """The steps that the two leaps start from, the noisier first; the same for all samples and ranks."""
        first, second = draws.subset("anchors", [1.0] * self.num_steps, 2)
        return first, second

    def end(self, policy: Policy, conditions: Conditions, trajectory: Tensor, sigmas: Tensor, draws: Draws) -> Tensor:
        """`x_k -> x_j -> x_0`, each with the value of the rollout's own state."""
        k, j = self.anchors(draws)
        x_k, x_j, x_0 = trajectory[k], trajectory[j], trajectory[-1]
        leap_j = flow.step(x_k, self.velocity(policy, x_k, sigmas[k], conditions), sigmas[k], sigmas[j])
        through_j = with_value(leap_j, x_j)
        velocity = self.velocity(policy, scale_gradient(through_j, self.input_gradient), sigmas[j], conditions)
        leap_0 = flow.step(through_j, velocity, sigmas[j], sigmas[-1])
        near = nearness([(leap_j, x_j), (leap_0, x_0)], self.min_distance)
        return scale_gradient(with_value(leap_0, x_0), near)


def nearness(leaps: Sequence[tuple[Tensor, Tensor]], min_distance: float) -> Tensor:
    """One over the sum of the distances of leaps from the states they should have met; one number for each sample.

    Args:
        leaps: pairs of a leap's end and the state, each [B, ...].
        min_distance: tau, below which a distance, the mean absolute difference, is taken for it.
    """
    distances = [(leap - x).detach().abs().flatten(1).mean(1).clamp(min=min_distance) for leap, x in leaps]
    weight = 1 / torch.stack(distances).sum(0)
    return weight.view(-1, *[1] * (leaps[0][1].ndim - 1))
