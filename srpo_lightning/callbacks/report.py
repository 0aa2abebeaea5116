"""Before and after, as a table and as a picture, when training ends."""

import time
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image, ImageDraw

from srpo_lightning.callbacks.records import Record
from srpo_lightning.callbacks.samples import sample_path
from srpo_lightning.callbacks.tracking import FILE, read_records

LABEL_PX = 14


class Report(Callback):
    """Writes `report.md` and `before_after.png` into the run folder and prints the table.

    Compares the first validation (before training, with trainer.num_sanity_val_steps -1) with the last one, for the
    policy's weights and for their average. Needs RewardTracking for the numbers and SampleLogger for the pictures.

    Args:
        num_columns: evaluation prompts in the picture.
        scale: whole number that pictures are enlarged by.
    """

    def __init__(self, num_columns: PositiveInt = 8, scale: PositiveInt = 1) -> None:
        self.num_columns = num_columns
        self.scale = scale
        self._seconds: list[float] = []
        self._start_s = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._start_s = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock."""
        self._seconds.append(time.perf_counter() - self._start_s)

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """`validate` prints what it found."""
        if trainer.state.fn == TrainerFn.VALIDATING and (Path(trainer.default_root_dir) / FILE).is_file():
            records = read_records(trainer.default_root_dir)
            newest = [record for record in records if record["step"] == records[-1]["step"]]
            print(f"\n{markdown({str(record['weights']): record for record in newest})}")

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and print."""
        folder = Path(trainer.default_root_dir)
        if not (folder / FILE).is_file():
            return
        columns = before_and_after(read_records(folder))
        table = markdown(columns)
        if self._seconds:
            table += (
                f"\n{sum(self._seconds) / len(self._seconds):.2f} seconds per step (mean of {len(self._seconds)})\n"
            )
        (folder / "report.md").write_text(table, encoding="utf-8")
        print(f"\n{table}")
        rows = {name: self._pictures(folder, record) for name, record in columns.items()}
        if all(rows.values()):
            contact_sheet(rows, self.scale).save(folder / "before_after.png")
            print(f"pictures: {folder / 'before_after.png'}")

    def _pictures(self, folder: Path, record: Record) -> list[Path]:
        step, weights = int(record["step"]), str(record["weights"])
        paths = [sample_path(folder, step, weights, index) for index in range(self.num_columns)]
        return [path for path in paths if path.is_file()]


def before_and_after(records: list[Record]) -> dict[str, Record]:
    """The first record, and the last one of each kind of weights, by the heading of their column."""
    latest = {str(record["weights"]): record for record in records}
    columns = {"before": records[0]}
    for weights, record in latest.items():
        if record["step"] != records[0]["step"]:
            columns["after" if weights == "policy" else f"after, {weights}"] = record
    return columns


def markdown(columns: dict[str, Record]) -> str:
    """A table with a row per measure."""
    names = [name for name in next(iter(columns.values())) if name not in ("step", "weights")]
    lines = ["| | " + " | ".join(f"{head} (step {r['step']})" for head, r in columns.items()) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name in names:
        cells = (f"{float(r[name]):.3f}" if name in r else "not measured" for r in columns.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
