"""Several rewards as one: normalised, weighted and summed, each with the gradient of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from jsonargparse.typing import PositiveFloat
from torch import Tensor, nn

from srpo_lightning.rewards.base import Images, Reward, Scores, seen_by


@dataclass
class Term:
    """One reward of a sum; it counts as `weight * (score - mean) / std`.

    Args:
        reward: Reward of the term, also one that reads no text.
        weight: Factor by which the reward counts; a negative one makes it a penalty.
        mean: Mean of the reward's scores over pictures like those of the start; `control-words` prints it.
        std: Standard deviation of the reward's scores over the same pictures.
        plain: Whether the score of the bare prompt counts, instead of the contrast that the control words make. A
            reward that reads no text is always plain.
    """

    reward: Reward
    weight: float = 1.0
    mean: float = 0.0
    std: PositiveFloat = 1.0
    plain: bool = False


class WeightedReward(Reward):
    """The weighted sum of normalised rewards.

    Where images require a gradient, each term's graph is built, used and freed before the next one's. So the peak of
    memory is that of the largest reward, not of their sum.

    Where a term reads clips the sum does: that term gets the frames together, the others score them one by one.

    Args:
        terms: Rewards, each with its weight and normalisation.
    """

    def __init__(self, terms: list[Term]) -> None:
        super().__init__()
        if not terms:
            raise ValueError("WeightedReward has no terms: give at least one reward")
        self.terms = terms
        self.rewards = nn.ModuleList(term.reward for term in terms)
        self.steering = [term for term in terms if term.reward.reads_text and not term.plain]
        self.unsteered = [term for term in terms if not term.reward.reads_text or term.plain]
        self.reads_text = bool(self.steering)
        self.reads_clips = any(term.reward.reads_clips for term in terms)

    def load(self) -> None:
        """Read all weights."""
        for term in self.terms:
            term.reward.load()

    def check_frames(self, num_frames: int) -> None:
        """Refuse too few for a term."""
        super().check_frames(num_frames)
        for term in self.terms:
            term.reward.check_frames(num_frames)

    def forward(self, images: Images, texts: Sequence[str]) -> Scores:
        """The sum of all terms."""
        return self._sum(images, self.terms, lambda term, x: _normal(term, term.reward(x, texts)))

    def scores(self, images: Images, texts: Sequence[Sequence[str]]) -> Float[Tensor, "B T"]:
        """The sum of all terms under each text."""
        totals = [
            _normal(term, seen_by(term.reward, images, partial(term.reward.scores, texts=texts))) * term.weight
            for term in self.terms
        ]
        return torch.stack(totals).sum(0)

    def contrast(self, images: Images, texts: Sequence[Sequence[str]], coefficients: Float[Tensor, "B T"]) -> Scores:
        """The contrast of the terms that the words steer."""
        self.check_contrast()
        offset = coefficients.sum(1)
        return self._sum(
            images,
            self.steering,
            lambda term, x: (term.reward.contrast(x, texts, coefficients) - term.mean * offset) / term.std,
        )

    def check_contrast(self) -> None:
        """Refuse a sum in which nothing reads the words."""
        if not self.steering:
            raise ValueError(
                "every term of this WeightedReward is plain or reads no text: for control words to steer, give it a "
                "term that reads text with `plain: false`"
            )

    def readers(self) -> list[tuple[Reward, bool]]:
        """The readers of all terms."""
        return [
            (reward, is_steered and term in self.steering)
            for term in self.terms
            for reward, is_steered in term.reward.readers()
        ]

    def plain(self, images: Images, prompts: Sequence[str]) -> Scores:
        """The terms that the words do not steer, under the bare prompts."""
        return self._sum(images, self.unsteered, lambda term, x: _normal(term, term.reward(x, prompts)))

    def _sum(self, images: Images, terms: Sequence[Term], score: Callable[[Term, Images], Scores]) -> Scores:
        total = images.new_zeros(len(images), dtype=torch.promote_types(images.dtype, torch.float32))
        for term in terms:
            total = total + term.weight * seen_by(term.reward, images, partial(eagerly, partial(score, term)))
        return total


def _normal(term: Term, scores: Tensor) -> Tensor:
    return (scores - term.mean) / term.std


def eagerly(score: Callable[[Images], Scores], images: Images) -> Scores:
    """`score(images)`, with its gradient taken at once and its graph freed.

    Each score must depend on its own image alone.
    """
    if not (torch.is_grad_enabled() and images.requires_grad):
        return score(images)
    scores: Tensor = _Eager.apply(images, score)
    return scores


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, score: Callable[[Images], Scores]) -> Tensor:
        leaf = images.detach().requires_grad_()
        with torch.enable_grad():
            scores = score(leaf)
        (gradient,) = torch.autograd.grad(scores, leaf, torch.ones_like(scores))
        ctx.save_for_backward(gradient)
        return scores.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return upstream.view(-1, *[1] * (gradient.ndim - 1)).to(gradient.dtype) * gradient, None
