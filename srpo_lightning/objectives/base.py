"""What the module asks of an objective, and the one trick that all reward-gradient objectives share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.files.fingerprint import Recorded
from srpo_lightning.policies.base import Policy
from srpo_lightning.rewards.base import Reward


class Rollout(NamedTuple):
    """Clean latents and the noise they grew from, both [B, ...].

    Args:
        x0: where the rollout ended: clean latents, unless the objective stops before.
        noise: where it began.
        trajectory: [n + 1, B, ...], every state in between, where the objective keeps them.
        log_probs: [n, B], of each step given the state before, where steps are random.
        turn: u and U: this is training step u, from 0, of U on the same rollout (model.updates_per_rollout).
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


def refuse_pictures(objective: Objective) -> NoReturn:
    """Say that an objective learns from the policy's own trajectories alone.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"{type(objective).__name__} learns from the policy's own trajectories, and data.offline_ratio gives real "
        "pictures in their place: leave it and data.images out, or train with SRPO or DirectAlign"
    )


class Pull(NamedTuple):
    """What the reward says of recovered latents, without any graph.

    Args:
        rewards: [B].
        loss: their mean loss, a scalar.
        gradient: d loss / d x0_hat, [B, ...].
    """

    rewards: Tensor
    loss: Tensor
    gradient: Tensor


def reward_gradient(
    x0_hat: Tensor,
    reward_of: Callable[[Tensor, slice], Tensor],
    loss_of: Callable[[Tensor], Tensor],
    micro_batch_size: int | None = None,
) -> Pull:
    """The reward of recovered latents and the gradient of its mean loss there, through decoder and reward only.

    Their graph is built, used and freed micro-batch by micro-batch, and never lives at the same time as the policy's.

    Args:
        x0_hat: [B, ...]; its own graph is left alone.
        reward_of: the rewards [b] of the latents x0_hat[rows], called with (x0_hat[rows], rows).
        loss_of: rewards to losses, element by element.
        micro_batch_size: samples decoded and scored at once; None: all of them.
    """
    size = micro_batch_size or len(x0_hat)
    parts = []
    for start in range(0, len(x0_hat), size):
        rows = slice(start, start + size)
        leaf = x0_hat[rows].detach().requires_grad_()
        rewards = reward_of(leaf, rows)
        losses = loss_of(rewards)
        (gradient,) = torch.autograd.grad(losses.sum() / len(x0_hat), leaf)
        parts.append((rewards.detach(), losses.detach(), gradient))
    rewards, losses, gradient = map(torch.cat, zip(*parts, strict=True))
    return Pull(rewards, losses.mean(), gradient)


def surrogate(pull: Pull, x0_hat: Tensor) -> Tensor:
    """A scalar with the value of the loss whose backward sends `pull.gradient` into `x0_hat`.

    The chain rule, cut in two. A reward that is not finite poisons the gradient, so that the check of the gradient norm
    sees it on every rank.
    """
    carrier = (x0_hat * torch.where(pull.rewards.isfinite().all(), pull.gradient, torch.nan)).sum()
    return pull.loss + carrier - carrier.detach()
