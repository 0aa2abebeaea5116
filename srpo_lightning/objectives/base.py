"""What the module asks of an objective, and the one trick that all reward-gradient objectives share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws
from srpo_lightning.policies.base import Policy
from srpo_lightning.rewards.base import Reward


class Rollout(NamedTuple):
    """Clean latents and the noise they grew from, both [B, ...]."""

    x0: Tensor
    noise: Tensor


class Outcome(NamedTuple):
    """The loss to minimise, and what is worth logging of the step (scalar tensors by name)."""

    loss: Tensor
    scalars: dict[str, Tensor]


class Objective(ABC):
    """A training algorithm: a rollout without gradient, then a loss with one."""

    @abstractmethod
    def rollout(self, policy: Policy, conditions: Conditions, draws: Draws) -> Rollout:
        """What the step learns from; runs without gradient."""

    @abstractmethod
    def loss(self, policy: Policy, reward: Reward, conditions: Conditions, rollout: Rollout, draws: Draws) -> Outcome:
        """The step itself."""

    @abstractmethod
    def score(self, reward: Reward, images: Tensor, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """What the objective rewards in finished images, under `reward` or under a judge that was never trained on."""


def reward_gradient(
    x0_hat: Tensor, loss_of: Callable[[Tensor, slice], Tensor], micro_batch_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The mean loss of recovered latents and its gradient there, through decoder and reward only.

    Their graph is built, used and freed micro-batch by micro-batch, and never lives at the same time as the policy's.

    Args:
        x0_hat: [B, ...]; its own graph is left alone.
        loss_of: the [b] losses of the latents x0_hat[rows], called with (x0_hat[rows], rows).
        micro_batch_size: samples decoded and scored at once; None: all of them.

    Returns:
        The mean loss (a scalar without graph) and d mean loss / d x0_hat.
    """
    size = micro_batch_size or len(x0_hat)
    losses, pulls = [], []
    for start in range(0, len(x0_hat), size):
        rows = slice(start, start + size)
        leaf = x0_hat[rows].detach().requires_grad_()
        loss = loss_of(leaf, rows)
        pulls.append(torch.autograd.grad(loss.sum(), leaf)[0])
        losses.append(loss.detach())
    return torch.cat(losses).mean(), torch.cat(pulls) / len(x0_hat)


def surrogate(loss: Tensor, x0_hat: Tensor, pull: Tensor) -> Tensor:
    """A scalar with the value of `loss` whose backward sends `pull` into `x0_hat`: the chain rule, cut in two.

    A loss that is not finite poisons the gradient, so that the check of the gradient norm sees it on every rank.
    """
    pull = torch.where(loss.isfinite(), pull, torch.nan)
    carrier = (x0_hat * pull).sum()
    return loss + carrier - carrier.detach()
