"""Back-propagation through the sampler itself: DRaFT-K and DRaFT-LV (arXiv 2309.17400), DRTune (arXiv 2405.00760).

DRaFT differentiates the last K Euler steps, `x0_hat = x_{N-K} + sum_i (sigma_{i+1} - sigma_i) v(x_i)`. DRTune stops the
gradient at the network's input, `v(sg(x_i))`.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from srpo_lightning import flow
from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.objectives.trajectory import RewardGradientObjective, straight_through
from srpo_lightning.policies.base import Policy


@dataclass(kw_only=True)
class DRaFT(RewardGradientObjective):
    """DRaFT-K, and with `num_variants` DRaFT-LV, its variant of low variance for one step.

    The last K Euler steps carry gradient. Each is checkpointed, so that one step's graph is alive at a time. Under
    FSDP2 all of the weights are gathered while the backward pass computes it again. DRaFT-LV noises the finished
    latents again to the level of the last step, several times. It takes that step from each, and averages all rewards.

    Args:
        num_trained_steps: Number K of steps at the end of the trajectory that carry gradient.
        num_variants: Number n of times that the finished latents are noised again; 0 is DRaFT-K, 2 is DRaFT-LV.
        step_checkpointing: Whether the backward pass computes each trained step again. Where blocks are checkpointed
            anyway (FluxPolicy.gradient_checkpointing) it only saves a few steps' block inputs.

    Raises:
        ValueError: if more steps are trained than there are, or variants are asked of more than one trained step.
    """

    paper: ClassVar[str | None] = "2309.17400"

    num_trained_steps: PositiveInt = 1
    num_variants: NonNegativeInt = 0
    step_checkpointing: bool = True

    def __post_init__(self) -> None:
        """Refuse steps that are not there, and variants of several of them."""
        super().__post_init__()
        if self.num_trained_steps > self.num_steps:
            raise ValueError(
                f"num_trained_steps is {self.num_trained_steps}, of num_steps {self.num_steps}: train fewer"
            )
        if self.num_variants and self.num_trained_steps > 1:
            raise ValueError(
                f"num_variants is {self.num_variants} with num_trained_steps {self.num_trained_steps}: DRaFT-LV trains "
                "the last step alone: set num_trained_steps to 1, or num_variants to 0"
            )

    def stop(self, draws: Draws) -> int:
        """Where the last K steps begin."""
        return self.num_steps - self.num_trained_steps

    def x0_hat(
        self, policy: Policy, conditions: Conditions, trajectory: Tensor, sigmas: Tensor, draws: Draws
    ) -> Tensor:
        """The end of the last K steps; behind it, for DRaFT-LV, that of the last step from other noise."""

        def euler(x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
            return flow.step(x, self.velocity(policy, x, sigma, conditions), sigma, sigma_next)

        step = partial(checkpoint, euler, use_reentrant=False) if self.step_checkpointing else euler

        x = trajectory[-1]
        for sigma, sigma_next in pairwise(sigmas[-self.num_trained_steps - 1 :]):
            x = step(x, sigma, sigma_next)
        ends = [x]
        for i in range(self.num_variants):
            noise = draws.noise(x.shape, shared=self.shared_noise, purpose=f"variant {i}").to(x)
            noised = flow.inject(x.detach(), noise, sigmas[-2])
            ends.append(step(noised, sigmas[-2], sigmas[-1]))
        return torch.cat(ends)


@dataclass(kw_only=True)
class DRTune(RewardGradientObjective):
    """DRTune: the network's input is detached, K equally spaced steps are trained, sampling stops early.

    With detached inputs the chain is a sum, `x0_hat = noise + sum_i (sigma_{i+1} - sigma_i) v(sg(x_i))`. So the trained
    steps can be asked again after a rollout without gradient, and the gradient is the same.

    The first of the K steps is drawn, so that the step that predicts the picture seldom is one of them. As in
    github.com/RuoyuWang-2077/FlowBP (July 2026) they are spaced over the steps up to that one. The paper spaces them
    over the whole trajectory, and leaves out those behind it.

    Args:
        num_trained_steps: Number K of equally spaced steps that carry gradient.
        early_stop: Share of all steps, the last ones, among which the step that predicts the picture is drawn.

    Raises:
        ValueError: if more steps are trained than are left by the earliest stop.
    """

    paper: ClassVar[str | None] = "2405.00760"

    num_trained_steps: PositiveInt = 3
    early_stop: ClosedUnitInterval = 0.4

    def __post_init__(self) -> None:
        """Refuse more steps than are left by the earliest stop."""
        super().__post_init__()
        least = self.num_steps - self.max_skipped_steps + 1
        if self.num_trained_steps > least:
            raise ValueError(
                f"num_trained_steps is {self.num_trained_steps}, and early_stop {self.early_stop} leaves as few as "
                f"{least} of {self.num_steps} steps: train fewer, or lower early_stop"
            )

    @property
    def max_skipped_steps(self) -> int:
        """The most steps at the end that a prediction of the picture stands in for."""
        return max(1, round(self.early_stop * self.num_steps))

    def stop(self, draws: Draws) -> int:
        """The step from which the picture is predicted, the same for all samples and ranks."""
        return self.num_steps - draws.choice("early stop", 1, self.max_skipped_steps)

    def trained_steps(self, stop: int, draws: Draws) -> list[int]:
        """K equally spaced steps of 0..stop, the first of which is drawn, the same for all samples and ranks."""
        stride = (stop + 1) // self.num_trained_steps
        reach = stride * (self.num_trained_steps - 1)
        first = draws.choice("first trained step", 0, stop - reach)
        return list(range(first, first + reach + 1, stride))

    def x0_hat(
        self, policy: Policy, conditions: Conditions, trajectory: Tensor, sigmas: Tensor, draws: Draws
    ) -> Tensor:
        """The prediction from the last state, with the gradient of every trained step."""
        stop = len(trajectory) - 1
        steps = self.trained_steps(stop, draws)
        velocities = self.velocities(policy, conditions, trajectory, sigmas, steps)
        if stop not in velocities:
            with torch.no_grad():
                velocities[stop] = self.velocity(policy, trajectory[stop], sigmas[stop], conditions)
        last = velocities.pop(stop)
        x = trajectory[stop]
        for i, velocity in velocities.items():
            x = straight_through(x + flow.step(trajectory[i], velocity, sigmas[i], sigmas[i + 1]), x)
        return flow.step(x, last, sigmas[stop], sigmas[-1])
