"""What scores an image."""

from srpo_lightning.rewards.aesthetic import AestheticV25 as AestheticV25
from srpo_lightning.rewards.aesthetic import LaionAesthetic as LaionAesthetic
from srpo_lightning.rewards.base import Reward as Reward
from srpo_lightning.rewards.clip import ClipReward as ClipReward
from srpo_lightning.rewards.clip import PickScore as PickScore
from srpo_lightning.rewards.hps import SGPHPS as SGPHPS
from srpo_lightning.rewards.hps import HPSv2 as HPSv2
from srpo_lightning.rewards.hpsv3 import HPSv3 as HPSv3
from srpo_lightning.rewards.image_reward import ImageReward as ImageReward
from srpo_lightning.rewards.motion import Motion as Motion
from srpo_lightning.rewards.statistic import PictureStatistic as PictureStatistic
from srpo_lightning.rewards.video_align import VideoAlignReward as VideoAlignReward
from srpo_lightning.rewards.weighted import Term as Term
from srpo_lightning.rewards.weighted import WeightedReward as WeightedReward
from srpo_lightning.rewards.xclip import XClipReward as XClipReward
