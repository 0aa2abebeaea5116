"""What a reward model is: a frozen, differentiable judge of images under texts."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

Images: TypeAlias = Float[Tensor, "B 3 H W"]
Scores: TypeAlias = Float[Tensor, " B"]


class Reward(nn.Module, ABC):
    """Scores images under texts; higher is better; differentiable with respect to the images.

    A reward of your own needs `forward` alone. `load` is where large weights are read (the constructor stays cheap);
    whatever parameters it makes are frozen. `relative` and `compare` are worth overriding where image features can be
    shared between texts.
    """

    def load(self) -> None:
        """Read the weights, once; a second call does nothing."""

    @abstractmethod
    def forward(self, images: Images, texts: Sequence[str]) -> Scores:
        """The score of each image under its own text.

        Args:
            images: [B, 3, H, W] in [0, 1].
            texts: B of them.
        """

    def relative(self, images: Images, positive: Sequence[str], negative: Sequence[str], weight: Scores) -> Scores:
        """SRPO's relative reward: `(1 + weight) R(image, positive) - R(image, negative)`.

        Args:
            positive: B texts that the image should move towards.
            negative: B texts that it should move away from.
            weight: [B], how much more the positive side counts.

        Source: arXiv 2509.06942, Semantic Relative Preference Optimization.
        """
        return (1 + weight) * self(images, positive) - self(images, negative)

    def compare(self, images: Images, texts: Sequence[str]) -> Float[Tensor, "B T"]:
        """The score of every image under every text."""
        return torch.stack([self(images, [text] * len(images)) for text in texts], dim=1)

    def train(self, mode: bool = True) -> "Reward":
        """Stay in evaluation mode: a reward is frozen."""
        return super().train(False)
