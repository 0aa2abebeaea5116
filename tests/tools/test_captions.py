from pathlib import Path

import pytest

from tools.emoji import captions


@pytest.mark.parametrize(
    ("style", "concept", "text"),
    [("3d", "red apple", "3d. red apple"), ("", "red apple", "red apple"), ("ink", "", "ink"), ("", "", "")],
)
def test_a_caption_joins_only_the_parts_that_it_has(style: str, concept: str, text: str):
    assert captions.caption(style, concept) == text


def test_the_split_loses_no_concept_and_shares_none():
    concepts = [f"thing {index}" for index in range(23)]
    train, held_out = captions.split(concepts)
    assert sorted(train + held_out) == sorted(concepts)
    assert held_out == [concepts[4], concepts[9], concepts[14], concepts[19]]


def test_prompts_come_back_as_they_were_written(tmp_path: Path):
    concepts = [f"thing {index}" for index in range(10)]
    captions.write_prompts(tmp_path, concepts)
    assert captions.read_prompts(tmp_path, "train.txt") + captions.read_prompts(tmp_path, "eval.txt") == [
        *captions.split(concepts)[0],
        *captions.split(concepts)[1],
    ]
    assert captions.read_prompts(tmp_path, "styles.txt") == ["3d", "flat", "ink", "cartoon", "shaded"]
