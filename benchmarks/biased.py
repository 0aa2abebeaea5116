"""A reward with a known bias, for experiments/objectives/biased.yaml: what SRPO's relative reward is made to cancel."""

from collections.abc import Sequence

from torch import Tensor

from srpo_lightning.picture_statistics import saturation
from srpo_lightning.rewards import ClipReward, Reward


class SaturationBias(Reward):
    """A CLIP score that also likes saturated pictures, whatever the text says.

    Args:
        pretrained: the CLIP.
        weight: of the mean saturation, in [0, 1], beside the cosine.
    """

    def __init__(self, pretrained: str, weight: float = 1.0) -> None:
        super().__init__()
        self.pretrained = pretrained
        self.weight = weight
        self.clip = ClipReward(pretrained)

    def load(self) -> None:
        """The CLIP's weights."""
        self.clip.load()

    def forward(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosine plus bias."""
        scores: Tensor = self.clip(images, texts) + self.weight * saturation(images)
        return scores

    def scores(self, images: Tensor, texts: Sequence[Sequence[str]]) -> Tensor:
        """The bias is in every text's score alike."""
        return self.clip.scores(images, texts) + self.weight * saturation(images).unsqueeze(1)
