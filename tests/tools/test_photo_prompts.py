"""The prompts for photographs that come with the package."""

import json

import pytest

from srpo_lightning.data.prompts import read_prompts
from tools.photo_prompts import EVALUATION, FOLDER, MATERIAL, TRAIN, both


@pytest.mark.parametrize(("name", "part", "count"), [(TRAIN, 0, 1000), (EVALUATION, 1, 200)])
def test_the_files_are_what_the_tool_writes_and_fit_reads(name, part, count):
    records = [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]
    assert records == both()[part]
    assert len({record["prompt"] for record in records}) == count
    assert {tag for record in records for tag in record["tags"]} == MATERIAL.keys()
    assert len(read_prompts(str(FOLDER / name)).prompts) == count


def test_no_scene_of_the_evaluation_is_trained_on():
    train, evaluation = ({record["prompt"].rpartition(", ")[0] for record in records} for records in both())
    assert train.isdisjoint(evaluation)
