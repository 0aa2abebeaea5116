"""A reward of clips for what moves, against pictures that stand still."""

from collections.abc import Sequence

from jsonargparse.typing import PositiveFloat

from srpo_lightning.picture_statistics import change_of_shapes
from srpo_lightning.rewards.base import Images, Reward, Scores


class Motion(Reward):
    """How much a clip moves, up to a target: `min(m / target, 1)`. It reads no text, and clips of two frames or more.

    m is the mean absolute change of a value in [0, 1] from one rewarded frame to the next, once each frame's mean
    colour is taken off. A term of WeightedReward beside a reward that scores frames, which does not miss what moves.
    Two things keep flicker from winning: light that changes over the whole picture is no motion here, and beyond the
    target nothing is gained, so that there is no gradient either.

    Args:
        target: Change that is enough, for instance the m of clips before training. Given as one of
            RewardTracking.metrics with a target of 1, the reward records m of whole clips.
    """

    reads_text = False
    reads_clips = True

    def __init__(self, target: PositiveFloat) -> None:
        super().__init__()
        self.target = float(target)

    def forward(self, images: Images, texts: Sequence[str]) -> Scores:
        """The share of the target that is reached, in [0, 1], of clips [B, 3, F, H, W]."""
        scores: Scores = (change_of_shapes(images) / self.target).clamp(max=1)
        return scores
