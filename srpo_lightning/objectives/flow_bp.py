"""FlowBP: back-propagation through a few velocities of a cached rollout (arXiv 2606.11075).

In all three forms the reward sees the rollout's real end point, straight through. The gradient reaches it through
`x0_hat`, a sum of a few velocities that are computed again. The forms differ in the sum: `x0_hat = noise + sum_i
(sigma_{i+1} - sigma_i) v_i` in Sparse and Bridge, `x + sum_i w_i v_i` with quadrature weights w over each leap in
Lagrange. The steps drawn are the same for all samples and ranks.

Source of forms and defaults: the authors' repository, github.com/RuoyuWang-2077/FlowBP, as of July 2026: its trainers
and its configurations for FLUX.1. There guidance is 4 and the margin .55, for HPSv2.1, as well.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from srpo_lightning import flow
from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.objectives.leap_align import LeapAlign, trajectory_similarity
from srpo_lightning.objectives.trajectory import RewardGradientObjective, scale_gradient, straight_through
from srpo_lightning.policies.base import Policy


@dataclass(kw_only=True)
class FlowBPSparse(RewardGradientObjective):
    """FlowBP-Sparse: `x0_hat = noise + sum_i (sigma_{i+1} - sigma_i) v_i`, of which K velocities carry gradient.

    Inputs are the cached states; velocities that are not trained are the cached ones.

    Args:
        num_trained_steps: Number K of velocities that carry gradient; FlowBP-Bridge trains 2 or more.
        late_bias: Exponent of the preference for late steps: step i is drawn in proportion to (i + 1) to this power.
        gradient_rescale: Degree, from 0, to which trained velocities stand in for the others. At 0 their gradient is
            left alone. At 1 it is multiplied by the length of the whole trajectory over that of the trained steps.

    Raises:
        ValueError: if there are fewer steps than are to be trained.
    """

    paper: ClassVar[str | None] = "2606.11075"

    min_trained_steps: ClassVar[int] = 1

    num_trained_steps: PositiveInt = 3
    late_bias: NonNegativeFloat = 2.0
    gradient_rescale: NonNegativeFloat = 1.0

    def __post_init__(self) -> None:
        """Refuse steps that are not there."""
        super().__post_init__()
        if not self.min_trained_steps <= self.num_trained_steps <= self.num_steps:
            raise ValueError(
                f"num_trained_steps is {self.num_trained_steps}: {type(self).__name__} trains {self.min_trained_steps} "
                f"or more, and at most all {self.num_steps} (num_steps)"
            )

    def x0_hat(
        self, policy: Policy, conditions: Conditions, trajectory: Tensor, sigmas: Tensor, draws: Draws
    ) -> Tensor:
        """The rollout's end, with the gradient of the sum."""
        steps = self.draw_steps(draws, "support", 0, self.num_steps, self.num_trained_steps)
        velocities = self.velocities(policy, conditions, trajectory, sigmas, steps)
        return _euler_sum(trajectory[-1], trajectory, sigmas, velocities, self.gain(sigmas, steps))

    def draw_steps(self, draws: Draws, purpose: str, start: int, stop: int, count: int) -> list[int]:
        """`count` different steps of start..stop - 1, in order; later ones, counted from `start`, are likelier."""
        if not count:
            return []
        weights = [(i + 1) ** self.late_bias for i in range(stop - start)]
        return [start + i for i in draws.subset(purpose, weights, count)]

    def gain(self, sigmas: Tensor, steps: list[int]) -> float:
        """What the gradient of each trained velocity is multiplied by."""
        return rescaling(sigmas[:, 0].diff(), steps, self.gradient_rescale)


