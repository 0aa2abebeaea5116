"""What Lightning calls, and when. The mathematics is in objectives/ and flow.py."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from srpo_lightning import phases
from srpo_lightning.batch import Conditions
from srpo_lightning.draws import Draws, keyed_generator, sample_noise
from srpo_lightning.errors import naming
from srpo_lightning.evaluation.comparison import BASE
from srpo_lightning.evaluation.exchange import HasPictures, OffersWeights, Weights, callbacks_that
from srpo_lightning.objectives.base import Objective, Rollout
from srpo_lightning.objectives.readings import check_readings
from srpo_lightning.policies.base import Policy
from srpo_lightning.policies.parallel import leave_cudnn_attention_alone
from srpo_lightning.rewards.base import Reward
from srpo_lightning.training.agreement import check_weights
from srpo_lightning.training.allocator import return_freed_memory
from srpo_lightning.training.context import data_rank
from srpo_lightning.training.optimizers import InBackward, check_clipping, check_settings, new_trial
from srpo_lightning.training.resuming import check_optimizer, check_shapes, checked_policy, name_of_optimizer
from srpo_lightning.training.skipping import SkipNonFinite
from srpo_lightning.training.timing import StepTimes


class SRPOModule(LightningModule):
    """A policy trained by an objective under a reward.

    Args:
        policy: Flow model that is trained.
        reward: Reward model, frozen, that the policy is trained for.
        objective: Training algorithm.
        optimizer: Optimizer of the policy's trainable parameters.
        lr_scheduler: Schedule of the learning rate, which steps once per optimizer step; null keeps it constant.
        num_sample_steps: Euler steps of evaluation samples.
        sample_guidance: Distilled guidance of evaluation samples.
        seed: Seed of every random number of training and evaluation.
        max_skipped_steps: Consecutive steps with a loss or gradient that is not finite before the run is stopped.
        optimizer_in_backward: Whether each parameter is stepped as soon as its gradient is there, which is then freed.
            That takes no memory for a whole gradient, but allows no accumulation, and no clipping of it
            (trainer.gradient_clip_val: 0).
        clip_norm_per_parameter: Norm that the gradient of each parameter is clipped to, with optimizer_in_backward.
            Unlike trainer.gradient_clip_val, which scales all gradients by one factor, this turns their direction.
        updates_per_rollout: Training steps on each rollout, each with noise levels of its own. With as many accumulated
            batches they make one optimizer step. A run resumed between them rolls out again, with the newer weights.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        objective: Objective,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(
            params, lr=5e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4
        ),
        lr_scheduler: LRSchedulerCallable | None = None,
        num_sample_steps: PositiveInt = 28,
        sample_guidance: NonNegativeFloat = 3.5,
        seed: int = 0,
        max_skipped_steps: NonNegativeInt = 5,
        optimizer_in_backward: bool = False,
        clip_norm_per_parameter: PositiveFloat | None = None,
        updates_per_rollout: PositiveInt = 1,
    ) -> None:
        super().__init__()
        objective.check_reward(reward)
        objective.check_policy(policy)
        reward.check_frames(len(policy.shown_frames))
        objective.check_updates(updates_per_rollout)
        check_clipping(clip_norm_per_parameter, in_backward=optimizer_in_backward)
        self.policy = policy
        self.reward = reward
        self.objective = objective
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.num_sample_steps = num_sample_steps
        self.sample_guidance = sample_guidance
        self.seed = seed
        self.optimizer_in_backward = optimizer_in_backward
        self.updates_per_rollout = updates_per_rollout
        self.kept_rollout: Rollout | None = None
        self.strict_loading = False
        self.micro_step = 0
        self.num_accumulated = 0
        self.loaded_steps = 0
        self.in_backward = InBackward(clip_norm_per_parameter) if optimizer_in_backward else None
        self.times = StepTimes()
        self.skipping = SkipNonFinite(max_skipped_steps, self.in_backward)

    def configure_callbacks(self) -> list[Callback]:
        """Refuse settings before anything is read, which Lightning asks for first; add what every run has."""
        trial = new_trial(self.trainer, self.optimizer, self.lr_scheduler)
        check_settings(self.trainer, self.policy.dtype, trial, in_backward=self.optimizer_in_backward)
        return [own for own in (self.times, self.skipping) if own not in callbacks_that(self.trainer, Callback)]

    def configure_model(self) -> None:
        """Read all weights, once; a strategy that shards divides the policy's."""
        leave_cudnn_attention_alone()
        self.policy.load(getattr(self._strategy, "shard", None))
        if context := getattr(self._strategy, "context", None):
            self.policy.divide(context)
        self.reward.load()
        if self._strategy is not None and self._strategy.root_device.type == "cpu":
            return_freed_memory(sum(weight.nbytes for weight in (*self.parameters(), *self.buffers())))
        self.compare_weights()

    def on_fit_start(self) -> None:
        """Say what of the prompts the reward does not read; refuse words that would train nothing."""
        form = vars(self.objective).get("form")
        prompts = getattr(getattr(self.trainer, "datamodule", None), "trained_prompts", ())
        if form is not None:
            form.prepare(prompts)
            for line in check_readings(form, self.reward, prompts):
                self.print(line)

    def compare_weights(self) -> None:
        """Refuse ranks with other weights; DDP would give all of them the first rank's, without a word."""
        check_weights(self.policy, self.reward, getattr(self._strategy, "mesh", None))

    @property
    def _strategy(self) -> Strategy | None:
        return self.trainer.strategy if self._trainer else None

    def configure_optimizers(self) -> Any:
        """An optimizer of the trainable parameters only, and a scheduler that counts optimizer steps."""
        with naming("model.optimizer"):
            optimizer = self.optimizer([p for _, p in self.trainable_parameters()])
        if self.in_backward:
            self.in_backward.attach(optimizer)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    @property
    def trained_steps(self) -> int:
        """Optimizer steps that the policy has had, also where a checkpoint is only evaluated."""
        return max(self.trainer.global_step, self.loaded_steps)

    def trainable_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The parameters that are trained, averaged and saved."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def forget_gathered(self) -> None:
        """Free what FSDP2 has gathered, which would stand in for parameters that changed since."""
        for part in self.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def training_step(self, batch: Conditions, batch_idx: int) -> Tensor:
        """One micro-batch: a rollout without gradient, or the last one again, then the objective's loss."""
        own = data_rank(self.trainer)
        draws = Draws(self.seed, self.global_step, own.rank, self.num_accumulated, own.num_ranks)
        turn = self.micro_step % self.updates_per_rollout
        rollout = self.kept_rollout
        if rollout is None or turn == 0:
            phases.enter(phases.ROLLOUT)
            with self.policy.rolling_out():
                rollout = self.objective.rollout(self.policy, batch, draws)
        rollout = rollout._replace(turn=(turn, self.updates_per_rollout))
        self.kept_rollout = rollout if self.updates_per_rollout > 1 else None
        self.times.end_rollout(self.device)
        self.micro_step += 1
        self.num_accumulated += 1
        phases.enter(phases.FORWARD)
        outcome = self.objective.loss(self.policy, self.reward, batch, rollout, draws)
        self.log("train/loss", outcome.loss.detach(), prog_bar=True, batch_size=batch.batch_size)
        self.log_dict({f"train/{name}": v for name, v in outcome.scalars.items()}, batch_size=batch.batch_size)
        return outcome.loss

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip with fused optimizers too: Lightning refuses them for a loss scaling that bfloat16 does not need."""
        algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
        Precision.clip_gradients(self.trainer.precision_plugin, optimizer, gradient_clip_val or 0.0, algorithm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One optimizer step, from the gradients of all its micro-batches."""
        # Stochastic rounding draws from torch's global generator.
        torch.manual_seed(keyed_generator(self.seed, "rounding", self.global_step).initial_seed())
        super().optimizer_step(*args, **kwargs)
        self.num_accumulated = 0
        self.times.end_update(self.device)

    def evaluated_weights(self) -> dict[str, Weights]:
        """The weights that evaluations draw by: the policy's and what callbacks offer, the base last."""
        offered: dict[str, Weights | None] = {"policy": nullcontext}
        for callback in callbacks_that(self.trainer, OffersWeights):
            offered |= callback.offered_weights(self)
        shown = {name: weights for name, weights in offered.items() if weights is not None}
        return dict(sorted(shown.items(), key=lambda item: item[0] == BASE))

    def validation_step(self, batch: Conditions, batch_idx: int) -> dict[str, Tensor]:
        """Images of the batch, [B, 3, H, W] in [0, 1], by the name of the weights that drew them."""
        images = {}
        for name, weights in self.evaluated_weights().items():
            with weights():
                images[name] = self.sample(batch)
        return images

    test_step = validation_step

    def predict_step(self, batch: Conditions, batch_idx: int) -> dict[str, Tensor]:
        """Images as in validation; none where a callback has all of them already."""
        weights = self.evaluated_weights()
        kept = [own.has_pictures(self, batch, weights) for own in callbacks_that(self.trainer, HasPictures)]
        return {} if any(kept) else self.validation_step(batch, batch_idx)

    @torch.no_grad()
    def sample(self, conditions: Conditions, noise: Tensor | None = None) -> Tensor:
        """One image per prompt, [B, 3, H, W]; each depends on the seed and its own index alone, or on `noise`."""
        if noise is None:
            shape = self.policy.latent_shape(conditions.size)
            noise = sample_noise(self.seed, conditions.indices.tolist(), shape, conditions.seeds)
        latents = self.policy.integrate(
            lambda x, sigma: self.policy(x, sigma, conditions, self.sample_guidance),
            noise.to(conditions.device),
            self.num_sample_steps,
            conditions.size,
        )
        return self.policy.decode(latents, conditions.size)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # torch overloads it
        """The trainable parameters only: frozen parts stay out of checkpoints."""
        trainable = {name for name, _ in self.trainable_parameters()}
        return {name: t for name, t in super().state_dict(*args, **kwargs).items() if name in trainable}

    def rewind(self, micro_step: int) -> None:
        """Go on from before a micro-batch, of which nothing is left."""
        self.micro_step, self.kept_rollout = micro_step, None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save where the random numbers stand, and whose weights these are."""
        state = {"micro_step": self.micro_step, "policy": self.policy.fingerprint}
        checkpoint["srpo"] = state | {"optimizer": name_of_optimizer(self.optimizer)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another policy, naming the difference; go on where its random numbers stand."""
        saved = checked_policy(checkpoint.get("srpo"), self.policy.fingerprint)
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            check_optimizer(saved.get("optimizer"), self.optimizer)
        self.rewind(saved["micro_step"])
        self.loaded_steps = checkpoint["global_step"]
        if "state_dict" in checkpoint:  # else a sharded one, whose weights the strategy has read and checked
            check_shapes(checkpoint["state_dict"], dict(self.trainable_parameters()))
