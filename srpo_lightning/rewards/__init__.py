"""What scores an image."""

from srpo_lightning.rewards.base import Reward as Reward
from srpo_lightning.rewards.clip import ClipReward as ClipReward
