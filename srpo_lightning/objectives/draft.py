"""Back-propagation through the sampler itself: DRaFT-K, DRaFT-LV (arXiv 2309.17400) and DRTune."""

from functools import partial
from itertools import pairwise

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from srpo_lightning import flow
from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.objectives.reward_forms import RewardForm
from srpo_lightning.objectives.trajectory import TrajectoryObjective, with_value
from srpo_lightning.policies.base import Policy


class DRaFT(TrajectoryObjective):
    """DRaFT-K, and with `num_variants` DRaFT-LV, its variant of low variance for one step.

    The last K Euler steps carry gradient; each is checkpointed, so that one step's graph is alive at a time (under
    FSDP2 with all of the weights gathered, once the backward pass computes it again). DRaFT-LV noises the finished
    latents again to the level of the last step, several times, takes that step from each, and averages all rewards.

    Args:
        form: what is asked of the reward; None: the plain reward.
        num_steps: Euler steps of the whole trajectory.
        num_trained_steps: K, the steps at the end that carry gradient.
        num_variants: n, how often the finished latents are noised again; 0 is DRaFT-K, 2 DRaFT-LV.
        guidance: distilled guidance, of the rollout and of the trained steps alike.
        shift: of the noise levels; None takes the one of the model's scheduler.
        margin: the hinge `relu(margin - r)`; None: the loss is `-r`.
        shared_noise: all samples of a step, on every rank, have the same noise.
        reward_batch_size: images decoded and scored at once; None: the whole batch.
        step_checkpointing: compute each trained step again in the backward pass. Where blocks are checkpointed anyway
            (FluxPolicy.gradient_checkpointing) it only saves a few steps' block inputs.

    Raises:
        ValueError: if more steps are trained than there are, or variants are asked of more than one trained step.
    """

    def __init__(
        self,
        form: RewardForm | None = None,
        num_steps: PositiveInt = 25,
        num_trained_steps: PositiveInt = 1,
        num_variants: NonNegativeInt = 0,
        guidance: NonNegativeFloat = 3.5,
        shift: PositiveFloat | None = None,
        margin: float | None = None,
        shared_noise: bool = False,
        reward_batch_size: PositiveInt | None = None,
        step_checkpointing: bool = True,
    ) -> None:
        super().__init__(form, num_steps, guidance, shift, margin, shared_noise, reward_batch_size)
        if num_trained_steps > num_steps:
            raise ValueError(f"num_trained_steps is {num_trained_steps}, of num_steps {num_steps}: train fewer")
        if num_variants and num_trained_steps > 1:
            raise ValueError(
                f"num_variants is {num_variants} with num_trained_steps {num_trained_steps}: DRaFT-LV trains the last "
                "step alone: set num_trained_steps to 1, or num_variants to 0"
            )
        self.num_trained_steps = num_trained_steps
        self.num_variants = num_variants
        self.step_checkpointing = step_checkpointing

    def stop(self, draws: Draws) -> int:
        """Where the last K steps begin."""
        return self.num_steps - self.num_trained_steps

    def end(self, policy: Policy, conditions: Conditions, trajectory: Tensor, sigmas: Tensor, draws: Draws) -> Tensor:
        """The last K steps; behind them, for DRaFT-LV, the last step again from other noise."""

        def euler(x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
            return flow.step(x, self.velocity(policy, x, sigma, conditions), sigma, sigma_next)

        step = partial(checkpoint, euler, use_reentrant=False) if self.step_checkpointing else euler

        x = trajectory[-1]
        for sigma, sigma_next in pairwise(sigmas[-self.num_trained_steps - 1 :]):
            x = step(x, sigma, sigma_next)
        ends = [x]
        for i in range(self.num_variants):
            noise = draws.noise(x.shape, shared=self.shared_noise, purpose=f"variant {i}").to(x)
            again = flow.inject(x.detach(), noise, sigmas[-2])
            ends.append(step(again, sigmas[-2], sigmas[-1]))
        return torch.cat(ends)


class DRTune(TrajectoryObjective):
    """DRTune: the network's input is detached, K equally spaced steps are trained, sampling stops early (2405.00760).

    With detached inputs the chain is a sum, `x0_hat = noise + sum_i (sigma_next - sigma) v(sg(x_i))`, so that the
    trained steps can be asked again after a rollout without gradient. The gradient is the same.

    The first of the K steps is drawn, so that the step from which the picture is predicted seldom is one of them. As in
    github.com/RuoyuWang-2077/FlowBP (July 2026) they are spaced over the steps up to that one; the paper spaces them
    over the whole trajectory, and leaves out those behind it.

    Args:
        form: what is asked of the reward; None: the plain reward.
        num_steps: Euler steps of the whole trajectory.
        num_trained_steps: K.
        early_stop: the picture is predicted from one of the last steps, drawn from 1 to this share of all.
        guidance: distilled guidance, of the rollout and of the trained steps alike.
        shift: of the noise levels; None takes the one of the model's scheduler.
        margin: the hinge `relu(margin - r)`; None: the loss is `-r`.
        shared_noise: all samples of a step, on every rank, have the same noise.
        reward_batch_size: images decoded and scored at once; None: the whole batch.

    Raises:
        ValueError: if more steps are trained than are left by the earliest stop.
    """

    def __init__(
        self,
        form: RewardForm | None = None,
        num_steps: PositiveInt = 25,
        num_trained_steps: PositiveInt = 3,
        early_stop: ClosedUnitInterval = 0.4,
        guidance: NonNegativeFloat = 3.5,
        shift: PositiveFloat | None = None,
        margin: float | None = None,
        shared_noise: bool = False,
        reward_batch_size: PositiveInt | None = None,
    ) -> None:
        super().__init__(form, num_steps, guidance, shift, margin, shared_noise, reward_batch_size)
        self.num_trained_steps = num_trained_steps
        self.most_left = max(1, round(early_stop * num_steps))
        if num_trained_steps > num_steps - self.most_left + 1:
            raise ValueError(
                f"num_trained_steps is {num_trained_steps}, and early_stop {early_stop} leaves as few as "
                f"{num_steps - self.most_left + 1} of {num_steps} steps: train fewer, or lower early_stop"
            )

    def stop(self, draws: Draws) -> int:
        """The step from which the picture is predicted, the same for all samples and ranks."""
        return self.num_steps - draws.choice("early stop", 1, self.most_left)

    def trained(self, stop: int, draws: Draws) -> list[int]:
        """K equally spaced steps of 0..stop, the first of which is drawn, the same for all samples and ranks."""
        stride = (stop + 1) // self.num_trained_steps
        reach = stride * (self.num_trained_steps - 1)
        first = draws.choice("first trained step", 0, stop - reach)
        return list(range(first, first + reach + 1, stride))

    def end(self, policy: Policy, conditions: Conditions, trajectory: Tensor, sigmas: Tensor, draws: Draws) -> Tensor:
        """The prediction from the last state, with the gradient of every trained step."""
        stop = len(trajectory) - 1
        steps = self.trained(stop, draws)
        velocities = self.velocities(policy, conditions, trajectory, sigmas, steps)
        if stop not in velocities:
            with torch.no_grad():
                velocities[stop] = self.velocity(policy, trajectory[stop], sigmas[stop], conditions)
        last = velocities.pop(stop)
        x = trajectory[stop]
        for i, velocity in velocities.items():
            x = with_value(x + flow.step(trajectory[i], velocity, sigmas[i], sigmas[i + 1]), x)
        return flow.step(x, last, sigmas[stop], sigmas[-1])
