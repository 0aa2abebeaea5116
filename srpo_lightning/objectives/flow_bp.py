"""FlowBP: back-propagation through a few velocities of a cached rollout (arXiv 2606.11075).

In all three forms the reward sees the rollout's real end point, straight through, and the gradient reaches it through
`x0_hat`, a sum of a few re-computed velocities; they differ in the sum. The steps drawn are the same for all
samples and ranks.

Source of forms and defaults: the authors' repository, github.com/RuoyuWang-2077/FlowBP, as of July 2026: its trainers
and its configurations for FLUX.1. There guidance is 4 and the margin .55 as well.
"""

import torch
from jaxtyping import Float
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from srpo_lightning import flow
from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.objectives.leap_align import nearness
from srpo_lightning.objectives.reward_forms import RewardForm
from srpo_lightning.objectives.trajectory import TrajectoryObjective, scale_gradient, with_value
from srpo_lightning.policies.base import Policy


class FlowBPSparse(TrajectoryObjective):
    """FlowBP-Sparse: `x0_hat = noise + sum_i (sigma_next - sigma) v_i`, of which K velocities carry gradient.

    Inputs are the cached states; steps that are not trained are the cached ones.

    Args:
        form: what is asked of the reward; None: the plain reward.
        num_steps: Euler steps of the whole trajectory.
        num_trained_steps: K, the velocities that carry gradient.
        late_bias: step i is drawn in proportion to (i + 1) to this power.
        gradient_rescale: how far trained velocities stand in for the others: at 1 their gradient is multiplied by the
            length of the whole trajectory over that of the trained steps, at 0 not at all.
        guidance: distilled guidance, of the rollout and of the trained steps alike.
        shift: of the noise levels; None takes the one of the model's scheduler.
        margin: the hinge `relu(margin - r)`; 0.55 is the authors' for HPSv2.1; None: the loss is `-r`.
        shared_noise: all samples of a step, on every rank, have the same noise.
        reward_batch_size: images decoded and scored at once; None: the whole batch.

    Raises:
        ValueError: if there are fewer steps than are to be trained.
    """

    least_trained_steps = 1

    def __init__(
        self,
        form: RewardForm | None = None,
        num_steps: PositiveInt = 25,
        num_trained_steps: PositiveInt = 3,
        late_bias: NonNegativeFloat = 2.0,
        gradient_rescale: NonNegativeFloat = 1.0,
        guidance: NonNegativeFloat = 3.5,
        shift: PositiveFloat | None = None,
        margin: float | None = None,
        shared_noise: bool = False,
        reward_batch_size: PositiveInt | None = None,
    ) -> None:
        super().__init__(form, num_steps, guidance, shift, margin, shared_noise, reward_batch_size)
        if not self.least_trained_steps <= num_trained_steps <= num_steps:
            raise ValueError(
                f"num_trained_steps is {num_trained_steps}: {type(self).__name__} trains {self.least_trained_steps} or "
                f"more, and at most all {num_steps} (num_steps)"
            )
        self.num_trained_steps = num_trained_steps
        self.late_bias = late_bias
        self.gradient_rescale = gradient_rescale

    def end(self, policy: Policy, conditions: Conditions, trajectory: Tensor, sigmas: Tensor, draws: Draws) -> Tensor:
        """The rollout's end, with the gradient of the sum."""
        steps = self.late_steps(draws, "support", 0, self.num_steps, self.num_trained_steps)
        velocities = self.velocities(policy, conditions, trajectory, sigmas, steps)
        factor = self.rescaling(sigmas, steps)
        return _euler(trajectory[-1], trajectory, sigmas, velocities, factor)

    def late_steps(self, draws: Draws, purpose: str, start: int, stop: int, count: int) -> list[int]:
        """`count` different steps of start..stop - 1, in order; later ones, counted from `start`, are likelier."""
        if not count:
            return []
        weights = [(i + 1) ** self.late_bias for i in range(stop - start)]
        return [start + i for i in draws.subset(purpose, weights, count)]

    def rescaling(self, sigmas: Tensor, steps: list[int]) -> float:
        """What the gradient of each trained velocity is multiplied by."""
        return _rescaling(sigmas[:, 0].diff(), steps, self.gradient_rescale)