@dataclass(kw_only=True)
class FlowBPBridge(FlowBPSparse):
    """FlowBP-Bridge: the Euler sum, in which step j reads a state that carries gradient from trained steps before it.

    Step j is the later one of two that are drawn evenly, and always trained. The other K - 1 are divided in proportion
    to the steps before and after it, at least one before. Within either part late steps are preferred.

    Args:
        input_gradient: Share alpha of the gradient that passes through the input of step j.
    """

    min_trained_steps: ClassVar[int] = 2

    num_trained_steps: PositiveInt = 5
    input_gradient: ClosedUnitInterval = 0.1

    def split(self, draws: Draws) -> tuple[list[int], int, list[int]]:
        """The trained steps before j, j, and those after it."""
        _, j = draws.subset("anchors", [1.0] * self.num_steps, 2)
        share = round(self.num_trained_steps * j / self.num_steps)
        num_before = min(max(share, 1, self.num_trained_steps - (self.num_steps - j)), j, self.num_trained_steps - 1)
        before = self.draw_steps(draws, "before", 0, j, num_before)
        after = self.draw_steps(draws, "after", j + 1, self.num_steps, self.num_trained_steps - num_before - 1)
        return before, j, after

    def x0_hat(
        self, policy: Policy, conditions: Conditions, trajectory: Tensor, sigmas: Tensor, draws: Draws
    ) -> Tensor:
        """`x_j` from the trained steps before j, straight through; step j reads it alpha-mixed."""
        before, j, after = self.split(draws)
        gain = self.gain(sigmas, [*before, j, *after])
        velocities = self.velocities(policy, conditions, trajectory, sigmas, [*before, *after])
        x_j = _euler_sum(trajectory[j], trajectory, sigmas, {i: velocities[i] for i in before}, gain)
        v_j = self.velocity(policy, scale_gradient(x_j, self.input_gradient), sigmas[j], conditions)
        from_j = {j: v_j, **{i: velocities[i] for i in after}}
        return _euler_sum(straight_through(x_j, trajectory[-1]), trajectory, sigmas, from_j, gain)


@dataclass(kw_only=True)
class FlowBPLagrange(LeapAlign):
    """FlowBP-Lagrange: two leaps, each the integral of a polynomial through velocities between its ends.

    The first leap goes from step k to step j, the second from j to the picture. Their supports are evenly spaced steps
    in between, and the first few of them are trained. Both land on the rollout's own states, straight through. A
    sample whose leaps miss them by more weighs less, as in LeapAlign.

    Args:
        num_supports: Number of velocities that each leap's polynomial goes through.
        num_trained_supports: Number of each leap's supports, from its start, that carry gradient.
        support_gradient: Share of the gradient that trained supports other than the leap's start keep.
        gradient_rescale: Degree, from 0, to which trained supports stand in for the others. At 0 their gradient is left
            alone. At 1 it is multiplied by the sum of the leap's absolute weights over that of the trained ones.
        concentration: Parameters of the Dirichlet distribution of the steps after j, between k and j, and before k.

    Raises:
        ValueError: if there are fewer than three steps, or fewer supports than are to be trained.
    """

    paper: ClassVar[str | None] = "2606.11075"

    input_gradient: ClosedUnitInterval = 0.1
    min_distance: PositiveFloat = 0.2
    num_supports: PositiveInt = 3
    num_trained_supports: PositiveInt = 2
    support_gradient: ClosedUnitInterval = 0.25
    gradient_rescale: NonNegativeFloat = 0.5
    concentration: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (2.5, 6.0, 2.0)

    def __post_init__(self) -> None:
        """Refuse steps and supports that are not there."""
        super().__post_init__()
        if self.num_steps < 3:
            raise ValueError(f"num_steps is {self.num_steps}: two leaps and a part before them need 3 steps or more")
        if self.num_trained_supports > self.num_supports:
            raise ValueError(
                f"num_trained_supports is {self.num_trained_supports}, of num_supports {self.num_supports}: train fewer"
            )

    def anchors(self, draws: Draws) -> tuple[int, int]:
        """Steps k < j that the two leaps start from; the same for all samples and ranks."""
        after, between, _ = _rounded(draws.shares("anchors", self.concentration), self.num_steps)
        j = self.num_steps - 1 - after
        return j - between, j

    def supports(self, start: int, stop: int) -> list[int]:
        """Evenly spaced steps of start..stop - 1, the first of which is `start`."""
        count = min(self.num_supports, stop - start)
        return [start + i for i in torch.linspace(0, stop - start - 1, count).round().int().tolist()]

    def x0_hat(
        self, policy: Policy, conditions: Conditions, trajectory: Tensor, sigmas: Tensor, draws: Draws
    ) -> Tensor:
        """`x_k -> x_j -> x_0`, straight through the rollout's own states; the second leap reads x_j alpha-mixed."""
        k, j = self.anchors(draws)
        to_j, to_0 = self.supports(k, j), self.supports(j, self.num_steps)
        trained = [*to_j[: self.num_trained_supports], *to_0[1 : self.num_trained_supports]]
        velocities = self.velocities(policy, conditions, trajectory, sigmas, trained)
        leap_j = self.leap(trajectory[k], velocities, trajectory, sigmas, to_j, j)
        x_j = straight_through(leap_j, trajectory[j])
        velocities[j] = self.velocity(policy, scale_gradient(x_j, self.input_gradient), sigmas[j], conditions)
        leap_0 = self.leap(x_j, velocities, trajectory, sigmas, to_0, self.num_steps)
        weight = trajectory_similarity([(leap_j, trajectory[j]), (leap_0, trajectory[-1])], self.min_distance)
        return scale_gradient(straight_through(leap_0, trajectory[-1]), weight)

    def leap(
        self,
        x: Tensor,
        trained: dict[int, Tensor],
        trajectory: Tensor,
        sigmas: Tensor,
        supports: list[int],
        target: int,
    ) -> Tensor:
        """From `x` at the first support to step `target`; velocities that are not trained are those of the rollout."""
        start = supports[0]
        weights = quadrature_weights(sigmas[supports, 0], sigmas[start, 0], sigmas[target, 0])
        gain = rescaling(weights, [n for n, i in enumerate(supports) if i in trained], self.gradient_rescale)
        for weight, i in zip(weights, supports, strict=True):
            if i in trained:
                velocity = scale_gradient(trained[i], gain if i == start else gain * self.support_gradient)
            else:
                velocity = (trajectory[i + 1] - trajectory[i]) / (sigmas[i + 1, 0] - sigmas[i, 0])
            x = x + weight * velocity
        return x


