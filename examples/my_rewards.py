"""A reward of one's own: one method, named in YAML by its class_path."""

from collections.abc import Sequence

import torch
from torch import Tensor

from srpo_lightning.rewards import Reward

COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}


class NamedColour(Reward):
    """How much of the colours that its text names an image shows."""

    def forward(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] and B texts to scores [B], differentiable with respect to the images."""
        named = [[COLOURS[word] for word in COLOURS if word in text.lower()] for text in texts]
        wanted = torch.stack([images.new_tensor(colours).reshape(-1, 3).sum(0) for colours in named])
        shown = images.mean((2, 3))
        return ((shown - shown.mean(1, keepdim=True)) * wanted).sum(1)