class FlowBPBridge(FlowBPSparse):
    """FlowBP-Bridge: the Euler sum, in which step j reads a state that carries gradient from trained steps before it.

    Step j is the later one of two that are drawn evenly, and always trained. The other K - 1 are divided in proportion
    to the steps before and after it, at least one before.

    Args:
        form: what is asked of the reward; None: the plain reward.
        num_steps: Euler steps of the whole trajectory.
        num_trained_steps: K, the velocities that carry gradient, 2 or more.
        late_bias: step i of the part before j, and of that behind, is drawn in proportion to (i + 1) to this power.
        gradient_rescale: how far trained velocities stand in for the others: at 1 their gradient is multiplied by the
            length of the whole trajectory over that of the trained steps, at 0 not at all.
        input_gradient: alpha, the share of the gradient that passes through the input of step j.
        guidance: distilled guidance, of the rollout and of the trained steps alike.
        shift: of the noise levels; None takes the one of the model's scheduler.
        margin: the hinge `relu(margin - r)`; 0.55 is the authors' for HPSv2.1; None: the loss is `-r`.
        shared_noise: all samples of a step, on every rank, have the same noise.
        reward_batch_size: images decoded and scored at once; None: the whole batch.

    Raises:
        ValueError: if there are fewer steps than are to be trained.
    """

    least_trained_steps = 2

    def __init__(
        self,
        form: RewardForm | None = None,
        num_steps: PositiveInt = 25,
        num_trained_steps: PositiveInt = 5,
        late_bias: NonNegativeFloat = 2.0,
        gradient_rescale: NonNegativeFloat = 1.0,
        input_gradient: ClosedUnitInterval = 0.1,
        guidance: NonNegativeFloat = 3.5,
        shift: PositiveFloat | None = None,
        margin: float | None = None,
        shared_noise: bool = False,
        reward_batch_size: PositiveInt | None = None,
    ) -> None:
        super().__init__(
            form,
            num_steps,
            num_trained_steps,
            late_bias,
            gradient_rescale,
            guidance,
            shift,
            margin,
            shared_noise,
            reward_batch_size,
        )
        self.input_gradient = input_gradient

    def split(self, draws: Draws) -> tuple[list[int], int, list[int]]:
        """The trained steps before j, j, and those behind it."""
        _, j = draws.subset("anchors", [1.0] * self.num_steps, 2)
        behind = self.num_steps - j
        share = round(self.num_trained_steps * j / self.num_steps)
        num_before = min(max(share, 1, self.num_trained_steps - behind), j, self.num_trained_steps - 1)
        before = self.late_steps(draws, "before", 0, j, num_before)
        after = self.late_steps(draws, "after", j + 1, self.num_steps, self.num_trained_steps - num_before - 1)
        return before, j, after

    def end(self, policy: Policy, conditions: Conditions, trajectory: Tensor, sigmas: Tensor, draws: Draws) -> Tensor:
        """`x_j` from the trained steps before j, straight through; step j reads it alpha-mixed."""
        before, j, after = self.split(draws)
        factor = self.rescaling(sigmas, [*before, j, *after])
        cached = [*before, *after]
        velocities = self.velocities(policy, conditions, trajectory, sigmas, cached)
        x_j = _euler(trajectory[j], trajectory, sigmas, {i: velocities[i] for i in before}, factor)
        at_j = self.velocity(policy, scale_gradient(x_j, self.input_gradient), sigmas[j], conditions)
        rest = {j: at_j, **{i: velocities[i] for i in after}}
        return _euler(with_value(x_j, trajectory[-1]), trajectory, sigmas, rest, factor)


