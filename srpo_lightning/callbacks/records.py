"""Files of one JSON object per line, each with the `step` that it was written after."""

import json
import os
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from srpo_lightning.files.checkpoints import complete_or_absent
from srpo_lightning.files.full_disk import room_for
from srpo_lightning.files.strict_json import strict_json

Record: TypeAlias = dict[str, Any]

EVALUATION_DUE = "evaluation_due"
"""The key of a checkpoint that says that its step is yet to be evaluated: what a run has recorded of it is dropped."""

VALIDATION = "validation"
"""The folder in a run's for what `validate` and `test` find."""


def recorded_in(trainer: Trainer) -> Path:
    """The run folder for a run's own evaluations; a folder in it for others, of whatever prompts and settings.

    What belongs to the run is what chooses its best checkpoint, is reported, and goes on when it is resumed.
    """
    folder = Path(trainer.default_root_dir)
    return folder if trainer.state.fn == TrainerFn.FITTING else folder / VALIDATION


def append(path: Path, *added: Record) -> None:
    """Add lines, in the place of one that a kill has left unfinished; they are on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with room_for(path), path.open("ab") as stream:
        stream.truncate(len(_whole_lines(path)))
        stream.write("".join(strict_json(record) + "\n" for record in added).encode())
        stream.flush()
        os.fsync(stream.fileno())


def read(path: Path) -> list[Record]:
    """All lines, oldest first, without a last one that a kill has left unfinished; none where there is no file.

    Line feeds alone end them: a prompt may hold U+2028 and its like.

    Raises:
        ValueError: naming file and line, if one cannot be read.
    """
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(_whole_lines(path).split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            is_record = isinstance(record, dict) and isinstance(record["step"], int)
        except (ValueError, KeyError):
            is_record = False
        if not is_record:
            raise ValueError(f"line {number} of {path} is no record of a step: delete that line, or put the file right")
        found.append(record)
    return found


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def drop_after(path: Path, step: int) -> None:
    """Forget the records of later steps, and an unfinished last line; at no moment is a part of the file there."""
    kept = [record for record in read(path) if record["step"] <= step]
    if not kept:
        path.unlink()
        return
    with complete_or_absent(path) as partial:
        append(partial, *kept)


class Recorder(Callback):
    """A callback that appends to a file of the run folder.

    A run that begins, begins the file; one that is resumed goes on from the records up to its checkpoint. What a run
    that was killed wrote after its last checkpoint, or without one, would stand there twice.
    """

    file: ClassVar[str]
    """The path in the run folder."""

    _has_begun = False
    _is_evaluation_due = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Whether the records of its step are still to come."""
        self._is_evaluation_due = checkpoint.get(EVALUATION_DUE, False)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The evaluation before training, which a resumed run does without, is the first to be recorded."""
        self._begin(trainer, -1)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without that evaluation."""
        if not self._has_begun:
            self._begin(trainer, trainer.global_step - self._is_evaluation_due if trainer.ckpt_path else -1)

    def _begin(self, trainer: Trainer, step: int) -> None:
        self._has_begun = True
        path = Path(trainer.default_root_dir) / self.file
        if trainer.is_global_zero and path.is_file():
            drop_after(path, step)
        trainer.strategy.barrier()
