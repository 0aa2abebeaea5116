"""What the module asks of an objective, and what objectives share: a form of the reward, and its gradient."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from srpo_lightning import phases
from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.files.fingerprint import Recorded
from srpo_lightning.objectives.reward_forms import Plain, RewardForm
from srpo_lightning.policies.base import Policy
from srpo_lightning.rewards.base import Reward


class Rollout(NamedTuple):
    """Clean latents and the noise that they grew from.

    Args:
        x0: Latents [B, ...] where the rollout ended: clean ones, unless the objective stops before.
        noise: Latents [B, ...] where the rollout began.
        trajectory: States [n + 1, B, ...] from noise to x0, where the objective keeps them.
        log_probs: Log-probabilities [n, B] of the steps, each given the state before, where steps are random.
        turn: Numbers (u, U): this is training step u, from 0, of U on the same rollout (model.updates_per_rollout).
    """

    x0: Tensor
    noise: Tensor
    trajectory: Tensor | None = None
    log_probs: Tensor | None = None
    turn: tuple[int, int] = (0, 1)


class Outcome(NamedTuple):
    """The loss to minimise, and what is worth logging of the step (scalar tensors by name)."""

    loss: Tensor
    scalars: dict[str, Tensor]


class Objective(Recorded, ABC):
    """A training algorithm: a rollout without gradient, then a loss with one."""

    paper: ClassVar[str | None] = None
    """Number in the arXiv of the paper that it is from."""

    @abstractmethod
    def rollout(self, policy: Policy, conditions: Conditions, draws: Draws) -> Rollout:
        """What the step learns from; runs without gradient."""

    @abstractmethod
    def loss(self, policy: Policy, reward: Reward, conditions: Conditions, rollout: Rollout, draws: Draws) -> Outcome:
        """The step itself."""

    def check_reward(self, reward: Reward) -> None:  # most objectives take any
        """Refuse, before anything is read, a reward that the objective cannot use."""

    def check_policy(self, policy: Policy) -> None:  # most objectives take any
        """Refuse a policy that lacks what the objective asks of it."""

    def check_updates(self, updates_per_rollout: int) -> None:  # most objectives take any
        """Refuse a number of training steps on each rollout that the objective cannot divide it into."""

    def check_pictures(self) -> None:  # many objectives take real pictures in the place of a rollout's end
        """Refuse real pictures, which data.offline_ratio gives, before anything is read."""

    @abstractmethod
    def score(self, reward: Reward, images: Tensor, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """What the objective rewards in finished images, under `reward` or under a judge that was never trained on."""


@dataclass(kw_only=True)
class FormObjective(Objective):
    """An objective that asks its reward in one of several forms, and its policy under guidance.

    Args:
        form: Form of the reward: what it is asked about a picture; null asks for the plain reward.
        guidance: Distilled guidance of the trained steps, and of the rollout unless that has its own.
        shift: Timestep shift of the noise levels; null takes the one of the model's scheduler.
        shared_noise: Whether all samples of an optimizer step, on every rank, start from the same noise.
        reward_batch_size: Number of images that are decoded and scored at once; null takes all of them.
    """

    # No default form stands here: jsonargparse would hand its template on to any other form that takes one.
    form: RewardForm = field(default=None, kw_only=False)  # type: ignore[assignment]  # until __post_init__
    guidance: NonNegativeFloat = 3.5
    shift: PositiveFloat | None = None
    shared_noise: bool = False
    reward_batch_size: PositiveInt | None = None

    def __post_init__(self) -> None:
        """Refuse settings that cannot work; subclasses add theirs."""
        self.form = self.form or Plain()

    def rewards(
        self,
        policy: Policy,
        reward: Reward,
        latents: Tensor,
        conditions: Conditions,
        draws: Draws,
        weight: Float[Tensor, " B"] | None = None,
        signs: Sequence[int] | None = None,
    ) -> Float[Tensor, " B"]:
        """What the form rewards in what `latents` decode to; arguments as in RewardForm.

        A reward of pictures is asked of each frame, and their mean counts; one that reads clips gets them together.
        """
        phases.enter(phases.DECODE)
        pictures = policy.rewarded_pictures(latents, conditions.size, draws)
        phases.enter_backward(phases.DECODE, pictures)
        phases.enter(phases.REWARD)
        if reward.reads_clips:
            return self.form(reward, torch.stack(pictures, dim=2), conditions, draws, weight, signs)
        scored = [self.form(reward, own, conditions, draws, weight, signs) for own in pictures]
        return torch.stack(scored).mean(0)

    def score(self, reward: Reward, images: Tensor, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """What the form rewards."""
        return self.form.score(reward, images, prompts)

    def check_reward(self, reward: Reward) -> None:
        """Refuse a reward that the form cannot use."""
        self.form.check(reward)


class Feedback(NamedTuple):
    """What the reward says of recovered latents, without any graph.

    Args:
        rewards: Rewards [B] of the pictures that the latents decode to.
        loss: Mean of the rewards' losses, a scalar.
        gradient: Gradient [B, ...] of that mean in the latents.
    """

    rewards: Tensor
    loss: Tensor
    gradient: Tensor


def reward_gradient(
    x0_hat: Tensor,
    reward_of: Callable[[Tensor, slice], Tensor],
    loss_of: Callable[[Tensor], Tensor],
    micro_batch_size: int | None = None,
) -> Feedback:
    """The reward of recovered latents and the gradient of its mean loss there, through decoder and reward only.

    Their graph is built, used and freed micro-batch by micro-batch. It never lives at the same time as the policy's.

    Args:
        x0_hat: Latents [B, ...]; their own graph is left alone.
        reward_of: Function of (x0_hat[rows], rows) that gives the rewards [b] of these latents.
        loss_of: Function from rewards to losses, element by element.
        micro_batch_size: Number of samples decoded and scored at once; None takes all of them.
    """
    size = micro_batch_size or len(x0_hat)
    scored = []
    for start in range(0, len(x0_hat), size):
        rows = slice(start, start + size)
        leaf = x0_hat[rows].detach().requires_grad_()
        rewards = reward_of(leaf, rows)
        losses = loss_of(rewards)
        (gradient,) = torch.autograd.grad(losses.sum() / len(x0_hat), leaf)
        scored.append((rewards.detach(), losses.detach(), gradient))
    rewards, losses, gradient = map(torch.cat, zip(*scored, strict=True))
    return Feedback(rewards, losses.mean(), gradient)


def surrogate(feedback: Feedback, x0_hat: Tensor) -> Tensor:
    """A scalar with the value of the loss whose backward sends `feedback.gradient` into `x0_hat`.

    This is the chain rule, cut in two. A reward that is not finite poisons the gradient, so that the check of the
    gradient norm sees it on every rank.
    """
    carrier = (x0_hat * torch.where(feedback.rewards.isfinite().all(), feedback.gradient, torch.nan)).sum()
    return feedback.loss + carrier - carrier.detach()
