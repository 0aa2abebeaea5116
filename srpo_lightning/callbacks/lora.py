"""Adapters as files that diffusers reads."""

from typing import Any

from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from srpo_lightning.callbacks.ema import EMA
from srpo_lightning.evaluation.exchange import callbacks_that
from srpo_lightning.files.checkpoints import complete_or_absent_folder
from srpo_lightning.module import SRPOModule
from srpo_lightning.policies.adapters import save_lora
from srpo_lightning.policies.flow_policy import FlowPolicy
from srpo_lightning.run_folder import RunFolder
from srpo_lightning.training.optimizers import whole

PREFIX = "policy.transformer."


class LoraExport(Checkpoint):  # Lightning calls these last: the ema has followed by then
    """Writes the policy's adapter into `<run folder>/lora/step-*/`, and its ema into `ema/` therein, at the end.

    Either folder goes to the pipeline's `load_lora_weights` in diffusers, and without DoRA the file in it to ComfyUI
    too. With DoRA, and of Wan, ComfyUI takes what `export --format lora-comfy` writes. The folders are there complete
    or not at all.

    Args:
        every_n_steps: Optimizer steps between adapters; null: one at the end only.
    """

    def __init__(self, every_n_steps: PositiveInt | None = None) -> None:
        self.every_n_steps = every_n_steps
        self._written_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a policy that has no adapter, before its weights are read."""
        _policy(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write on every n-th optimizer step, once."""
        step = trainer.global_step
        if self.every_n_steps and step % self.every_n_steps == 0 and step != self._written_step:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the result."""
        if trainer.global_step != self._written_step:
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, SRPOModule)
        self._written_step = trainer.global_step
        policy = _policy(module)
        folder = RunFolder.of(trainer).lora(trainer.global_step)
        ema = next((own.weights for own in callbacks_that(trainer, EMA)), {})
        weights = _whole(dict(module.trainable_parameters())), _whole(ema)
        if trainer.is_global_zero:
            with complete_or_absent_folder(folder) as partial:
                for tensors, place in zip(weights, (partial, partial / "ema"), strict=True):
                    if tensors:
                        save_lora(policy.pipeline_class, policy.transformer, tensors, place)
        trainer.strategy.barrier()
        rank_zero_info(f"adapter: {folder}")


def _policy(module: LightningModule) -> FlowPolicy:
    assert isinstance(module, SRPOModule)
    if not isinstance(module.policy, FlowPolicy) or module.policy.adapter is None:
        raise ValueError(
            "LoraExport writes adapters, and the policy has none: take it out of trainer.callbacks, or give "
            "model.policy.init_args.adapter, for instance {rank: 32}"
        )
    return module.policy


def _whole(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors by their names in the transformer, in host memory, gathered from all ranks where they are divided."""
    return {name.removeprefix(PREFIX): whole(tensor.detach()).cpu() for name, tensor in tensors.items()}
