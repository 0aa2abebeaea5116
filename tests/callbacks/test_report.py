import numpy as np
from PIL import Image

from srpo_lightning.callbacks.report import first_and_last, markdown
from srpo_lightning.evaluation.pictures import LABEL_PX, contact_sheet

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
