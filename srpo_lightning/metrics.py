"""What is measured on images: pure functions under thin torchmetrics classes.

Shapes: B images, T texts, E features.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric


def saturation(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Mean HSV saturation of each image in [0, 1]: (max - min) / max over the channels, 0 for black."""
    high, low = images.amax(1), images.amin(1)
    return torch.where(high > 0, (high - low) / high.clamp(min=1e-8), torch.zeros_like(high)).mean((-2, -1))


def is_in_top(scores: Float[Tensor, "B T"], truth: Int[Tensor, " B"], k: int) -> Bool[Tensor, " B"]:
    """Whether fewer than `k` texts score higher than the true one."""
    own = scores.gather(1, truth[:, None])
    return (scores > own).sum(1) < k


class LabelShare(Metric):
    """The share of images whose best-scoring text is each of T labels, [T], summing to 1."""

    full_state_update = False
    counts: Tensor

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(num_labels, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, scores: Float[Tensor, "B T"]) -> None:
        """Add images by their scores under every label."""
        self.counts += torch.bincount(scores.argmax(1), minlength=len(self.counts))

    def compute(self) -> Float[Tensor, " T"]:
        """The shares so far."""
        return self.counts / self.counts.sum()


class Diversity(Metric):
    """Mean cosine distance between the features of different images, 0 (all alike) to 2.

    Kept as the sum of unit vectors: |sum|^2 = n + the cosines of all ordered pairs.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Float[Tensor, "B E"]) -> None:
        """Add images by their features, of any length."""
        self.total += torch.nn.functional.normalize(features.double(), dim=-1).sum(0)
        self.count += len(features)

    def compute(self) -> Float[Tensor, ""]:
        """The mean over all pairs; NaN for fewer than two images."""
        pairs = self.count * (self.count - 1)
        return 1 - (self.total.square().sum() - self.count) / pairs
