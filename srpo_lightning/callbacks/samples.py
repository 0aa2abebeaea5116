"""Evaluation samples as files and in TensorBoard."""

import json
from pathlib import Path

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor

from srpo_lightning.batch import Conditions
from srpo_lightning.module import SRPOModule

FOLDER = "samples"


def sample_path(run_folder: str | Path, step: int, weights: str, index: int) -> Path:
    """Where the picture of evaluation prompt `index` after `step` optimizer steps lies."""
    return Path(run_folder) / FOLDER / f"step-{step:08d}" / weights / f"{index:05d}.png"


class SampleLogger(Callback):
    """Keeps the pictures of the first evaluation prompts, the same prompts and noise at every validation.

    Writes `<run folder>/samples/step-*/<weights>/<index>.png` with a line each in `samples/metadata.jsonl`, and a grid
    per kind of weights to TensorBoard.

    Args:
        num_samples: how many of the evaluation prompts, from the first.
        columns: of the grid in TensorBoard.
    """

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
        kept = [row for row, index in enumerate(batch.indices.tolist()) if index < self.num_samples]
        for weights, images in outputs.items():
            pictures = (images[kept].float().cpu() * 255).round().to(torch.uint8)
            self._grids.setdefault(weights, []).extend(pictures)
            for row, picture in zip(kept, pictures, strict=True):
                self._write(trainer, pl_module.seed, weights, batch, row, picture)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show one grid per kind of weights."""
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                continue
            for weights, pictures in self._grids.items():
                if pictures:
                    picture = grid(torch.stack(pictures), self.columns)
                    logger.experiment.add_image(f"samples/{weights}", picture, trainer.global_step)

    def _write(self, trainer: Trainer, seed: int, weights: str, batch: Conditions, row: int, picture: Tensor) -> None:
        index = int(batch.indices[row])
        path = sample_path(trainer.default_root_dir, trainer.global_step, weights, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
        record = {
            "step": trainer.global_step,
            "weights": weights,
            "index": index,
            "seed": seed,
            "prompt": batch.prompts[row],
            "file": str(path.relative_to(Path(trainer.default_root_dir) / FOLDER)),
        }
        with (Path(trainer.default_root_dir) / FOLDER / "metadata.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def grid(images: Tensor, columns: int) -> Tensor:
    """[B, 3, H, W] images as one [3, rows H, columns W] picture, row by row, padded with zeros."""
    missing = -len(images) % columns
    padded = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
    rows = [torch.cat(list(row), dim=-1) for row in padded.split(columns)]
    return torch.cat(rows, dim=-2)
