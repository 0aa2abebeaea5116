"""What happens around training: ema, checkpoints, samples, tracking, the report."""

from srpo_lightning.callbacks.checkpoint import RunCheckpoint as RunCheckpoint
from srpo_lightning.callbacks.ema import EMA as EMA
from srpo_lightning.callbacks.guard import OverOptimizationGuard as OverOptimizationGuard
from srpo_lightning.callbacks.lora import LoraExport as LoraExport
from srpo_lightning.callbacks.progress import Progress as Progress
from srpo_lightning.callbacks.report import Report as Report
from srpo_lightning.callbacks.samples import SampleLogger as SampleLogger
from srpo_lightning.callbacks.step_bar import StepBar as StepBar
from srpo_lightning.callbacks.tracking import RewardTracking as RewardTracking