def quadrature_weights(nodes: Float[Tensor, " K"], start: Tensor, end: Tensor) -> Float[Tensor, " K"]:
    """The integrals over [start, end] of the Lagrange polynomials of `nodes`: exact up to degree K - 1.

    Solved for by the moments about the middle of the interval, in float64; in the dtype of `nodes`.
    """
    middle, half = (start + end).double() / 2, (end - start).double() / 2
    places = (nodes.double() - middle) / half
    powers = torch.arange(len(nodes), dtype=torch.float64, device=nodes.device)
    moments = (1 - (-1) ** (powers + 1)) / (powers + 1)
    weights: Tensor = torch.linalg.solve(places.unsqueeze(0) ** powers.unsqueeze(1), moments)
    return (weights * half).to(nodes)


def rescaling(weights: Float[Tensor, " K"], trained: list[int], degree: float) -> float:
    """`1 + degree (sum |w| / sum_trained |w| - 1)`, by which trained terms of a sum stand in for all of them."""
    return 1 + degree * (float(weights.abs().sum() / weights[trained].abs().sum()) - 1)


def _euler_sum(x: Tensor, trajectory: Tensor, sigmas: Tensor, velocities: dict[int, Tensor], gain: float) -> Tensor:
    """A state of the cached trajectory, with `gain` times the gradient of the Euler steps that were taken again."""
    for i, velocity in velocities.items():
        step = flow.step(trajectory[i], scale_gradient(velocity, gain), sigmas[i], sigmas[i + 1])
        x = straight_through(x + step, x)
    return x


def _rounded(shares: list[float], count: int) -> list[int]:
    """`count` divided by shares into whole numbers, none of them zero."""
    counts = [round(share * count) for share in shares]
    counts[shares.index(max(shares))] += count - sum(counts)
    counts = [max(number, 1) for number in counts]
    counts[counts.index(max(counts))] += count - sum(counts)
    return counts
