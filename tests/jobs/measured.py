"""The peak that a real training step reaches, by the allocator's own account.

On a CPU: torch's allocator reports every allocation and release to the profiler, kernels' temporary buffers too, while
the Trainer makes two optimizer steps. What was allocated before is the bytes of the tensors that live on: weights,
averages and features. On CUDA: max_memory_allocated.
"""

import json
import os
import sys
import tempfile
import warnings

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from srpo_lightning.callbacks import EMA
from srpo_lightning.config.classes import of_class
from srpo_lightning.jobs.estimate.prediction import fake_conditions
from srpo_lightning.module import SRPOModule


class Measure(Callback):
    """Measures from the first micro-batch to the end of the second optimizer step."""

    def __init__(self) -> None:
        self.profile: profile | None = None
        self.before = self.peak = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.before:
            return
        self.before = lasting_bytes(trainer, pl_module, batch)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profile.start()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step != 2:
            return
        if self.profile is None:
            self.peak = torch.cuda.max_memory_allocated()
            return
        self.profile.stop()
        events = [e for e in self.profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        self.peak = self.before + peak


def lasting_bytes(trainer, module, batch) -> int:
    emas = [c.weights for c in trainer.callbacks if isinstance(c, EMA)]
    leaves = tree_leaves([list(module.parameters()), list(module.buffers()), emas, tuple(batch)])
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in leaves if isinstance(t, Tensor)}
    return sum(storages.values())


def measured_peak(config: Namespace, accelerator: str = "cpu") -> int:
    """Bytes; the Trainer's loop, on real weights."""
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(SRPOModule, "model")
    module = parser.instantiate_classes(Namespace(model=config.model.clone())).model
    module.objective.num_rollout_steps = 2
    conditions = fake_conditions(config, module.policy, config.data.batch_size)
    emas = [EMA(**vars(own.init_args)) for own in of_class(config.trainer.callbacks, EMA)]
    measure = Measure()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            default_root_dir=folder,
            accelerator=accelerator,
            devices=1,
            max_steps=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            precision=config.trainer.precision,
            accumulate_grad_batches=config.trainer.accumulate_grad_batches,
            gradient_clip_val=config.trainer.gradient_clip_val,
            callbacks=[*emas, measure],
        )
        trainer.fit(module, DataLoader([conditions] * 8, batch_size=None))
    return measure.peak


def main() -> None:
    """Print the predicted and the measured peak of the demo, whose settings the command line changes."""
    from tests.jobs import test_estimate as predicting

    os.chdir(predicting.REPOSITORY)
    torch.set_num_threads(1)
    config = predicting.changed(predicting.EMOJI, **json.loads(sys.argv[1]))
    print(json.dumps([predicting.peak(config, "cpu").total, measured_peak(config)]))
