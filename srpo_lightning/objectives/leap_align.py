"""LeapAlign, two leaps in place of a trajectory: `x_k -> x_j -> x_0` (arXiv 2604.15311).

A leap is one long Euler step, `x_j_hat = x_k + (sigma_j - sigma_k) v(x_k)`. The names of both techniques around it,
trajectory similarity and gradient discounting, are the paper's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveFloat
from torch import Tensor

from srpo_lightning import flow
from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.objectives.trajectory import RewardGradientObjective, scale_gradient, straight_through
from srpo_lightning.policies.base import Policy


@dataclass(kw_only=True)
class LeapAlign(RewardGradientObjective):
    """From a state of the rollout one leap to a later state, and from there one to the picture.

    Both leaps land on the rollout's own states, straight through, so that the reward sees the real picture. A sample
    whose leaps miss them by more weighs less.

    What the paper leaves open is as in github.com/RuoyuWang-2077/FlowBP (July 2026). The two states are drawn evenly
    among all pairs of them. The distance of a leap from its state is the mean absolute one. The weight multiplies the
    gradient, and the loss is logged without it.

    Args:
        input_gradient: Share alpha of the gradient that passes through the second leap's input.
        min_distance: Distance tau between a leap and its state below which it counts as tau.

    Raises:
        ValueError: if there are too few steps to leap from.
    """

    paper: ClassVar[str | None] = "2604.15311"

    input_gradient: ClosedUnitInterval = 0.3
    min_distance: PositiveFloat = 0.1

    def __post_init__(self) -> None:
        """Refuse a trajectory without two states to leap from."""
        super().__post_init__()
        if self.num_steps < 2:
            raise ValueError(f"num_steps is {self.num_steps}: two leaps start from two different steps, set 2 or more")

    def anchors(self, draws: Draws) -> tuple[int, int]:
        """Steps k < j that the two leaps start from; the same for all samples and ranks."""
        k, j = draws.subset("anchors", [1.0] * self.num_steps, 2)
        return k, j

    def x0_hat(
        self, policy: Policy, conditions: Conditions, trajectory: Tensor, sigmas: Tensor, draws: Draws
    ) -> Tensor:
        """`x_k -> x_j -> x_0` with the values of the rollout's own states; the second leap reads x_j alpha-mixed."""
        k, j = self.anchors(draws)
        x_k, x_j, x_0 = trajectory[k], trajectory[j], trajectory[-1]
        leap_j = flow.step(x_k, self.velocity(policy, x_k, sigmas[k], conditions), sigmas[k], sigmas[j])
        through_j = straight_through(leap_j, x_j)
        velocity = self.velocity(policy, scale_gradient(through_j, self.input_gradient), sigmas[j], conditions)
        leap_0 = flow.step(through_j, velocity, sigmas[j], sigmas[-1])
        weight = trajectory_similarity([(leap_j, x_j), (leap_0, x_0)], self.min_distance)
        return scale_gradient(straight_through(leap_0, x_0), weight)


def trajectory_similarity(leaps: Sequence[tuple[Tensor, Tensor]], min_distance: float) -> Tensor:
    """`1 / (d_j + d_0)`, one over the distances of leaps from the states that they should have met.

    Args:
        leaps: Pairs of a leap's end and the state, each [B, ...].
        min_distance: Distance tau, a mean absolute difference, below which it counts as tau.

    Returns:
        One number for each sample, [B, 1, ...].
    """
    distances = [(leap - x).detach().abs().flatten(1).mean(1).clamp(min=min_distance) for leap, x in leaps]
    weight = 1 / torch.stack(distances).sum(0)
    return weight.view(-1, *[1] * (leaps[0][1].ndim - 1))
