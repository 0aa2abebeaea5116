"""Evaluation samples as files and in TensorBoard."""

from pathlib import Path

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor

from srpo_lightning.batch import Conditions
from srpo_lightning.callbacks import records
from srpo_lightning.callbacks.records import Recorder
from srpo_lightning.module import SRPOModule

SAMPLES = "samples"
PREDICTIONS = "predictions"
METADATA = "metadata.jsonl"


def sample_path(run_folder: str | Path, step: int, weights: str, index: int, kind: str = SAMPLES) -> Path:
    """Where the picture of evaluation prompt `index` after `step` optimizer steps lies."""
    return Path(run_folder) / kind / f"step-{step:08d}" / weights / f"{index:05d}.png"


class SampleLogger(Recorder):
    """Keeps the pictures of the first evaluation prompts, the same prompts and noise at every validation.

    Writes `<run folder>/samples/step-*/<weights>/<index>.png` with a line each in `samples/metadata.jsonl`, and a grid
    per kind of weights to TensorBoard. `predict` writes the pictures of all prompts to `predictions/` likewise.

    Args:
        num_samples: how many of the evaluation prompts, from the first.
        columns: of the grid in TensorBoard.
    """

    file = f"{SAMPLES}/{METADATA}"

    def __init__(self, num_samples: PositiveInt = 16, columns: PositiveInt = 8) -> None:
        self.num_samples = num_samples
        self.columns = columns
        self._grids: dict[str, list[Tensor]] = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with empty grids."""
        self._grids = {}

    def on_validation_batch_end(  # type: ignore[override]  # the outputs of SRPOModule.validation_step
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Tensor],
        batch: Conditions,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the pictures among the batch that are to be kept."""
        assert isinstance(pl_module, SRPOModule)
        kept = [row for row in own_rows(trainer, batch) if batch.indices[row] < self.num_samples]
        for weights, images in outputs.items():
            pictures = as_bytes(images[kept])
            self._grids.setdefault(weights, []).extend(pictures)
            for row, picture in zip(kept, pictures, strict=True):
                write(trainer.default_root_dir, pl_module, weights, batch, row, picture, SAMPLES)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Tensor],
        batch: Conditions,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write every picture."""
        assert isinstance(pl_module, SRPOModule)
        for weights, images in outputs.items():
            pictures = as_bytes(images)
            for row in own_rows(trainer, batch):
                write(trainer.default_root_dir, pl_module, weights, batch, row, pictures[row], PREDICTIONS)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show one grid per kind of weights."""
        assert isinstance(pl_module, SRPOModule)
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                continue
            for weights, pictures in self._grids.items():
                if pictures:
                    picture = grid(torch.stack(pictures), self.columns)
                    logger.experiment.add_image(f"samples/{weights}", picture, pl_module.trained_steps)


def write(
    run_folder: str, module: SRPOModule, weights: str, batch: Conditions, row: int, picture: Tensor, kind: str
) -> None:
    """Save one picture of a batch, and what it is of in the `metadata.jsonl` of its kind."""
    index = int(batch.indices[row])
    path = sample_path(run_folder, module.trained_steps, weights, index, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
    folder = Path(run_folder) / kind
    record: records.Record = {
        "step": module.trained_steps,
        "weights": weights,
        "index": index,
        "seed": module.seed,
        "prompt": batch.prompts[row],
        "file": str(path.relative_to(folder)),
    }
    records.append(folder / METADATA, record)


def own_rows(trainer: Trainer, batch: Conditions) -> list[int]:
    """The rows that are this rank's to write: those that fill up its share (SliceSampler) are another's."""
    return [row for row, i in enumerate(batch.indices.tolist()) if i % trainer.world_size == trainer.global_rank]


def as_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8 on the CPU."""
    return (images.float().cpu() * 255).round().to(torch.uint8)


def grid(images: Tensor, columns: int) -> Tensor:
    """[B, 3, H, W] images as one [3, rows H, columns W] picture, row by row, padded with zeros."""
    missing = -len(images) % columns
    padded = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
    rows = [torch.cat(list(row), dim=-1) for row in padded.split(columns)]
    return torch.cat(rows, dim=-2)
