"""GRPO for flow models: DanceGRPO (arXiv 2505.07818) and Flow-GRPO (arXiv 2505.05470).

The loss of a step is `-min(rho A, clip(rho, 1 - c, 1 + c) A) + beta KL`. A is the advantage of the sample in its group,
`A = (r - mean) / std`. rho is the step's probability under the policy over its probability when it was drawn.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from jaxtyping import Float
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from srpo_lightning import flow, phases
from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.objectives.base import Outcome, Rollout
from srpo_lightning.objectives.trajectory import TrajectoryObjective
from srpo_lightning.policies.base import Policy
from srpo_lightning.rewards.base import Reward

Level: TypeAlias = tuple[Float[Tensor, " B"], Float[Tensor, " B"], Float[Tensor, " B"]]
"""The noise level that a step starts from, the one that it ends at, and its diffusion."""


class Diffusion(ABC):
    """How random each step is."""

    @abstractmethod
    def __call__(self, sigmas: Float[Tensor, "N B"]) -> Float[Tensor, "N B"]:
        """The diffusion of the step from each level (flow.random_step); `sigmas` is the whole schedule, from 1 to 0."""


@dataclass
class DanceDiffusion(Diffusion):
    """DanceGRPO's diffusion: the same at every level.

    Args:
        eta: Diffusion of every step.
    """

    eta: PositiveFloat = 0.3

    def __call__(self, sigmas: Float[Tensor, "N B"]) -> Float[Tensor, "N B"]:
        """`g = eta`."""
        return torch.full_like(sigmas, self.eta)


@dataclass
class FlowDiffusion(Diffusion):
    """Flow-GRPO's diffusion: `a sqrt(sigma / (1 - sigma))`, with the second level in the denominator of the first.

    Args:
        a: Factor of the diffusion.
    """

    a: PositiveFloat = 0.9

    def __call__(self, sigmas: Float[Tensor, "N B"]) -> Float[Tensor, "N B"]:
        """`g = a sqrt(sigma / (1 - sigma))`, largest near pure noise."""
        below_one = torch.cat([sigmas[1:2], sigmas[1:]])
        return self.a * (sigmas / (1 - below_one)).sqrt()


@dataclass(kw_only=True)
class GRPO(TrajectoryObjective):
    """Random rollouts in groups of one prompt; steps of those that beat their group are made more likely.

    No gradient of the reward is needed. With one update per rollout the log-probabilities are those of the weights that
    drew the steps. Every ratio is 1, clipping is idle, and the gradient is the policy gradient. With more
    (model.updates_per_rollout; DanceGRPO: 3), each on its own share of every group, later ones are clipped.
    Accumulating gradients (trainer.accumulate_grad_batches) takes several prompts into one update. Every sample trains
    steps of its own. The last step, into the picture, is not random and not trained.

    Args:
        diffusion: Randomness of the steps; null takes DanceGRPO's.
        group_size: Number G of samples of each prompt; the policy sees G times data.batch_size at once.
        timestep_fraction: Share of the random steps that is trained, drawn for each sample, anew for each update.
        clip_range: Distance from 1 at which the ratio is clipped.
        max_advantage: Largest advantage, up or down; others are clipped to it.
        kl_weight: Weight beta of the KL divergence of each trained step from that of the base. Above 0 it needs a
            policy that keeps its base, as an adapter does, and another forward pass per step. Values of Flow-GRPO's
            code do not carry over: its divergence is this one times the length of the step.
        split_groups: Whether each of several updates per rollout takes its own share of every group, as in DanceGRPO.
            Otherwise each takes all samples, on steps of their own.
        shared_noise: Whether the samples of a group start from the same noise.

    Raises:
        ValueError: if a group has one sample, or no step would be trained.
    """

    paper: ClassVar[str | None] = "2505.07818"

    num_steps: PositiveInt = 16
    shift: PositiveFloat | None = 3.0
    shared_noise: bool = True
    diffusion: Diffusion | None = None
    group_size: PositiveInt = 12
    timestep_fraction: ClosedUnitInterval = 0.6
    clip_range: PositiveFloat = 1e-4
    max_advantage: PositiveFloat = 5.0
    kl_weight: NonNegativeFloat = 0.0
    split_groups: bool = True

    def __post_init__(self) -> None:
        """Refuse groups without comparison, and a fraction of no step."""
        super().__post_init__()
        if self.group_size < 2:
            raise ValueError(f"group_size is {self.group_size}: samples are compared with each other, set 2 or more")
        if self.num_trained_steps < 1:
            raise ValueError(
                f"timestep_fraction {self.timestep_fraction} of {self.num_steps - 1} random steps is none (num_steps "
                f"is {self.num_steps}, the last is not random): raise either"
            )

    @property
    def num_trained_steps(self) -> int:
        """How many of its random steps each sample trains."""
        return int(self.timestep_fraction * (self.num_steps - 1))

    @torch.no_grad()
    def rollout(self, policy: Policy, conditions: Conditions, draws: Draws) -> Rollout:
        """G random trajectories of each prompt, [G B], with the log-probability of every random step."""
        if conditions.x0 is not None:
            self.check_pictures()
        groups = conditions.repeat(self.group_size)
        shape = (conditions.batch_size, *policy.latent_shape(conditions.size))
        noise = self._noise("start", shape, draws, groups, same=self.shared_noise)
        sigmas, diffusion = self.levels(policy, conditions, noise)
        states, log_probs = [noise], []
        for i in range(self.num_steps - 1):
            mean, std = self.random_step(policy, states[-1], (sigmas[i], sigmas[i + 1], diffusion[i]), groups)
            states.append(mean + std * self._noise(f"step {i}", shape, draws, groups))
            log_probs.append(flow.log_prob(states[-1], mean, std))
        velocity = self.velocity(policy, states[-1], sigmas[-2], groups)
        states.append(flow.step(states[-1], velocity, sigmas[-2], sigmas[-1]))
        return Rollout(states[-1], noise, torch.stack(states), torch.stack(log_probs))

    def loss(self, policy: Policy, reward: Reward, conditions: Conditions, rollout: Rollout, draws: Draws) -> Outcome:
        """The mean of `-min(rho A, clip(rho) A) + beta KL` over trained steps and samples.

        Each step is checkpointed, so that one graph lives at a time.
        """
        assert rollout.trajectory is not None
        assert rollout.log_probs is not None
        states = rollout.trajectory
        groups = conditions.repeat(self.group_size)
        rewards = self._all_rewards(policy, reward, groups, rollout.x0, draws)
        phases.enter(phases.FORWARD)
        advantage = advantages(rewards.view(self.group_size, -1), self.max_advantage).flatten()
        sigmas, diffusion = self.levels(policy, conditions, rollout.noise)

        rows = self.rows_of(rollout.turn, conditions.batch_size)
        groups, advantage, column = groups.take(rows), advantage[rows], torch.arange(len(rewards))[rows]

        def step(x: Tensor, x_next: Tensor, level: Level, reference: Tensor | None) -> tuple[Tensor, Tensor]:
            mean, std = self.random_step(policy, x, level, groups)
            kl = mean.new_zeros(len(mean)) if reference is None else flow.normal_kl(mean, reference, std)
            return flow.log_prob(x_next, mean, std), kl

        losses, ratios, divergences = [], [], []
        for steps in self.trained_steps(draws, conditions.batch_size)[:, rows]:
            start, end = (steps, column), (steps + 1, column)
            x, level, reference = states[start], (sigmas[start], sigmas[end], diffusion[start]), None
            if self.kl_weight:
                with torch.no_grad(), policy.as_reference():
                    reference, _ = self.random_step(policy, x, level, groups)
            log_prob, kl = checkpoint(step, x, states[end], level, reference, use_reentrant=False)
            ratio = (log_prob - rollout.log_probs[start]).exp()
            gain = clipped_gain(ratio, advantage, self.clip_range)
            losses.append(-gain.mean() + self.kl_weight * kl.mean())
            ratios.append((ratio.detach() - 1).abs().max())
            divergences.append(kl.detach().mean())
        scalars = {"reward": rewards.mean(), "ratio_error": torch.stack(ratios).max()}
        if self.kl_weight:
            scalars["kl"] = torch.stack(divergences).mean()
        return Outcome(torch.stack(losses).mean(), scalars)

    def rows_of(self, turn: tuple[int, int], num_prompts: int) -> slice:
        """The rows of the G B samples that this one of several updates trains."""
        share = self.group_size // turn[1] if self.split_groups else self.group_size
        first = turn[0] * share if self.split_groups else 0
        return slice(first * num_prompts, (first + share) * num_prompts)

    def trained_steps(self, draws: Draws, num_prompts: int) -> Tensor:
        """The random steps that each sample trains, one after the other; int64 [n, G B]."""
        orders = [draws.order(f"steps of {g}", self.num_steps - 1, num_prompts) for g in range(self.group_size)]
        return torch.cat(orders)[:, : self.num_trained_steps].T

    def levels(
        self, policy: Policy, conditions: Conditions, like: Tensor
    ) -> tuple[Float[Tensor, "N B"], Float[Tensor, "N B"]]:
        """The schedule's noise levels, and the diffusion of the step from each."""
        sigmas = self.sigmas(policy, conditions, like)
        return sigmas, (self.diffusion or DanceDiffusion())(sigmas)

    def random_step(self, policy: Policy, x: Tensor, level: Level, conditions: Conditions) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the step of each sample."""
        sigma, sigma_next, diffusion = level
        return flow.random_step(x, self.velocity(policy, x, sigma, conditions), sigma, sigma_next, diffusion)

    def check_updates(self, updates_per_rollout: int) -> None:
        """Refuse updates that groups cannot be divided over."""
        if self.split_groups and self.group_size % updates_per_rollout:
            raise ValueError(
                f"model.updates_per_rollout is {updates_per_rollout}, which does not divide group_size "
                f"{self.group_size}: change either, or set split_groups to false"
            )

    def check_policy(self, policy: Policy) -> None:
        """Refuse a penalty by the distance from a base that nothing keeps, and steps by another model than draws."""
        adapter = getattr(policy, "adapter", None)
        if getattr(policy, "rollout_cache", None) is not None or (adapter is not None and adapter.dropout):
            raise ValueError(
                "GRPO compares the probabilities of a rollout's steps with those of the same steps in training, and "
                "model.policy.init_args.rollout_cache and adapter.dropout make them those of two models: set "
                "rollout_cache to null and dropout to 0"
            )
        if self.guidance != 1 and not policy.trains_as_it_samples:
            raise ValueError(
                f"guidance is {self.guidance}, by which rollouts are drawn but no step is trained, so that their "
                "probabilities do not compare: set model.policy.init_args.trained_guidance to detached, without "
                "guidance_every and guided_steps, or guidance to 1"
            )
        if self.kl_weight and not policy.has_reference:
            raise ValueError(
                f"kl_weight is {self.kl_weight}, and this policy keeps no base to be compared with: train an adapter "
                "(model.policy.init_args.adapter, without pretrained), or set kl_weight to 0"
            )

    @torch.no_grad()
    def _all_rewards(self, policy: Policy, reward: Reward, groups: Conditions, x0: Tensor, draws: Draws) -> Tensor:
        size = self.reward_batch_size or len(x0)
        parts = [slice(start, start + size) for start in range(0, len(x0), size)]
        return torch.cat([self.rewards(policy, reward, x0[rows], groups.take(rows), draws) for rows in parts])

    def _noise(
        self, purpose: str, shape: Sequence[int], draws: Draws, groups: Conditions, *, same: bool = False
    ) -> Tensor:
        # Drawn per prompt and member, so that it does not depend on how prompts are divided over ranks.
        members = [0] * self.group_size if same else range(self.group_size)
        noise = [draws.noise(shape, shared=False, purpose=f"{purpose} of {g}") for g in members]
        return torch.cat(noise).to(groups.device, non_blocking=True)


def clipped_gain(ratio: Float[Tensor, " B"], advantage: Float[Tensor, " B"], clip_range: float) -> Float[Tensor, " B"]:
    """PPO's `min(rho A, clip(rho, 1 - c, 1 + c) A)` (arXiv 1707.06347)."""
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.minimum(ratio * advantage, clipped * advantage)


def advantages(rewards: Float[Tensor, "G B"], largest: float) -> Float[Tensor, "G B"]:
    """How far each sample beats its group of G, in standard deviations of the group, clipped to -+ `largest`."""
    deviation = rewards - rewards.mean(0)
    return (deviation / (rewards.std(0) + 1e-8)).clamp(-largest, largest)
