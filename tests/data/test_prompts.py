import json

import pyarrow
import pytest
from pyarrow import parquet

from srpo_lightning.data.prompts import read_prompts

PROMPTS = ["a cat", "", "  a dög ", " "]


def write(folder, kind: str, prompts=PROMPTS, field: str = "prompt"):
    path = folder / f"prompts{kind}"
    if kind == ".txt":
        path.write_text("".join(f"{p}\n" for p in prompts), encoding="utf-8")
    elif kind == ".jsonl":
        path.write_text("".join(json.dumps({"id": 1, field: p}) + "\n" for p in prompts), encoding="utf-8")
    else:
        parquet.write_table(pyarrow.table({"id": range(len(prompts)), field: prompts}), path)
    return str(path)


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_the_same_prompts_stripped_and_counts_the_empty_ones(tmp_path, kind):
    assert read_prompts(write(tmp_path, kind)) == (["a cat", "a dög"], 2)


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_the_field_can_be_named(tmp_path, kind):
    assert read_prompts(write(tmp_path, kind, field="caption"), field="caption").prompts == ["a cat", "a dög"]


def test_null_counts_as_empty(tmp_path):
    assert read_prompts(write(tmp_path, ".parquet", ["a", None])) == (["a"], 1)


@pytest.mark.parametrize(
    ("name", "text", "cure"),
    [
        ("p.csv", "a", r"must end in one of .txt, .jsonl, .parquet"),
        ("p.txt", "\n \n", r"holds no prompt \(2 empty lines\): write one prompt per line"),
        ("p.txt", "", r"holds no prompt \(0 empty lines\)"),
        ("p.jsonl", '{"prompt": "a"}\nnot json', r"line 2: not JSON"),
        ("p.jsonl", '{"caption": "a"}', r"line 1: no key 'prompt'; name the right one as `field`"),
        ("p.jsonl", '["a"]', r"line 1: no key 'prompt'"),
        ("p.jsonl", '{"prompt": 3}', r"entry 1: 'prompt' is int, expected a text"),
    ],
)
def test_a_bad_file_is_refused_with_the_place_and_the_cure(tmp_path, name, text, cure):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=cure):
        read_prompts(str(path))


def test_a_parquet_file_without_the_column_names_the_columns_it_has(tmp_path):
    with pytest.raises(ValueError, match=r"no column 'prompt' among \['id', 'caption'\]; name it as `field`"):
        read_prompts(write(tmp_path, ".parquet", field="caption"))


def test_a_missing_file_is_refused_with_the_full_path(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist \(looked for /"):
        read_prompts(str(tmp_path / "nowhere.txt"))


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_a_file_that_is_not_what_its_name_says_is_refused_as_a_bad_prompt_file(tmp_path, kind):
    path = tmp_path / f"p{kind}"
    path.write_bytes(b"\xff\xfe\x00PNG")
    with pytest.raises(ValueError, match="prompt file"):
        read_prompts(str(path))