class FlowBPLagrange(TrajectoryObjective):
    """FlowBP-Lagrange: two leaps, each the integral of a polynomial through velocities between its ends.

    The first leap goes from step k to step j, the second from j to the picture. Their supports are evenly spaced steps
    in between, and the first few of them are trained. Both land on the rollout's own states, straight through. A
    sample whose leaps miss them by more weighs less, as in LeapAlign.

    Args:
        form: what is asked of the reward; None: the plain reward.
        num_steps: Euler steps of the whole trajectory, 3 or more.
        num_supports: the velocities that each leap's polynomial goes through.
        num_trained_supports: how many of each leap's supports, from its start, carry gradient.
        support_gradient: the share of the gradient of trained supports other than the leap's start.
        gradient_rescale: how far trained supports stand in for the others: at 1 their gradient is multiplied by the sum
            of all absolute weights of the leap over that of the trained ones, at 0 not at all.
        input_gradient: alpha, the share of the gradient that passes through the second leap's input.
        min_distance: tau, below which a leap's distance from its state is taken for it.
        concentration: of the Dirichlet distribution of the steps behind j, between k and j, and before k.
        guidance: distilled guidance, of the rollout and of the trained steps alike.
        shift: of the noise levels; None takes the one of the model's scheduler.
        margin: the hinge `relu(margin - r)`; 0.55 is the authors' for HPSv2.1; None: the loss is `-r`.
        shared_noise: all samples of a step, on every rank, have the same noise.
        reward_batch_size: images decoded and scored at once; None: the whole batch.

    Raises:
        ValueError: if there are fewer than three steps, or fewer supports than are to be trained.
    """

    def __init__(
        self,
        form: RewardForm | None = None,
        num_steps: PositiveInt = 25,
        num_supports: PositiveInt = 3,
        num_trained_supports: PositiveInt = 2,
        support_gradient: ClosedUnitInterval = 0.25,
        gradient_rescale: NonNegativeFloat = 0.5,
        input_gradient: ClosedUnitInterval = 0.1,
        min_distance: PositiveFloat = 0.2,
        concentration: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (2.5, 6.0, 2.0),
        guidance: NonNegativeFloat = 3.5,
        shift: PositiveFloat | None = None,
        margin: float | None = None,
        shared_noise: bool = False,
        reward_batch_size: PositiveInt | None = None,
    ) -> None:
        super().__init__(form, num_steps, guidance, shift, margin, shared_noise, reward_batch_size)
        if num_steps < 3:
            raise ValueError(f"num_steps is {num_steps}: two leaps and a part before them need 3 steps or more")
        if num_trained_supports > num_supports:
            raise ValueError(
                f"num_trained_supports is {num_trained_supports}, of num_supports {num_supports}: train fewer"
            )
        self.num_supports = num_supports
        self.num_trained_supports = num_trained_supports
        self.support_gradient = support_gradient
        self.gradient_rescale = gradient_rescale
        self.input_gradient = input_gradient
        self.min_distance = min_distance
        self.concentration = concentration

    def anchors(self, draws: Draws) -> tuple[int, int]:
        """Steps k < j, where the leaps start."""
        behind, between, _ = _parts(draws.shares("anchors", self.concentration), self.num_steps)
        j = self.num_steps - 1 - behind
        return j - between, j

    def supports(self, start: int, stop: int) -> list[int]:
        """Evenly spaced steps of start..stop - 1, the first of which is `start`."""
        count = min(self.num_supports, stop - start)
        return [start + i for i in torch.linspace(0, stop - start - 1, count).round().int().tolist()]

    def end(self, policy: Policy, conditions: Conditions, trajectory: Tensor, sigmas: Tensor, draws: Draws) -> Tensor:
        """`x_k -> x_j -> x_0`, straight through the rollout's own states; the second leap reads x_j alpha-mixed."""
        k, j = self.anchors(draws)
        to_j, to_0 = self.supports(k, j), self.supports(j, self.num_steps)
        cached = [*to_j[: self.num_trained_supports], *to_0[1 : self.num_trained_supports]]
        velocities = self.velocities(policy, conditions, trajectory, sigmas, cached)
        leap_j = self.leap(trajectory[k], velocities, trajectory, sigmas, to_j, j)
        x_j = with_value(leap_j, trajectory[j])
        velocities[j] = self.velocity(policy, scale_gradient(x_j, self.input_gradient), sigmas[j], conditions)
        leap_0 = self.leap(x_j, velocities, trajectory, sigmas, to_0, self.num_steps)
        near = nearness([(leap_j, trajectory[j]), (leap_0, trajectory[-1])], self.min_distance)
        return scale_gradient(with_value(leap_0, trajectory[-1]), near)

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
        places = [n for n, i in enumerate(supports) if i in trained]
        factor = _rescaling(weights, places, self.gradient_rescale)
        for weight, i in zip(weights, supports, strict=True):
            if i in trained:
                velocity = scale_gradient(trained[i], factor if i == start else factor * self.support_gradient)
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


def _euler(x: Tensor, trajectory: Tensor, sigmas: Tensor, velocities: dict[int, Tensor], factor: float) -> Tensor:
    """A state of the cached trajectory, with `factor` times the gradient of the Euler steps that were taken again."""
    for i, velocity in velocities.items():
        again = flow.step(trajectory[i], scale_gradient(velocity, factor), sigmas[i], sigmas[i + 1])
        x = with_value(x + again, x)
    return x


def _rescaling(weights: Tensor, trained: list[int], rescale: float) -> float:
    whole, part = weights.abs().sum(), weights[trained].abs().sum()
    return 1 + rescale * (float(whole / part) - 1)


def _parts(shares: list[float], count: int) -> list[int]:
    """`count` steps in as many parts as there are shares, rounded, none of them empty."""
    parts = [round(share * count) for share in shares]
    parts[shares.index(max(shares))] += count - sum(parts)
    parts = [max(part, 1) for part in parts]
    parts[parts.index(max(parts))] += count - sum(parts)
    return parts
