"""Evaluation samples as files, and as a sheet in loggers."""

import time
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from torch import Tensor
from torch.distributed import all_gather_object, get_world_size, is_initialized

from srpo_lightning.batch import Conditions
from srpo_lightning.callbacks.records import Recorder
from srpo_lightning.evaluation.comparison import BASE
from srpo_lightning.evaluation.exchange import Evaluations, ReadsEvaluations
from srpo_lightning.evaluation.pictures import (
    STRIP_FRAMES,
    as_clip,
    as_picture,
    contact_sheet,
    picture_if_whole,
    write_clip,
    write_picture,
)
from srpo_lightning.files import records
from srpo_lightning.files.records import Record
from srpo_lightning.loggers import show
from srpo_lightning.module import SRPOModule
from srpo_lightning.run_folder import PictureFolder, RunFolder, beside
from srpo_lightning.training.context import data_rank

THUMBNAIL_PX = 256  # of a picture in a sheet at most
FRAME_PX = 128  # of each frame of a strip
LEGIBLE_PX = 128  # a picture's width in a sheet at least, so that there is room for words

Key = TypeVar("Key")
Value = TypeVar("Value")


class Sample(NamedTuple):
    """A picture that was drawn on this rank, its record, and of a clip all frames as an animated WebP."""

    picture: Image.Image
    record: Record
    clip: bytes = b""


