"""What scores an image."""

from srpo_lightning.rewards.base import Reward as Reward
from srpo_lightning.rewards.clip import ClipReward as ClipReward
from srpo_lightning.rewards.clip import PickScore as PickScore
from srpo_lightning.rewards.hps import SGPHPS as SGPHPS
from srpo_lightning.rewards.hps import HPSv2 as HPSv2
from srpo_lightning.rewards.weighted import Term as Term
from srpo_lightning.rewards.weighted import WeightedReward as WeightedReward
