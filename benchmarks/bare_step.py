"""A training step without Lightning, by the module's own objective, reward and optimizer."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from jsonargparse import Namespace
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from srpo_lightning import phases
from srpo_lightning.batch import Conditions
from srpo_lightning.callbacks import EMA
from srpo_lightning.config.arguments import new_module
from srpo_lightning.config.classes import of_class
from srpo_lightning.jobs.estimate.prediction import quiet, without_weights
from srpo_lightning.jobs.estimate.step import micro_batch
from srpo_lightning.module import SRPOModule


def load(config: Namespace, device: torch.device, geometry: str) -> SRPOModule:
    """The configured module; of FLUX.1 the architecture alone is there."""
    module = new_module(config)
    with quiet(), without_weights(str(device)) if geometry == "flux" else nullcontext():
        module.configure_model()
    return module.to(device)


def on_device(conditions: Conditions, device: torch.device) -> Conditions:
    """The same batch there."""
    moved: Conditions = tree_map_only(Tensor, lambda tensor: tensor.to(device), conditions)
    return moved


def fresh(conditions: Conditions, step: int) -> Conditions:
    """The batch with prompts that the reward has not read yet."""
    return conditions._replace(prompts=[f"prompt {step} {i}" for i in range(conditions.batch_size)])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class BareStep:
    """A training step by the module's own objective, reward and optimizer, without Lightning."""

    def __init__(self, module: SRPOModule, config: Namespace, conditions: Conditions, optimizer: Optimizer) -> None:
        self.module = module
        self.trainer = config.trainer
        self.conditions = conditions
        self.optimizer = optimizer
        self.parameters = [p for _, p in module.trainable_parameters()]
        self.accumulates = False
        """Whether the gradients of the micro-batch before stay, and this one's are added."""
        self.ema = next((EMA(**vars(own.init_args)) for own in of_class(config.trainer.callbacks, EMA)), None)
        self.progress: Any = SimpleNamespace(global_step=0)
        if self.ema:
            self.ema.on_fit_start(self.progress, module)

    def __call__(self) -> None:
        """Make one, its phases told to whoever follows them."""
        loss = micro_batch(self.module, fresh(self.conditions, self.module.micro_step), self.trainer.precision)
        self.module.micro_step += 1
        if not self.accumulates:
            self.optimizer.zero_grad()
        phases.enter(phases.BACKWARD)
        loss.backward()
        phases.enter(phases.STEP)
        if torch.nn.utils.clip_grad_norm_(self.parameters, self.trainer.gradient_clip_val or torch.inf).isfinite():
            self.optimizer.step()
        self.progress.global_step += 1
        if self.ema:
            self.ema.on_train_batch_end(self.progress, self.module, None, self.conditions, 0)