class SampleLogger(Recorder, ReadsEvaluations):
    """Keeps the pictures of the first evaluation prompts, the same prompts and noise at every validation.

    Writes `<run folder>/samples/step-*/<weights>/<index>.png`. Each file has prompt, seed, RewardTracking's scores and
    the version of the code in it; `samples/metadata.jsonl` has a line for each. Of a clip this is a strip of frames,
    and an animated .webp lies beside it. One sheet, with base, policy and ema under each other and the prompts above,
    goes to TensorBoard, Weights & Biases, MLflow and trackio. Every rank writes the pictures that it drew; of those
    that share samples the first does. Pictures of `validate` and `test` are in the folder `validation` of the run
    folder.

    Args:
        num_samples: Number of evaluation samples to keep, from the first.
        columns: Number of pictures in a row of the sheet.
        max_share: Share of the training time that writing may take; beyond it validations are passed over, but never
            the first and the last. The drawing itself is the validation's, whose interval says how often.
    """

    def __init__(
        self, num_samples: PositiveInt = 16, columns: PositiveInt = 8, max_share: NonNegativeFloat = 0.01
    ) -> None:
        self.num_samples = num_samples
        self.columns = columns
        self.max_share = max_share
        self.seconds = 0.0
        self._start_s = time.perf_counter()
        self._samples: dict[tuple[str, int], Sample] = {}
        self._base: dict[int, Image.Image] = {}
        self._evaluations: Evaluations | None = None

    @staticmethod
    def file(run: RunFolder) -> Path:
        """The records of the pictures."""
        return run.samples.metadata

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the pictures of the evaluation before."""
        self._samples = {}

    def on_validation_batch_end(  # type: ignore[override]  # the outputs of SRPOModule.validation_step
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Tensor],
        batch: Conditions,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the pictures that are to be written, until their scores are there."""
        assert isinstance(pl_module, SRPOModule)
        if not data_rank(trainer).is_first:
            return
        start_s = time.perf_counter()
        for weights, images in outputs.items():
            for row, index in enumerate(batch.indices.tolist()):
                if index < self.num_samples:
                    record = record_of(pl_module, weights, batch, row)
                    own = images[row].float().cpu()
                    self._samples[weights, index] = Sample(as_picture(own), record, as_clip(own))
        self.seconds += time.perf_counter() - start_s

    def on_evaluation(self, trainer: Trainer, module: LightningModule, evaluations: Evaluations) -> None:
        """Keep the scores until the pictures are written."""
        self._evaluations = evaluations

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the pictures, unless writing has taken too much of the time so far."""
        assert isinstance(pl_module, SRPOModule)
        is_over = self.seconds > self.max_share * (time.perf_counter() - self._start_s)
        can_wait = bool(pl_module.trained_steps) and trainer.state.fn == TrainerFn.FITTING
        if not trainer.strategy.reduce_boolean_decision(can_wait and is_over, all=False):
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last pictures in any case."""
        assert isinstance(pl_module, SRPOModule)
        if trainer.strategy.reduce_boolean_decision(bool(self._samples), all=False):
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, module: SRPOModule) -> None:
        start_s = time.perf_counter()
        folder = RunFolder.recording(trainer).samples
        for (weights, index), sample in self._samples.items():
            sample.record["scores"] = scores_of(self._evaluations, weights, index)
            path = folder.picture(int(sample.record["step"]), weights, index)
            write_clip(beside(path), sample.clip)
            write_picture(path, sample.picture, sample.record)
        everyones = gathered({key: small(sample) for key, sample in self._samples.items()})
        self._samples = {}
        if trainer.is_global_zero:
            records.append(folder.metadata, *(sample.record for sample in everyones.values()))
            self._show(trainer, module, everyones)
        self.seconds += time.perf_counter() - start_s
        for logger in trainer.loggers:
            logger.log_metrics({"samples/seconds": self.seconds}, module.trained_steps)

    def _show(self, trainer: Trainer, module: SRPOModule, samples: dict[tuple[str, int], Sample]) -> None:
        shown = range(min(self.columns, self.num_samples))
        rows: dict[str, list[Image.Image | None]] = {}
        if not module.trained_steps:
            self._base = {index: sample.picture for (_, index), sample in samples.items()}
        elif not self._base:  # a resumed run
            for (_, index), sample in samples.items():
                path = RunFolder.of(trainer).samples.picture(0, "policy", index)
                if index in shown and (picture := picture_if_whole(path, sample.record)):
                    self._base[index] = thumbnail(picture, sample.record)
        for weights in dict.fromkeys([BASE, *(weights for weights, _ in samples)]):
            own = self._base if weights == BASE else {}
            own = own | {index: sample.picture for (kind, index), sample in samples.items() if kind == weights}
            if own and (module.trained_steps or weights != BASE):
                rows[weights] = [own.get(index) for index in shown]
        prompts = {index: str(sample.record["prompt"]) for (_, index), sample in samples.items()}
        if rows:
            scale = max(1, LEGIBLE_PX // max(sample.picture.width for sample in samples.values()))
            sheet = contact_sheet(rows, scale, [prompts.get(index, "") for index in shown])
            for logger in trainer.loggers:
                show(logger, sheet, module.trained_steps)


def record_of(module: SRPOModule, weights: str, batch: Conditions, row: int) -> Record:
    """What the picture of a row of a batch is of."""
    step, index = module.trained_steps, int(batch.indices[row])
    frames = {"num_frames": module.policy.num_frames} if module.policy.num_frames > 1 else {}
    own_seed = batch.seeds[row] if batch.seeds else None
    return {
        "step": step,
        "weights": weights,
        "index": index,
        "seed": module.seed if own_seed is None else own_seed,
        "prompt": batch.prompts[row],
        "guidance": module.sample_guidance,
        "num_steps": module.num_sample_steps,
        "file": PictureFolder.name(step, weights, index),
        **frames,
    }


def scores_of(evaluations: Evaluations | None, weights: str, index: int) -> dict[str, float]:
    """What RewardTracking has measured of a sample; nothing where it has not."""
    if evaluations is None or weights not in evaluations.by_weights:
        return {}
    table = evaluations.by_weights[weights].table
    row = int(torch.searchsorted(table.indices, index))
    return {name: round(float(column[row]), 5) for name, column in table.columns.items()}


def small(sample: Sample) -> Sample:
    """The sample with a picture small enough for a sheet."""
    return sample._replace(picture=thumbnail(sample.picture, sample.record), clip=b"")


def thumbnail(picture: Image.Image, record: Record) -> Image.Image:
    """A picture, or the strip of a clip, small enough for a sheet."""
    made = picture.copy()
    frames = min(int(record.get("num_frames", 1)), STRIP_FRAMES)
    made.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX) if frames == 1 else (frames * FRAME_PX, FRAME_PX))
    return made


def gathered(own: dict[Key, Value]) -> dict[Key, Value]:
    """The entries of all ranks, on every rank."""
    if not is_initialized():
        return own
    parts: list[dict[Key, Value]] = [{}] * get_world_size()
    all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}
