"""Base, policy and ema beside each other: as a page while training goes on, as a table and a picture when it ends."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from PIL import Image

from srpo_lightning.evaluation.comparison import BASE, compare, write_comparison
from srpo_lightning.evaluation.exchange import Evaluations, ReadsEvaluations
from srpo_lightning.evaluation.pictures import (
    clip_if_whole,
    contact_sheet,
    moving_sheet,
    picture_if_whole,
    record_if_whole,
    write_clip,
)
from srpo_lightning.files.checkpoints import complete_or_absent
from srpo_lightning.files.markdown import markdown_table
from srpo_lightning.files.provenance import software
from srpo_lightning.files.records import Record
from srpo_lightning.report.run_page import RunPage
from srpo_lightning.run_folder import RunFolder

MOVING_SIDE_PX = 256
"""Side of a clip in the moving sheet at most, before it is enlarged."""

MOVING_WIDTH_PX = 8192
"""Width of the moving sheet, about: WebP has 16,383 pixels at most, and all frames are in memory at once."""


class Report(Callback, ReadsEvaluations):
    """Writes `report.html` at every evaluation, and at the end `report.md` and `before_after.png`; prints the table.

    They lie in the run folder; of clips the picture is of strips, and `before_after.webp` beside it moves. A page that
    cannot be written is warned of, and training goes on. The table compares the first validation with the last one of
    policy and ema. The first is the base's with trainer.num_sanity_val_steps -1. Needs RewardTracking for the numbers
    and SampleLogger for the pictures.

    Args:
        num_columns: Number of evaluation samples in the picture.
        scale: Whole number that pictures are enlarged by.
    """

    def __init__(self, num_columns: PositiveInt = 8, scale: PositiveInt = 1) -> None:
        self.num_columns = num_columns
        self.scale = scale
        self._page: RunPage | None = None
        self._is_page_due = False
        self._seconds: list[float] = []
        self._start_s = 0.0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait with the page until every callback has recorded this evaluation, whatever their order."""
        self._is_page_due = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write the page of an evaluation that has just ended, and start the clock."""
        if self._is_page_due:
            self._write_page(trainer)
        self._start_s = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock."""
        self._seconds.append(time.perf_counter() - self._start_s)

    @rank_zero_only
    def on_evaluation(self, trainer: Trainer, module: LightningModule, evaluations: Evaluations) -> None:
        """Write and print what `validate` and `test` have found of base, policy and ema."""
        if trainer.state.fn == TrainerFn.FITTING:
            return
        step, found = evaluations.step, evaluations.by_weights
        tables = {weights: found[weights].table for weights in in_order(found)}
        path = RunFolder.recording(trainer).comparison(step)
        tags = trainer.datamodule.eval_tags  # type: ignore[attr-defined]
        head = {"step": step, "checkpoint": str(trainer.ckpt_path or ""), "software": software()}
        print(f"\n{write_comparison(path, compare(tables, tags), head)}\n{path}.md, {path}.json")

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write page, table and picture, and print the table."""
        run = RunFolder.of(trainer)
        if not run.metrics.is_file():
            return
        self._write_page(trainer)
        columns = first_and_last(run.read_metrics())
        table = markdown(columns)
        if self._seconds:
            table += (
                f"\n{sum(self._seconds) / len(self._seconds):.2f} seconds per step (mean of {len(self._seconds)})\n"
            )
        with complete_or_absent(run.report) as partial:
            partial.write_text(table, encoding="utf-8")
        print(f"\n{table}")
        self._write_sheets(run, columns)
        print(f"page: {run.page}")

    def _write_sheets(self, run: RunFolder, columns: dict[str, Record]) -> None:
        rows = {name: self._pictures(run, record) for name, record in columns.items()}
        if not all(map(any, rows.values())):
            return
        shown = [i for i in range(self.num_columns) if any(row[i] for row in rows.values())]
        rows = {name: [row[i] for i in shown] for name, row in rows.items()}
        prompts = [self._prompt(run, columns.values(), i) for i in shown]
        with complete_or_absent(run.sheet) as partial:
            contact_sheet(rows, self.scale, prompts).save(partial, format="PNG")
        print(f"pictures: {run.sheet}")
        side = min(MOVING_SIDE_PX, MOVING_WIDTH_PX // (self.scale * len(shown)))
        clips = {name: [clip_if_whole(self._clip(run, own, i), side) for i in shown] for name, own in columns.items()}
        if all(map(any, clips.values())):
            write_clip(run.moving_sheet, moving_sheet(clips, self.scale, prompts))
            print(f"clips: {run.moving_sheet}")

    @rank_zero_only
    def _write_page(self, trainer: Trainer) -> None:
        self._is_page_due = False
        run = RunFolder.of(trainer)
        if self._page is None or self._page.run.path != run.path:
            self._page = RunPage(run)
        try:
            self._page.write()
        except Exception as error:  # it is for looking at: nothing that it meets is worth a run
            rank_zero_warn(f"{run.page} is not written, and training goes on: {error}")

    def _pictures(self, run: RunFolder, record: Record) -> list[Image.Image | None]:
        step, weights = int(record["step"]), str(record["weights"])
        return [picture_if_whole(run.samples.picture(step, weights, index)) for index in range(self.num_columns)]

    @staticmethod
    def _clip(run: RunFolder, record: Record, index: int) -> Path:
        return run.samples.clip(int(record["step"]), str(record["weights"]), index)

    def _prompt(self, run: RunFolder, kept: Iterable[Record], index: int) -> str:
        paths = [run.samples.picture(int(record["step"]), str(record["weights"]), index) for record in kept]
        found = filter(None, map(record_if_whole, paths))
        return next((str(record["prompt"]) for record in found), "")


def in_order(weights: Iterable[str]) -> list[str]:
    """The base first, then the policy, then what was made of it."""
    order = (BASE, "policy")
    return sorted(weights, key=lambda name: (order.index(name) if name in order else len(order), name))


def first_and_last(records: list[Record]) -> dict[str, Record]:
    """The first record and the last one of each kind of weights, by the heading of their column."""
    latest = {str(record["weights"]): record for record in records if record["step"] != records[0]["step"]}
    return {first_heading(records[0]): records[0], **latest}


def first_heading(record: Record) -> str:
    """What the first record of a run is of: the base, unless the run was not evaluated before training."""
    return "first" if record["step"] else BASE


def markdown(columns: dict[str, Record]) -> str:
    """A table with a row for each number."""
    names = dict.fromkeys(name for record in columns.values() for name in record if name not in ("step", "weights"))
    rows = (
        [name, *(f"{float(r[name]):.3f}" if name in r else "not measured" for r in columns.values())] for name in names
    )
    return markdown_table(["", *(f"{head} (step {r['step']})" for head, r in columns.items())], rows) + "\n"
