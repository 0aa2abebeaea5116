import json

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from srpo_lightning.callbacks import EMA, RewardTracking, RunCheckpoint, SampleLogger, samples
from srpo_lightning.callbacks.samples import thumbnail
from srpo_lightning.evaluation.comparison import read_table
from srpo_lightning.evaluation.pictures import LABEL_PX, as_picture, read_record
from srpo_lightning.rewards import ClipReward
from srpo_lightning.run_folder import RunFolder
from tests import tiny


def test_pixels_are_rounded_to_the_nearest_byte():
    image = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 1.0]).expand(3, 1, 4)
    assert [pixel[0] for pixel in as_picture(image).get_flattened_data()] == [0, 0, 1, 255]


def validate(models, features, run, *callbacks):
    trainer = tiny.new_trainer(run, callbacks, limit_val_batches=9)
    trainer.validate(tiny.new_module(models), tiny.new_data(models, features), verbose=False)


def test_no_more_samples_are_kept_than_asked_and_they_are_the_first(models, features, tmp_path):
    validate(models, features, tmp_path, SampleLogger(num_samples=2))
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["00000.png", "00001.png"]


def test_a_picture_says_what_it_is_of_and_how_it_was_scored(models, features, tmp_path):
    """Also where the logger stands before the tracking."""
    validate(models, features, tmp_path, SampleLogger(), RewardTracking(ClipReward(str(models.judge))))
    tmp_path = tmp_path / "validation"
    record = read_record(tmp_path / "samples" / "step-00000000" / "policy" / "00002.png")
    (line,) = (json.loads(line) for line in (tmp_path / "samples" / "metadata.jsonl").read_text().splitlines()[2:])
    table = read_table(RunFolder(tmp_path).table(0, "policy"))
    assert record["software"].startswith("srpo_lightning ")
    assert {k: v for k, v in record.items() if k != "software"} == line
    assert (record["prompt"], record["seed"], record["num_steps"]) == ("c2", 3, 2)
    for name, column in table.columns.items():
        assert abs(record["scores"][name] - float(column[2])) < 1e-5


def test_writing_passes_over_validations_when_it_takes_too_long_but_not_the_first_and_last(models, features, tmp_path):
    trainer = tiny.new_trainer(
        tmp_path,
        [SampleLogger(max_share=0.0)],
        limit_val_batches=9,
        val_check_interval=1,
        num_sanity_val_steps=-1,
        max_steps=3,
    )
    trainer.fit(tiny.new_module(models), tiny.new_data(models, features))
    steps = sorted(path.name for path in (tmp_path / "samples").iterdir() if path.is_dir())
    assert steps == ["step-00000000", "step-00000003"]


def test_the_sheet_shows_base_policy_and_average_under_each_other(models, features, tmp_path):
    shown = []

    class Listener(TensorBoardLogger):
        @property
        def experiment(self):
            writer = super().experiment
            writer.add_image = lambda tag, picture, step, **_: shown.append((tag, step, picture.shape))
            return writer

    trainer = tiny.new_trainer(
        tmp_path,
        [EMA(decay=0.5), SampleLogger(columns=2, max_share=1.0)],
        limit_val_batches=9,
        val_check_interval=2,
        num_sanity_val_steps=-1,
        max_steps=2,
        logger=Listener(tmp_path),
    )
    trainer.fit(tiny.new_module(models), tiny.new_data(models, features))
    width, row, head = 2 * 128, 128 + LABEL_PX, LABEL_PX  # four times as large, for the words
    assert shown == [("samples", 0, (head + row, width, 3)), ("samples", 2, (head + 3 * row, width, 3))]


def test_pictures_and_strips_in_a_sheet_are_small_and_legible():
    picture, strip = Image.new("RGB", (1024, 512)), Image.new("RGB", (8 * 832, 480))
    assert thumbnail(picture, {}).size == (256, 128)
    assert thumbnail(strip, {"num_frames": 33}).size == (8 * 128, 74)
    assert thumbnail(Image.new("RGB", (5 * 64, 64)), {"num_frames": 5}).size == (5 * 64, 64)


def test_after_a_resume_the_base_is_as_large_in_the_sheet_as_the_rest(models, features, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "THUMBNAIL_PX", 16)
    shown = []
    monkeypatch.setattr(samples, "show", lambda logger, sheet, step: shown.append((step, sheet.size)))
    settings = {"limit_val_batches": 9, "val_check_interval": 1, "num_sanity_val_steps": -1}
    for max_steps, ckpt_path in ((1, None), (2, RunFolder(tmp_path).checkpoint(1))):
        trainer = tiny.new_trainer(
            tmp_path, [SampleLogger(columns=2, max_share=1.0), RunCheckpoint(1)], max_steps=max_steps,
            logger=TensorBoardLogger(tmp_path), **settings,
        )  # fmt: skip
        trainer.fit(tiny.new_module(models), tiny.new_data(models, features), ckpt_path=ckpt_path)
    assert dict(shown)[1] == dict(shown)[2]
