"""The training loop that the three kinds of small model share: two optimizers, one schedule, EMA, exact resume."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

CLIP_NORM = 1.0


class Trainee(LightningModule, ABC):
    """A network that is trained for a fixed number of steps on batches drawn from (seed, step).

    Args:
        net: what is trained.
        steps: length of the run; the learning rate falls linearly to zero over its last `decay` part.
        seed: of every random draw.
        muon_lr: step size of hidden matrices (Muon, in units of AdamW's); 0 leaves them to AdamW.
        adam_lr: step size of everything else.
        decay: part of the run over which the learning rate falls.
        ema_decay: of the averaged weights, which are what is exported.
    """

    ema: AveragedModel

    def __init__(
        self,
        net: nn.Module,
        steps: int,
        seed: int,
        muon_lr: float,
        adam_lr: float,
        decay: float = 0.3,
        ema_decay: float = 0.999,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self.steps, self.seed = steps, seed
        self.muon_lr, self.adam_lr, self.decay = muon_lr, adam_lr, decay

        def average(old: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
            # A young average forgets fast: its first weights are random.
            return old.lerp(new, max(1 - ema_decay, 9 / (10 + float(count))))

        self.ema = AveragedModel(net, avg_fn=average)
        self.ema.requires_grad_(False)

    @abstractmethod
    def loss(self, draw: torch.Generator) -> dict[str, Tensor]:
        """The loss under "loss" and what else is worth a curve, on a batch drawn from `draw`."""

    def configure_optimizers(self) -> list[Optimizer]:
        """Muon for hidden matrices, AdamW for embeddings, norms, biases and convolutions."""
        hidden: dict[nn.Parameter, None] = {}  # sets in order: a shared embedding must not be stepped twice
        rest: dict[nn.Parameter, None] = {}
        for module in self.net.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    is_hidden = isinstance(module, nn.Linear) and name == "weight" and self.muon_lr > 0
                    (hidden if is_hidden else rest)[parameter] = None
        optimizers: list[Optimizer] = [AdamW(list(rest), lr=self.adam_lr, betas=(0.9, 0.99), weight_decay=0.0)]
        if hidden:
            optimizers.append(Muon(list(hidden), lr=self.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
        return optimizers

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """One step of both optimizers; `batch` is ignored, the data follow from the step number."""
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.global_step)
        scalars = self.loss(draw)
        self.manual_backward(scalars["loss"])
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), CLIP_NORM)
        for optimizer, rate in zip(self.trainer.optimizers, (self.adam_lr, self.muon_lr), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = rate * self.lr_factor(self.global_step)
        self.log_dict({name: value.detach() for name, value in scalars.items()}, prog_bar=False)
        for optimizer in self.trainer.optimizers[1:]:
            optimizer.step()  # the raw one: Lightning would count a second global step
            optimizer.zero_grad()
        counted = self.optimizers()
        first = counted[0] if isinstance(counted, list) else counted
        first.step()
        first.zero_grad()
        self.ema.update_parameters(self.net)

    def lr_factor(self, step: int) -> float:
        """Short warm-up, plateau, linear fall to zero."""
        return min(1.0, (step + 1) / 100, max(0.0, (self.steps - step) / (self.decay * self.steps)))


class Steps(torch.utils.data.IterableDataset[int]):
    """An endless stream of nothing: batches follow from the step number alone."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


def fit(
    trainee: Trainee,
    folder: Path,
    save_every: int = 200,
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed",
) -> None:
    """Train up to `trainee.steps` in `folder`, from its newest checkpoint if it has one."""
    saver = ModelCheckpoint(folder, filename="step", every_n_train_steps=save_every, save_last=True, save_top_k=0)
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=trainee.steps,
        logger=CSVLogger(folder, name="log"),  # a new version for each start: one log never wipes another
        callbacks=[saver],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=50,
    )
    last = folder / "last.ckpt"
    trainer.fit(trainee, DataLoader(Steps(), batch_size=None), ckpt_path=str(last) if last.exists() else None)
    trainer.save_checkpoint(last)


def read_ema(folder: Path) -> dict[str, Any]:
    """The averaged weights in the newest checkpoint of a run, under the names of `Trainee.net`."""
    state = torch.load(folder / "last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    prefix = "ema.module."
    averaged = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    # Copies in the usual layout: safetensors refuses tied and channels-last tensors.
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in averaged.items()}


def trained(work: Path, name: str, seed: int, trainee: Callable[[], Trainee]) -> dict[str, Tensor]:
    """Averaged weights of one stage of a build, from its file or from training it.

    Args:
        work: folder of checkpoints and results.
        name: name of the stage.
        seed: of the initial weights.
        trainee: makes what is trained.
    """
    file = work / f"{name}.safetensors"
    if not file.exists():
        torch.manual_seed(seed)
        fit(trainee(), work / name)
        save_file(read_ema(work / name), file)
    return load_file(file)
