"""What the policy is trained for; each file reads like its paper's algorithm box."""

from srpo_lightning.objectives.base import Objective as Objective
from srpo_lightning.objectives.base import Outcome as Outcome
from srpo_lightning.objectives.base import Rollout as Rollout
from srpo_lightning.objectives.direct_align import DirectAlign as DirectAlign
from srpo_lightning.objectives.draft import DRaFT as DRaFT
from srpo_lightning.objectives.draft import DRTune as DRTune
from srpo_lightning.objectives.flow_bp import FlowBPBridge as FlowBPBridge
from srpo_lightning.objectives.flow_bp import FlowBPLagrange as FlowBPLagrange
from srpo_lightning.objectives.flow_bp import FlowBPSparse as FlowBPSparse
from srpo_lightning.objectives.grpo import GRPO as GRPO
from srpo_lightning.objectives.grpo import DanceDiffusion as DanceDiffusion
from srpo_lightning.objectives.grpo import FlowDiffusion as FlowDiffusion
from srpo_lightning.objectives.leap_align import LeapAlign as LeapAlign
from srpo_lightning.objectives.refl import ReFL as ReFL
from srpo_lightning.objectives.reward_forms import ControlWords as ControlWords
from srpo_lightning.objectives.reward_forms import Plain as Plain
from srpo_lightning.objectives.reward_forms import Relative as Relative
from srpo_lightning.objectives.reward_forms import RewardForm as RewardForm
from srpo_lightning.objectives.srpo import SRPO as SRPO
