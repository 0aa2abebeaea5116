"""What `predict` writes: a picture of every evaluation sample, unless it is there already."""

from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from srpo_lightning.batch import Conditions
from srpo_lightning.callbacks.samples import gathered, record_of
from srpo_lightning.evaluation.exchange import HasPictures
from srpo_lightning.evaluation.pictures import (
    as_clip,
    as_picture,
    can_move,
    clip_if_whole,
    record_if_whole,
    write_clip,
    write_picture,
)
from srpo_lightning.files.checkpoints import complete_or_absent
from srpo_lightning.files.fingerprint import content_of, fingerprint
from srpo_lightning.files.records import Record
from srpo_lightning.files.strict_json import strict_json
from srpo_lightning.module import SRPOModule
from srpo_lightning.run_folder import PictureFolder, RunFolder, beside
from srpo_lightning.training.context import data_rank

DRAWN, KEPT, REDRAWN = "drawn", "kept", "drawn again"


class Predictions(Callback, HasPictures):
    """Writes `<output>/step-*/<weights>/<index>.png`, drawn by policy and ema; `predict` adds this callback.

    Of a clip this is a strip of frames, and an animated .webp lies beside it.

    A picture that is there is kept if it is whole and of what would be drawn. Every file records that: prompt, noise,
    size, steps, guidance, checkpoint, policy, text features and precision. Any other picture is drawn again. At the
    end `<output>/metadata.jsonl` has the record of every picture in the folder, and one line says how many were drawn.

    Args:
        output: Folder of the pictures; null is predictions/ in the run folder.
    """

    def __init__(self, output: str | None = None) -> None:
        self.output = output
        self.folder = PictureFolder("")
        self.drawn_by = ""
        self.outcomes: dict[str, str] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle where the pictures lie, and what beside their own settings they depend on."""
        assert isinstance(pl_module, SRPOModule)
        own = RunFolder.of(trainer).predictions.path
        self.folder = PictureFolder(Path(self.output or own).expanduser())
        self.outcomes = {}
        checkpoint = Path(trainer.ckpt_path) if trainer.ckpt_path else None
        features = trainer.datamodule.cache.description["fingerprint"]  # type: ignore[attr-defined]
        self.drawn_by = fingerprint(
            [pl_module.policy, checkpoint and content_of(checkpoint), features, trainer.precision]
        )
        if trainer.is_global_zero:  # until it is true again
            self.folder.metadata.unlink(missing_ok=True)

    def has_pictures(self, module: LightningModule, batch: Conditions, weights: Iterable[str]) -> bool:
        """Whether the pictures of a batch are there on all ranks; those that share weights draw together or not."""
        assert isinstance(module, SRPOModule)
        records = [self.record(module, name, batch, row) for name in weights for row in range(batch.batch_size)]
        is_there = all(self.is_kept(record) for record in records)
        return bool(module.trainer.strategy.reduce_boolean_decision(is_there, all=True))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: dict[str, Tensor],
        batch: Conditions,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write every picture that is not there yet."""
        assert isinstance(pl_module, SRPOModule)
        if not data_rank(trainer).is_first:
            return
        for weights, images in outputs.items():
            for row in range(batch.batch_size):
                record = self.record(pl_module, weights, batch, row)
                if not self.is_kept(record):
                    path = self.folder.path / record["file"]
                    self.outcomes[record["file"]] = REDRAWN if path.exists() else DRAWN
                    write_clip(beside(path), as_clip(images[row]))
                    write_picture(path, as_picture(images[row]), record)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """List all pictures of the folder, and say how many were drawn."""
        pairs = gathered(dict.fromkeys(self.outcomes.items()))
        if trainer.is_global_zero:
            rank_zero_info(summary(self.folder, write_metadata(self.folder), together(pairs)))

    def record(self, module: SRPOModule, weights: str, batch: Conditions, row: int) -> Record:
        """What the picture of a row of a batch is of, and all that it depends on."""
        has_own_seed = batch.seeds is not None and batch.seeds[row] is not None
        return record_of(module, weights, batch, row) | {
            "size": list(batch.size) if batch.size else None,
            "noise": "seed" if has_own_seed else "seed and index",
            "drawn_by": self.drawn_by,
        }

    def is_kept(self, record: Record) -> bool:
        """Whether a picture is there, whole and of this record; remember it if it is."""
        path = self.folder.path / record["file"]
        found = record_if_whole(path)
        is_same = found is not None and all(found.get(name) == value for name, value in record.items())
        has_clip = "num_frames" in record and can_move()
        is_same = is_same and (not has_clip or bool(clip_if_whole(beside(path))))
        if is_same:
            self.outcomes.setdefault(record["file"], KEPT)
        return is_same


def write_metadata(folder: PictureFolder) -> list[Record]:
    """Collect the records of a folder's pictures from the pictures themselves, in one file with a line for each."""
    folder.remove_unfinished()
    found = [(path.relative_to(folder.path).as_posix(), record_if_whole(path)) for path in folder.pictures()]
    records = [record | {"file": name} for name, record in found if record is not None]
    with complete_or_absent(folder.metadata) as partial:
        partial.write_text("".join(strict_json(record) + "\n" for record in records), "utf-8")
    return records


def together(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """What became of each picture, by what all ranks say; one that any rank drew was drawn."""
    assert DRAWN < REDRAWN < KEPT
    return dict(sorted(pairs, reverse=True))


def summary(folder: PictureFolder, records: list[Record], outcomes: dict[str, str]) -> str:
    """How many pictures were drawn and where they are."""
    counts = ", ".join(f"{list(outcomes.values()).count(kind)} {kind}" for kind in (DRAWN, KEPT, REDRAWN))
    others = sum(record["file"] not in outcomes for record in records)
    beside = f"; {others} of earlier calls lie beside them" if others else ""
    return f"predict: {len(outcomes)} pictures in {folder.path.resolve()}: {counts}{beside}"
