"""SRPO: Direct-Align with a semantic relative reward (arXiv 2509.06942).

Step numbers in comments are those of the algorithm box in README.md. Departures from the research code, all on
purpose: the transformer is told the exact noise level (FluxPolicy.quantize_timesteps truncates it as there); both
branches go through the policy as one batch; the reward's gradient is taken at the recovered latents and handed to the
policy (objectives/base.py), which is the same gradient by the chain rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from srpo_lightning import flow
from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.objectives.base import Objective, Outcome, Rollout, reward_gradient, surrogate
from srpo_lightning.policies.base import Policy
from srpo_lightning.rewards.base import Reward


@dataclass
class ControlWords:
    """The words that steer: put before a prompt, they say what to move towards and what away from.

    Args:
        positive: towards these, for instance Natural-lighting, Detail, Detailed, Real.
        negative: away from these, for instance Concept art, Painting, Anime, Flat, Oil.
    """

    positive: list[str]
    negative: list[str]


class Branches(NamedTuple):
    """The two branches of B samples as one batch of 2 B, denoising first; each [2 B].

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


class SRPO(Objective):
    """Semantic Relative Preference Optimization.

    Args:
        control_words: the positive and the negative words.
        word_choice: go through the words step by step, or draw them at random.
        template: how a word meets a prompt.
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
        shared_noise: all samples of a step, on every rank, have the same noise (their prompts differ).
        position_per_sample: each sample has its own position on the grid instead of one for all.
        reward_batch_size: images decoded and scored at once; None: the whole batch.
    """

    def __init__(
        self,
        control_words: ControlWords,
        word_choice: Literal["cycle", "random"] = "cycle",
        template: str = "{word}. {prompt}",
        num_rollout_steps: PositiveInt = 25,
        rollout_guidance: float = 1.0,
        guidance: float = 3.5,
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
        position_per_sample: bool = False,
        reward_batch_size: PositiveInt | None = None,
    ) -> None:
        self.control_words = control_words
        self.word_choice = word_choice
        self.template = template
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
        noise = draws.noise(shape, shared=self.shared_noise).to(conditions.prompt_embeds.device, non_blocking=True)
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
        x0, noise = torch.cat([rollout.x0] * 2), torch.cat([rollout.noise] * 2)
        x = flow.inject(x0, noise, branches.sigma)
        velocity = policy(x, branches.sigma, conditions.repeat(2), self.guidance)
        x_next = flow.step(x, velocity, branches.sigma, branches.sigma_next)
        x0_hat = flow.recover(x_next, noise, branches.sigma_next)

        # 4. Semantic relative reward: the words swap in the inversion branch.
        positive, negative = self.texts(conditions, draws)
        towards, away = positive + negative, negative + positive

        coefficients = torch.stack([1 + branches.weight, -torch.ones_like(branches.weight)], dim=1)

        def relative_reward(latents: Tensor, rows: slice) -> Tensor:
            images = policy.decode(latents, conditions.size)
            relative = reward.contrast(images, [towards[rows], away[rows]], coefficients[rows])
            return relative + branches.sign[rows] * reward.plain(images, [*conditions.prompts * 2][rows])

        # 5. Hinge loss, and its gradient at the recovered latents.
        pull = reward_gradient(x0_hat, relative_reward, lambda r: torch.relu(self.margin - r), self.reward_batch_size)
        denoise, inversion = pull.rewards.chunk(2)
        return Outcome(
            surrogate(pull, x0_hat),
            {
                "reward_denoise": denoise.mean(),
                "reward_inversion": inversion.mean(),
                "sigma": branches.sigma[:batch_size].mean(),
            },
        )

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
        return Branches(sigma, sigma_next, weight)

    def texts(self, conditions: Conditions, draws: Draws) -> tuple[list[str], list[str]]:
        """The prompts under the step's positive word and under its negative word, or their own negative prompts."""
        positive = self._word(self.control_words.positive, "positive", draws)
        negative = self._word(self.control_words.negative, "negative", draws)
        away, own = self._under(negative, conditions.prompts), conditions.negative_prompts
        if own is not None:
            away = [text if mine is None else mine for text, mine in zip(away, own, strict=True)]
        return self._under(positive, conditions.prompts), away

    def score(self, reward: Reward, images: Tensor, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """The relative reward without lambda, averaged over all words."""
        positive, negative = self.control_words.positive, self.control_words.negative
        texts = [self._under(word, prompts) for word in [*positive, *negative]]
        shares = [1 / len(positive)] * len(positive) + [-1 / len(negative)] * len(negative)
        coefficients = torch.tensor(shares, device=images.device).expand(len(images), -1)
        return reward.contrast(images, texts, coefficients) + reward.plain(images, prompts)

    def check_reward(self, reward: Reward) -> None:
        """Refuse a reward that no words can steer."""
        reward.check_contrast()

    def _under(self, word: str, prompts: Sequence[str]) -> list[str]:
        return [self.template.format(word=word, prompt=prompt) for prompt in prompts]

    def _word(self, words: list[str], purpose: str, draws: Draws) -> str:
        if self.word_choice == "cycle":
            return words[draws.step % len(words)]
        return words[int(draws.integers(purpose, 0, len(words) - 1, 1, shared=True))]

    def _refuse_bad_settings(self) -> None:
        for side, words in vars(self.control_words).items():
            if not words or not all(word.strip() for word in words):
                raise ValueError(f"control_words.{side} is {words}: give at least one word, none of them empty")
        if "{prompt}" not in self.template or "{word}" not in self.template:
            raise ValueError(f"template is {self.template!r}: it must contain {{word}} and {{prompt}}")
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
