"""A reward for keeping a plain statistic of pictures, such as fine detail, that no other reward sees."""

from collections.abc import Sequence

from jsonargparse.typing import PositiveFloat

from srpo_lightning.picture_statistics import PICTURE_STATISTICS
from srpo_lightning.rewards.base import Images, Reward, Scores


class PictureStatistic(Reward):
    """How near a statistic of a picture is to a target: `-(s / target - 1)^2`, 0 at best. It reads no text.

    A term of WeightedReward. A reward that was trained on blurred pictures too does not mind blur, so that training by
    it blurs; this term keeps what `RewardTracking` would otherwise only report.

    Args:
        statistic: Name of the statistic, one of those that RewardTracking records.
        target: Value to keep, for instance the statistic's mean over pictures before training, or over good ones.

    Raises:
        ValueError: naming the statistics that there are.
    """

    reads_text = False

    def __init__(self, statistic: str, target: PositiveFloat) -> None:
        super().__init__()
        if statistic not in PICTURE_STATISTICS:
            raise ValueError(f"statistic is {statistic!r}: choose from {', '.join(PICTURE_STATISTICS)}")
        self.statistic, self.target = statistic, float(target)

    def forward(self, images: Images, texts: Sequence[str]) -> Scores:
        """The squared relative distance from the target, below 0."""
        scores: Scores = -(PICTURE_STATISTICS[self.statistic].measure(images) / self.target - 1).square()
        return scores
