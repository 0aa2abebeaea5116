"""What the policy is trained for; each file reads like its paper's algorithm box."""

from srpo_lightning.objectives.base import Objective as Objective
from srpo_lightning.objectives.base import Outcome as Outcome
from srpo_lightning.objectives.base import Rollout as Rollout
from srpo_lightning.objectives.srpo import SRPO as SRPO
from srpo_lightning.objectives.srpo import ControlWords as ControlWords
