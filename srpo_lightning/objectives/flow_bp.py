"""FlowBP: back-propagation through a few velocities of a cached rollout (arXiv 2606.11075).

In all three forms the reward sees the rollout's real end point, straight through, and the gradient reaches it through
`x0_hat`, a sum of a few re-computed velocities; they differ in the sum. The steps drawn are the same for all
samples and ranks.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from srpo_lightning import flow
from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.objectives.reward_forms import RewardForm
from srpo_lightning.objectives.trajectory import TrajectoryObjective, scale_gradient, with_value
from srpo_lightning.policies.base import Policy


class FlowBP(TrajectoryObjective):
    """What the three forms share: which steps are asked again.

    Args:
        form: what is asked of the reward; None: the plain reward.
        num_steps: Euler steps of the whole trajectory.
        num_trained_steps: K, the velocities that carry gradient.
        late_bias: step i is drawn in proportion to (i + 1) to this power.
        guidance: distilled guidance, of the rollout and of the trained steps alike.
        shift: of the noise levels; None takes the one of the model's scheduler.
        margin: the hinge `relu(margin - r)`; 0.55 is the paper's code's for HPSv2.1; None: the loss is `-r`.
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
        guidance: float = 3.5,
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

    def support(self, draws: Draws) -> list[int]:
        """The steps that are trained, from noisy to clean."""
        weights = [(i + 1) ** self.late_bias for i in range(self.num_steps)]
        return draws.subset("support", weights, self.num_trained_steps)

    def end(self, policy: Policy, conditions: Conditions, trajectory: Tensor, sigmas: Tensor, draws: Draws) -> Tensor:
        """The rollout's end, with the gradient of the form's sum."""
        return with_value(self.x0_hat(policy, conditions, trajectory, sigmas, self.support(draws)), trajectory[-1])

    @abstractmethod
    def x0_hat(
        self, policy: Policy, conditions: Conditions, trajectory: Tensor, sigmas: Tensor, support: list[int]
    ) -> Tensor:
        """The form: the end of the trajectory from the velocities at `support`."""


class FlowBPSparse(FlowBP):
    """FlowBP-Sparse: `x0_hat = noise + sum_i (sigma_next - sigma) v_i`, of which K velocities carry gradient."""

    def x0_hat(
        self, policy: Policy, conditions: Conditions, trajectory: Tensor, sigmas: Tensor, support: list[int]
    ) -> Tensor:
        """Inputs are the cached states; steps that are not trained are the cached ones."""
        velocities = self.velocities(policy, conditions, trajectory, sigmas, support)
        return _euler(trajectory[-1], trajectory, sigmas, support, velocities)


class Connected(FlowBP):
    """A FlowBP of two parts: the last trained step reads the state that the ones before it lead to.

    The paper's code was not at hand: that the split is at the last trained step, and that this step alone reads
    alpha-mixed latents, is our reading.

    Args:
        form: what is asked of the reward; None: the plain reward.
        num_steps: Euler steps of the whole trajectory.
        num_trained_steps: K, the velocities that carry gradient, 2 or more.
        late_bias: step i is drawn in proportion to (i + 1) to this power.
        input_gradient: alpha, the share of the gradient that passes through the last trained step's input.
        guidance: distilled guidance, of the rollout and of the trained steps alike.
        shift: of the noise levels; None takes the one of the model's scheduler.
        margin: the hinge `relu(margin - r)`; None: the loss is `-r`.
        shared_noise: all samples of a step, on every rank, have the same noise.
        reward_batch_size: images decoded and scored at once; None: the whole batch.
    """

    least_trained_steps = 2

    def __init__(
        self,
        form: RewardForm | None = None,
        num_steps: PositiveInt = 25,
        num_trained_steps: PositiveInt = 3,
        late_bias: NonNegativeFloat = 2.0,
        input_gradient: ClosedUnitInterval = 0.3,
        guidance: float = 3.5,
        shift: PositiveFloat | None = None,
        margin: float | None = None,
        shared_noise: bool = False,
        reward_batch_size: PositiveInt | None = None,
    ) -> None:
        super().__init__(
            form, num_steps, num_trained_steps, late_bias, guidance, shift, margin, shared_noise, reward_batch_size
        )
        self.input_gradient = input_gradient


class FlowBPBridge(Connected):
    """FlowBP-Bridge: the Euler sum, in which the last trained step sees the gradient of those before it."""

    def x0_hat(
        self, policy: Policy, conditions: Conditions, trajectory: Tensor, sigmas: Tensor, support: list[int]
    ) -> Tensor:
        """`x_j` from the trained steps before j, straight through; the step at j reads it alpha-mixed."""
        *before, j = support
        velocities = self.velocities(policy, conditions, trajectory, sigmas, before)
        x_j = with_value(_euler(trajectory[j], trajectory, sigmas, before, velocities), trajectory[j])
        velocity = self.velocity(policy, scale_gradient(x_j, self.input_gradient), sigmas[j], conditions)
        return flow.step(x_j, velocity, sigmas[j], sigmas[j + 1]) + trajectory[-1] - trajectory[j + 1]


class FlowBPLagrange(Connected):
    """FlowBP-Lagrange: two leaps, each the integral of a polynomial through the velocities of its support.

    The first leap begins at the first trained step, and its support are those before the last one; the second leap
    begins at the last, its only support. With two trained steps it is LeapAlign without weights.
    """

    def x0_hat(
        self, policy: Policy, conditions: Conditions, trajectory: Tensor, sigmas: Tensor, support: list[int]
    ) -> Tensor:
        """From the first trained step to the connector `x_t`, and from there, read alpha-mixed, to the picture."""
        *before, t = support
        velocities = self.velocities(policy, conditions, trajectory, sigmas, before)
        weights = quadrature_weights(sigmas[before, 0], sigmas[before[0], 0], sigmas[t, 0])
        leap = trajectory[before[0]] + sum(w * v for w, v in zip(weights, velocities, strict=True))
        x_t = with_value(leap, trajectory[t])
        velocity = self.velocity(policy, scale_gradient(x_t, self.input_gradient), sigmas[t], conditions)
        (weight,) = quadrature_weights(sigmas[[t], 0], sigmas[t, 0], sigmas[-1, 0])
        return x_t + weight * velocity


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


def _euler(
    end: Tensor, trajectory: Tensor, sigmas: Tensor, steps: Sequence[int], velocities: Sequence[Tensor]
) -> Tensor:
    """A later state of the cached trajectory, through the Euler steps that were taken again."""
    for i, velocity in zip(steps, velocities, strict=True):
        end = end + flow.step(trajectory[i], velocity, sigmas[i], sigmas[i + 1]) - trajectory[i + 1]
    return end
