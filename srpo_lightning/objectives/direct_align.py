"""Direct-Align: the gradient of one step at any noise level (arXiv 2509.06942).

Noise clean latents, `x_a = (1 - a) x0 + a noise`, take one step `x_b = x_a + (b - a) v(x_a, a)` with gradient, and
recover `x0_hat = (x_b - b noise) / (1 - b)`, because the noise is known. The loss is `relu(margin - r(x0_hat))`.

Step numbers in comments are those of the algorithm box in README.md. Departures from the research code, all on purpose:

- The transformer is told the exact noise level; FluxPolicy.quantize_timesteps truncates it as there.
- Both branches go through the policy as one batch.
- The reward's gradient is taken at the recovered latents and handed to the policy (objectives/base.py). By the chain
  rule it is the same gradient.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from srpo_lightning import flow
from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.objectives.base import FormObjective, Outcome, Rollout, reward_gradient, surrogate
from srpo_lightning.policies.base import Policy
from srpo_lightning.rewards.base import Reward


class Branches(NamedTuple):
    """The branches of B samples as one batch, denoising first; each [2 B], or [B] without the inversion branch.

    Args:
        sigma: Noise levels where noise is injected and the policy is asked.
        sigma_next: Noise levels where the policy's step ends and the latents are recovered.
        weight: Extra weights lambda of the text that each branch moves towards.
    """

    sigma: Tensor
    sigma_next: Tensor
    weight: Tensor

    @property
    def sign(self) -> Tensor:
        """1 where the branch rewards the image that it recovers, -1 where it penalises it."""
        return (self.sigma - self.sigma_next).sign()

    def to(self, like: Tensor) -> "Branches":
        """The branches in the dtype and on the device of `like`."""
        return Branches(*(each.to(like, non_blocking=True) for each in self))


@dataclass(kw_only=True)
class DirectAlign(FormObjective):
    """Direct-Align with any form of the reward; alone by default, and SRPO's ablations by its settings.

    SRPO is `form: Relative`, `inversion: true`. Ablations of it are `form: Plain`, no inversion branch, both ends of a
    lambda equal, or a late window.

    Args:
        inversion: Whether the inversion branch, which comes from below, is trained too. What it recovers is penalised.
        num_rollout_steps: Number of Euler steps of the rollout.
        rollout_guidance: Distilled guidance of the rollout, 1 for HPSv2.1 and 2 for PickScore.
        num_schedule_steps: Number of steps of the schedule that `window` counts in.
        window: First and last step of the schedule between which noise levels are trained.
        grid_size: Number of noise levels on a straight line across the window.
        ground_truth_ratio: Share of the window, at least, that the known noise recovers; the trained step covers the
            rest at most.
        edge: Number of positions at either end of the grid that are not drawn.
        denoise_lambda: Extra weights lambda at the clean and at the noisy end of the grid, of the text that the
            denoising branch moves towards.
        inversion_lambda: Extra weights lambda at the clean and at the noisy end of the grid, of the text that the
            inversion branch moves towards.
        margin: Margin of the hinge loss `relu(margin - r)`: a reward above it has no gradient.
        position_per_sample: Whether each sample has its own position on the grid, as in the official run. Otherwise all
            samples of an optimizer step share one.

    Raises:
        ValueError: if the window holds no noise level to train, or the grid no position to draw.
    """

    paper: ClassVar[str | None] = "2509.06942"

    shift: PositiveFloat | None = 3.0
    shared_noise: bool = True
    inversion: bool = False
    num_rollout_steps: PositiveInt = 25
    rollout_guidance: NonNegativeFloat = 1.0
    num_schedule_steps: PositiveInt = 50
    window: tuple[NonNegativeInt, PositiveInt] = (5, 25)
    grid_size: PositiveInt = 1000
    ground_truth_ratio: ClosedUnitInterval = 0.9
    edge: PositiveInt = 5
    denoise_lambda: tuple[float, float] = (0.1, 0.25)
    inversion_lambda: tuple[float, float] = (0.3, 0.01)
    margin: float = 0.7
    position_per_sample: bool = True

    def __post_init__(self) -> None:
        """Refuse a window or a grid that leaves nothing to train."""
        super().__post_init__()
        first, last = self.window
        if not first < last < self.num_schedule_steps:
            raise ValueError(
                f"window is {list(self.window)}: its first step must come before its last, and the last before the end "
                f"of the schedule, step {self.num_schedule_steps} (num_schedule_steps), where no noise is left"
            )
        if first == 0:
            raise ValueError("window starts at step 0, pure noise, from which nothing can be recovered: start at 1")
        if not 2 * self.edge < self.grid_size or self.max_stride < 1:
            raise ValueError(
                f"grid_size {self.grid_size} leaves no position to draw with edge {self.edge} and a step of "
                f"{self.max_stride} levels: enlarge grid_size, or lower edge or ground_truth_ratio"
            )

    @property
    def max_stride(self) -> int:
        """The most levels of the grid that the trained step covers."""
        return round((1 - self.ground_truth_ratio) * self.grid_size)

    @torch.no_grad()
    def rollout(self, policy: Policy, conditions: Conditions, draws: Draws) -> Rollout:
        """Step 1: a clean sample and the noise it grew from; offline a real image and fresh noise."""
        shape = (conditions.batch_size, *policy.latent_shape(conditions.size))
        noise = draws.noise(shape, shared=self.shared_noise).to(conditions.device, non_blocking=True)
        if conditions.x0 is not None:
            return Rollout(conditions.x0.to(noise), noise)
        x0 = flow.integrate(
            lambda x, sigma: policy(x, sigma, conditions, self.rollout_guidance),
            noise,
            policy.sigmas(self.num_rollout_steps, self.shift, conditions.size),
        )
        return Rollout(x0, noise)

    def loss(self, policy: Policy, reward: Reward, conditions: Conditions, rollout: Rollout, draws: Draws) -> Outcome:
        """Steps 2 to 5: the mean over both branches of `relu(margin - r(x0_hat))`."""
        # 2. Noise levels: a position in the window gives a denoising and an inversion branch.
        batch_size = conditions.batch_size
        schedule = policy.sigmas(self.num_schedule_steps, self.shift, conditions.size)
        sigma, sigma_next, weight = self.branches(self.positions(batch_size, draws), schedule).to(rollout.x0)

        # 3. Direct-Align: inject, one step with gradient, recover. Both branches are one batch.
        times = 2 if self.inversion else 1
        both = conditions.repeat(times)
        x0, noise = torch.cat([rollout.x0] * times), torch.cat([rollout.noise] * times)
        x = flow.inject(x0, noise, sigma)
        velocity = policy(x, sigma, both, self.guidance)
        x_next = flow.step(x, velocity, sigma, sigma_next)
        x0_hat = flow.recover(x_next, noise, sigma_next)

        # 4. Reward: the inversion branch penalises what it recovers (SRPO: the words swap).
        signs = [1] * batch_size + [-1] * (len(x0) - batch_size)

        def reward_of(latents: Tensor, rows: slice) -> Tensor:
            return self.rewards(policy, reward, latents, both.take(rows), draws, weight[rows], signs[rows])

        # 5. Hinge loss, and its gradient at the recovered latents.
        feedback = reward_gradient(x0_hat, reward_of, lambda r: torch.relu(self.margin - r), self.reward_batch_size)
        scalars = {"reward_denoise": feedback.rewards[:batch_size].mean()}
        if self.inversion:
            scalars["reward_inversion"] = feedback.rewards[batch_size:].mean()
        return Outcome(surrogate(feedback, x0_hat), scalars | {"sigma": sigma[:batch_size].mean()})

    def positions(self, batch_size: int, draws: Draws) -> Int[Tensor, " B"]:
        """Where on the grid each sample of the step trains; counted from the clean end."""
        shared = not self.position_per_sample
        return draws.integers("position", self.edge, self.grid_size - self.edge, batch_size, shared=shared)

    def branches(self, mid: Int[Tensor, " B"], schedule: Float[Tensor, " N"]) -> Branches:
        """Noise levels and lambdas of both branches at positions `mid`, in the dtype of `schedule`.

        The denoising branch steps down to grid[grid_size - mid], the inversion branch up to it.
        """
        n = self.grid_size
        first, last = self.window
        grid = torch.linspace(schedule[first].item(), schedule[last].item(), n, dtype=schedule.dtype)
        stride = torch.minimum(n - mid, mid).clamp(max=self.max_stride)
        inverse_mid = (mid - stride).clamp(min=1)
        sigma = grid[torch.cat([n - mid - stride, (n - inverse_mid).clamp(max=n - 1)])]
        sigma_next = grid[torch.cat([n - mid, n - (inverse_mid + stride).clamp(max=n)]).clamp(max=n - 1)]
        weight = torch.cat(
            [
                torch.linspace(*self.denoise_lambda, n, dtype=schedule.dtype)[mid],
                torch.linspace(*self.inversion_lambda, n, dtype=schedule.dtype)[inverse_mid],
            ]
        )
        count = None if self.inversion else len(mid)
        return Branches(sigma[:count], sigma_next[:count], weight[:count])
