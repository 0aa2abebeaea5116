import errno
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from srpo_lightning.callbacks import Report, RewardTracking, RunCheckpoint, SampleLogger
from srpo_lightning.callbacks.report import first_and_last, markdown
from srpo_lightning.evaluation.comparison import save_table
from srpo_lightning.evaluation.pictures import LABEL_PX, contact_sheet
from srpo_lightning.files import checkpoints
from srpo_lightning.report.run_page import RunPage
from srpo_lightning.rewards import ClipReward
from srpo_lightning.run_folder import RunFolder
from tests import tiny
from tests.faults import Stop
from tests.report.made_up import content_of

RECORDS = [
    {"step": 0, "weights": "policy", "judge": 0.1, "share/3d": 0.25},
    {"step": 5, "weights": "policy", "judge": 0.2, "share/3d": 0.5},
    {"step": 5, "weights": "ema", "judge": 0.3, "share/3d": 0.75},
    {"step": 9, "weights": "policy", "judge": 0.4, "share/3d": 1.0},
    {"step": 9, "weights": "ema", "judge": 0.5},
]


def test_the_first_record_is_compared_with_the_last_of_each_kind_of_weights():
    assert first_and_last(RECORDS) == {"base": RECORDS[0], "policy": RECORDS[3], "ema": RECORDS[4]}


def test_a_run_without_training_has_nothing_to_compare_with():
    assert first_and_last(RECORDS[:1]) == {"base": RECORDS[0]}


def test_a_run_that_was_not_evaluated_before_training_shows_no_base():
    assert first_and_last(RECORDS[1:]) == {"first": RECORDS[1], "policy": RECORDS[3], "ema": RECORDS[4]}


def test_the_table_has_a_row_per_measure_and_says_what_was_not_measured():
    assert markdown(first_and_last(RECORDS)).splitlines() == [
        "| | base (step 0) | policy (step 9) | ema (step 9) |",
        "|---|---|---|---|",
        "| judge | 0.100 | 0.400 | 0.500 |",
        "| share/3d | 0.250 | 1.000 | not measured |",
    ]


def test_the_contact_sheet_puts_each_picture_under_the_name_of_its_row():
    rows = {}
    for name, shades in (("base", [10, 20]), ("policy", [30])):
        rows[name] = [Image.new("RGB", (4, 4), (shade,) * 3) for shade in shades]
    sheet = np.array(contact_sheet(rows, scale=3))
    assert sheet.shape == (2 * (12 + LABEL_PX), 24, 3)
    assert (sheet[LABEL_PX : LABEL_PX + 12, :12] == 10).all()
    assert (sheet[LABEL_PX : LABEL_PX + 12, 12:] == 20).all()
    assert (sheet[-12:, :12] == 30).all()
    assert (sheet[-12:, 12:] == 255).all()


def fit(models, features, run, *faults):
    callbacks = [
        Report(),  # before those that record what it shows
        SampleLogger(num_samples=2, max_share=9.0),
        RewardTracking(ClipReward(str(models.judge))),
        *faults,
        RunCheckpoint(2),
    ]
    settings = {"num_sanity_val_steps": -1, "val_check_interval": 1, "limit_val_batches": 9}
    tiny.new_trainer(run, callbacks, **settings).fit(tiny.new_module(models), tiny.new_data(models, features))


def test_the_page_of_what_validate_measured_compares_with_the_base_that_the_run_has_measured(
    models, features, tmp_path
):
    fit(models, features, tmp_path)
    run = RunFolder(tmp_path)
    trainer = tiny.new_trainer(tmp_path, [RewardTracking(ClipReward(str(models.judge)))], limit_val_batches=9)
    data = tiny.new_data(models, features)
    trainer.validate(tiny.new_module(models), data, ckpt_path=run.checkpoint(4), verbose=False)
    pages = [RunPage(own).content()[0] for own in (run, run.validation)]
    cells = [{row["name"]: row["cells"] for row in page["last"]}["judge"] for page in pages]
    for kind in ("base", "policy"):
        assert cells[1][kind]["value"] == pytest.approx(cells[0][kind]["value"], abs=1e-6)
    assert cells[1]["policy"]["win"] is not None
    assert pages[1]["samples"]["counts"] == pages[0]["samples"]["counts"]
    save_table(run.validation.base_table, run.read_base(), "of other settings")
    assert RunPage(run.validation).content()[0]["samples"] is None


def test_the_page_of_a_run_is_whole_and_can_be_written_again_from_its_folder(finished_run, tmp_path):
    content = content_of((finished_run / "report.html").read_text())
    assert content["notes"] == []
    assert content["grid"]["steps"] == [2, 4]
    assert content["grid"]["weights"] == ["policy", "ema"]
    assert content["samples"]["step"] == 4
    assert content["samples"]["prompts"] == ["c0", "c1", "c2"]
    training = {own["name"] for own in content["charts"] if own["group"] == "Training steps"}
    assert {"train/loss", "train/reward_denoise", "train/gradient_norm"} <= training
    loss = next(own for own in content["charts"] if own["name"] == "train/loss")
    assert [step for step, _ in loss["series"][0]["points"]] == [0, 1, 2, 3]
    departures = content["configuration"]["departures"]
    assert departures["from"].endswith("run.yaml")
    assert departures["rows"] == []
    folder = shutil.copytree(finished_run, tmp_path / "run")
    again = RunPage(RunFolder(folder)).content()[0]
    assert {**content, "written": ""} == json.loads(json.dumps({**again, "written": ""}))


def test_a_run_that_is_killed_has_the_page_of_its_last_evaluation(models, features, tmp_path):
    with pytest.raises(RuntimeError, match="stopped by the test"):
        fit(models, features, tmp_path, Stop(after=3))
    content = content_of(RunFolder(tmp_path).page.read_text())
    assert content["grid"]["steps"] == [1, 2]
    assert content["samples"]["step"] == 2


def test_a_page_that_has_no_room_is_warned_of_and_training_goes_on(models, features, tmp_path, monkeypatch):
    sync = checkpoints.sync

    def full(path):
        if path.name.startswith("report.html"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(path)

    monkeypatch.setattr(checkpoints, "sync", full)
    with pytest.warns(UserWarning, match="report.html is not written, and training goes on: the disk is full"):
        fit(models, features, tmp_path)
    run = RunFolder(tmp_path)
    assert run.checkpoint(4).is_file()
    assert run.report.is_file()
    assert not list(tmp_path.glob("report.html*"))


def test_nothing_that_a_page_meets_ends_training(models, features, tmp_path, monkeypatch):
    def broken(self):
        raise RuntimeError("a record that nobody has thought of")

    monkeypatch.setattr(RunPage, "content", broken)
    with pytest.warns(UserWarning, match="report.html is not written, and training goes on: a record that nobody"):
        fit(models, features, tmp_path)
    assert RunFolder(tmp_path).checkpoint(4).is_file()
    assert RunFolder(tmp_path).report.is_file()
