"""Trains the built-in model towards "3d" without the command line: python examples/train.py, again to go on."""

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from srpo_lightning.callbacks import EMA, Progress, RunCheckpoint, SampleLogger, StepBar
from srpo_lightning.config.shipped import with_builtin
from srpo_lightning.data import PromptData
from srpo_lightning.files.checkpoints import AtomicCheckpointIO
from srpo_lightning.module import SRPOModule
from srpo_lightning.objectives import SRPO, ControlWords
from srpo_lightning.policies import FluxPolicy
from srpo_lightning.rewards import ClipReward
from srpo_lightning.run_folder import RunFolder

seed_everything(0)
run = RunFolder("runs/library")
policy = FluxPolicy(with_builtin("builtin:emoji-flux"), height=64, width=64)
reward = ClipReward(with_builtin("builtin:emoji-clip"))
objective = SRPO(ControlWords(positive=["3d"], negative=["flat"]), num_rollout_steps=4)
module = SRPOModule(policy, reward, objective, num_sample_steps=4)
prompts = with_builtin("builtin:prompts/train.txt"), with_builtin("builtin:prompts/eval.txt")
data = PromptData(prompts[0], policy.encoder, prompts[1], batch_size=4, num_eval_prompts=8)
trainer = Trainer(
    default_root_dir=run.path,  # checkpoints, samples and logs of the run
    max_steps=8,
    gradient_clip_val=0.1,
    plugins=[AtomicCheckpointIO()],  # a checkpoint is whole, or not there
    callbacks=[EMA(decay=0.9), SampleLogger(), RunCheckpoint(every_n_steps=4), Progress(), StepBar()],
    logger=TensorBoardLogger(run.logs.parent, name=run.logs.name, version=""),
    num_sanity_val_steps=-1,  # the base is evaluated before training
    check_val_every_n_epoch=None,  # evaluations count steps: the stream of prompts has no end
    val_check_interval=4,
    use_distributed_sampler=False,  # the data divides itself among ranks, and resumes
    log_every_n_steps=1,
)
with run.lock():  # one process at a time
    last = run.find_checkpoint("last", monitor=None, mode="max") if run.checkpoints() else None
    trainer.fit(module, data, ckpt_path=last, weights_only=True)
