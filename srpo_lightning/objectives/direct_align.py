"""Direct-Align: the gradient of one step at any noise level (arXiv 2509.06942).

Step numbers in comments are those of the algorithm box in README.md. Departures from the research code, all on
purpose: the transformer is told the exact noise level (FluxPolicy.quantize_timesteps truncates it as there); both
branches go through the policy as one batch; the reward's gradient is taken at the recovered latents and handed to the
policy (objectives/base.py), which is the same gradient by the chain rule.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from srpo_lightning import flow
from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.objectives.base import Objective, Outcome, Rollout, reward_gradient, surrogate
from srpo_lightning.objectives.reward_forms import Plain, RewardForm
from srpo_lightning.policies.base import Policy
from srpo_lightning.rewards.base import Reward


class Branches(NamedTuple):
    """The branches of B samples as one batch, denoising first; each [2 B], or [B] without the inversion branch.

    Args:
        sigma: where noise is injected and the policy is asked.
        sigma_next: where its step ends and the latents are recovered.
        weight: lambda, the extra weight of the text that the branch moves towards.
    """

    sigma: Tensor
    sigma_next: Tensor
    weight: Tensor

    @property
    def sign(self) -> Tensor:
        """1 where the branch rewards the image that it recovers, -1 where it penalises it."""
        return (self.sigma - self.sigma_next).sign()


class DirectAlign(Objective):
    """Direct-Align with any form of the reward; alone by default, and SRPO's ablations by its settings.

    SRPO is `form: Relative`, `inversion: true`. Without the inversion branch, with `form: Plain`, with both ends of a
    lambda equal, or with a late window, it is an ablation of that.

    Args:
        form: what is asked of the reward; None: the plain reward.
        inversion: train the branch that comes from below as well, and penalise what it recovers.
        num_rollout_steps: Euler steps of the rollout.
        rollout_guidance: distilled guidance of the rollout (1 for HPSv2.1, 2 for PickScore).
        guidance: distilled guidance of the trained step.
        shift: of the noise levels; None takes the one of the model's scheduler.
        num_schedule_steps: steps of the schedule that `window` counts in.
        window: first and last step of the schedule between which noise levels are trained.
        grid_size: noise levels on a straight line across the window.
        ground_truth_ratio: the trained step covers the rest, 1 - ratio, of the window at most.
        edge: positions closer than this to either end of the grid are not drawn.
        denoise_lambda: lambda of the denoising branch, from the noisy to the clean end of the grid.
        inversion_lambda: the same of the inversion branch.
        margin: the hinge: a reward above it has no gradient.
        shared_noise: all samples of an optimizer step, on every rank, have the same noise (their prompts differ).
        position_per_sample: each sample has its own position on the grid, as in the official run, instead of one for
            all samples of an optimizer step.
        reward_batch_size: images decoded and scored at once; None: the whole batch.
    """

    def __init__(
        self,
        form: RewardForm | None = None,
        inversion: bool = False,
        num_rollout_steps: PositiveInt = 25,
        rollout_guidance: NonNegativeFloat = 1.0,
        guidance: NonNegativeFloat = 3.5,
        shift: PositiveFloat | None = 3.0,
        num_schedule_steps: PositiveInt = 50,
        window: tuple[NonNegativeInt, PositiveInt] = (5, 25),
        grid_size: PositiveInt = 1000,
        ground_truth_ratio: ClosedUnitInterval = 0.9,
        edge: PositiveInt = 5,
        denoise_lambda: tuple[float, float] = (0.1, 0.25),
        inversion_lambda: tuple[float, float] = (0.3, 0.01),
        margin: float = 0.7,
        shared_noise: bool = True,
        position_per_sample: bool = True,
        reward_batch_size: PositiveInt | None = None,
    ) -> None:
        self.form = form or Plain()
        self.inversion = inversion
        self.num_rollout_steps = num_rollout_steps
        self.rollout_guidance = rollout_guidance
        self.guidance = guidance
        self.shift = shift
        self.num_schedule_steps = num_schedule_steps
        self.window = window
        self.grid_size = grid_size
        self.max_stride = round((1 - ground_truth_ratio) * grid_size)
        self.edge = edge
        self.denoise_lambda = denoise_lambda
        self.inversion_lambda = inversion_lambda
        self.margin = margin
        self.shared_noise = shared_noise
        self.position_per_sample = position_per_sample
        self.reward_batch_size = reward_batch_size
        self._refuse_bad_settings()

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
        """Steps 2 to 5."""
        # 2. Noise levels: a position in the window gives a denoising and an inversion branch.
        batch_size = conditions.batch_size
        schedule = policy.sigmas(self.num_schedule_steps, self.shift, conditions.size)
        branches = Branches(
            *(
                part.to(rollout.x0, non_blocking=True)
                for part in self.branches(self.positions(batch_size, draws), schedule)
            )
        )

        # 3. Direct-Align: inject, one step with gradient, recover. Both branches are one batch.
        times = 2 if self.inversion else 1
        both = conditions.repeat(times)
        x0, noise = torch.cat([rollout.x0] * times), torch.cat([rollout.noise] * times)
        x = flow.inject(x0, noise, branches.sigma)
        velocity = policy(x, branches.sigma, both, self.guidance)
        x_next = flow.step(x, velocity, branches.sigma, branches.sigma_next)
        x0_hat = flow.recover(x_next, noise, branches.sigma_next)

        # 4. Reward: the inversion branch penalises what it recovers (SRPO: the words swap).
        signs = [1] * batch_size + [-1] * (len(x0) - batch_size)

        def reward_of(latents: Tensor, rows: slice) -> Tensor:
            images = policy.decode(latents, conditions.size)
            return self.form(reward, images, both.take(rows), draws, branches.weight[rows], signs[rows])

        # 5. Hinge loss, and its gradient at the recovered latents.
        pull = reward_gradient(x0_hat, reward_of, lambda r: torch.relu(self.margin - r), self.reward_batch_size)
        scalars = {"reward_denoise": pull.rewards[:batch_size].mean()}
        if self.inversion:
            scalars["reward_inversion"] = pull.rewards[batch_size:].mean()
        return Outcome(surrogate(pull, x0_hat), scalars | {"sigma": branches.sigma[:batch_size].mean()})

    def positions(self, batch_size: int, draws: Draws) -> Int[Tensor, " B"]:
        """Where on the grid each sample of the step trains; counted from the noisy end."""
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

    def score(self, reward: Reward, images: Tensor, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """What the form rewards."""
        return self.form.score(reward, images, prompts)

    def check_reward(self, reward: Reward) -> None:
        """Refuse a reward that the form cannot use."""
        self.form.check(reward)

    def _refuse_bad_settings(self) -> None:
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
