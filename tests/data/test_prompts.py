import csv
import json
import os
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from srpo_lightning.data import tables
from srpo_lightning.data.picture_files import read_picture
from srpo_lightning.data.prompts import Prompt, PromptSet, Source, listed, read_prompts
from tests.data.archive import picture

PROMPTS = ["a cat", "", "  a dög ", " "]
KINDS = [".txt", ".jsonl", ".csv", ".parquet"]
TABLES = KINDS[1:]


def write(folder, kind: str, prompts=PROMPTS, field: str = "prompt", **columns):
    path = folder / f"prompts{kind}"
    rows = [
        {"id": i, field: prompt, **{name: values[i] for name, values in columns.items()}}
        for i, prompt in enumerate(prompts)
    ]
    if kind == ".txt":
        path.write_text("".join(f"{p}\n" for p in prompts), encoding="utf-8")
    elif kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == ".csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            table = csv.DictWriter(stream, ["id", field, *columns])
            table.writeheader()
            table.writerows(rows)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_prompts_stripped_and_counts_the_empty_ones(tmp_path, kind):
    found = read_prompts(write(tmp_path, kind))
    assert (found.prompts, found.num_empty) == (["a cat", "a dög"], 2)
    assert list(found) == [Prompt("a cat"), Prompt("a dög")]


@pytest.mark.parametrize("kind", TABLES)
def test_columns_can_be_named(tmp_path, kind):
    path = write(tmp_path, kind, ["a", "b"], "caption", number=[5, None], what=["x, y", "z"], w=[64, 32], h=[48, 16])
    source = Source(path, prompt="caption", seed="number", tags="what", width="w", height="h")
    assert list(read_prompts(source)) == [
        Prompt("a", seed=5, tags=["x", "y"], size=(48, 64)), Prompt("b", tags=["z"], size=(16, 32)),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
def test_columns_with_the_usual_names_are_found_and_others_are_left_alone(tmp_path, kind):
    columns = {"image": ["i/x.png", ""], "negative_prompt": [" blur", None], "score": [1.5, 2]}
    path = write(tmp_path, kind, ["a", "b"], **columns)
    first, second = read_prompts(path)
    assert first == Prompt("a", str(tmp_path.resolve() / "i" / "x.png"), negative_prompt="blur")
    assert second == Prompt("b")


def test_null_counts_as_empty(tmp_path):
    found = read_prompts(write(tmp_path, ".parquet", ["a", None]))
    assert (found.prompts, found.num_empty) == (["a"], 1)


@pytest.mark.parametrize(
    ("name", "text", "cure"),
    [
        ("p.xls", "a", r"must end in one of .txt, .jsonl, .csv, .parquet, .tar"),
        ("p.txt", "\n \n", r"holds no prompt \(2 empty lines\): write one prompt per line"),
        ("p.txt", "", r"holds no prompt \(0 empty lines\)"),
        ("p.jsonl", '{"prompt": "a"}\nnot json', r"line 2: not JSON"),
        ("p.jsonl", '{"caption": "a"}', r"line 1: no column 'prompt' among \['caption'\]; name the right one"),
        ("p.jsonl", '["a"]', r"line 1: list, expected an object"),
        ("p.jsonl", '{"prompt": 3}', r"line 1: 'prompt' is int, expected a text"),
        ("p.jsonl", '{"prompt": "half \\ud83d"}', r"line 1: 'prompt' holds half a character"),
        ("p.jsonl", '{"prompt": "a", "seed": 1.5}', r"'seed' is 1.5, expected a whole number"),
        ("p.jsonl", '{"prompt": "a", "tags": [1]}', r"'tags' is \[1\], expected a list of texts"),
        ("p.jsonl", '{"prompt": "a", "width": 64}', r"width is 64 and height is None, expected both"),
        ("p.jsonl", '{"prompt": "a", "width": 64, "height": 40}', r"16 does not divide 40: make it 32 or 48"),
        ("p.jsonl", '{"prompt": "a", "image": [1]}', r"'image' is list, expected a path, or the bytes"),
        ("p.jsonl", '{"prompt": "a", "seed": 1e999}', r"line 1: 'seed' is inf, expected a whole number from -2\*\*63"),
        (
            "p.jsonl",
            f'{{"prompt": "a", "seed": {2**70}}}',
            r"line 1: 'seed' is 1180591620717411303424, expected a whole",
        ),
        ("p.jsonl", f'{{"prompt": "a", "seed": 1{"0" * 5000}}}', r"line 1: not JSON \(Exceeds the limit"),
        ("p.jsonl", '{"prompt": "a", "seed": true}', r"line 1: 'seed' is True, expected a whole number"),
        ("p.jsonl", f'{{"prompt": "a", "width": {2**34}, "height": 16}}', r"line 1: a side of 17179869184 pixels"),
        ("p.jsonl", f'{{"prompt": "a", "x": {"[" * 100_000}', r"line 1: lists and objects nested too deeply"),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}', r"line 1: not JSON \('prompt' stands there twice"),
        ("p.jsonl", '{"prompt": "a", "image": "a\\u0000.png"}', r"line 1: 'image' holds the control character '.x00'"),
        ("p.jsonl", '{"prompt": "a", "tags": ["\\ud83d"]}', r"line 1: 'tags' holds half a character"),
        ("p.jsonl", '{"PROMPT": "a", "Prompt": "b"}', r"line 1: columns 'PROMPT' and 'Prompt' may both be 'prompt'"),
        ("p.txt", '{"prompt": "a"}', r"line 1 is JSON, not a prompt: name the file p.jsonl"),
        ("p.txt", "a\nb\x00c", r"line 2: 'prompt' holds the control character '.x00': remove it, or save .* as UTF-8"),
        ("p.csv", "prompt,seed\na,1\nb,12.5", r"line 3: 'seed' is '12.5', expected a whole number"),
        ("p.csv", "prompt, prompt\na,b", r"line 1: two columns are called 'prompt': rename one"),
        ("p.csv", "caption\na", r"line 2: no column 'prompt'"),
        ("p.csv", "prompt\na, b", r"line 2: more cells than columns; quote cells"),
        ("p.csv", 'prompt\n"a', r"not a table"),
        ("p.tar", "not an archive at all", r"not an uncompressed tar"),
    ],
)
def test_a_bad_file_is_refused_with_the_place_and_the_cure(tmp_path, name, text, cure):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=cure):
        read_prompts(str(path))


HEADS = [" Prompt , Negative_Prompt, SEED", "\ufeffprompt,negative prompt,Seed ", '"PROMPT","Negative-Prompt","seed"']


@pytest.mark.parametrize("head", HEADS)
def test_columns_are_found_whatever_their_capitals_and_blanks(tmp_path, head):
    (tmp_path / "p.csv").write_text(f"{head}\na cat,blur,12.0\n", encoding="utf-8")
    assert list(read_prompts(str(tmp_path / "p.csv"))) == [Prompt("a cat", seed=12, negative_prompt="blur")]


def test_a_column_of_that_very_name_comes_first(tmp_path):
    (tmp_path / "p.csv").write_text("Prompt,prompt\na,b\n")
    assert read_prompts(str(tmp_path / "p.csv")).prompts == ["b"]


def test_columns_that_are_not_read_are_said(tmp_path, caplog):
    (tmp_path / "p.csv").write_text("prompt,negativ_prompt,score\na,blur,1\nb,blur,2\n")
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        read_prompts(str(tmp_path / "p.csv"))
    assert "p.csv: columns that are not read: negativ_prompt, score" in caplog.text


def test_marks_of_files_that_were_appended_to_each_other_are_no_part_of_prompts(tmp_path):
    (tmp_path / "p.txt").write_bytes(2 * "\ufeffa cat\n".encode())
    (tmp_path / "p.jsonl").write_bytes(2 * '\ufeff{"prompt": "a cat"}\n'.encode())
    for name in ("p.txt", "p.jsonl"):
        assert read_prompts(str(tmp_path / name)).prompts == ["a cat"] * 2


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv"])
def test_what_is_no_text_is_refused_with_its_line(tmp_path, name):
    (tmp_path / name).write_bytes(
        b'{"prompt": "a"}\n' * (name == "p.jsonl") + b"prompt\n" * (name != "p.jsonl") + b"\xff"
    )
    with pytest.raises(ValueError, match=rf"{name}, line 2 is not UTF-8 text: save the file as UTF-8"):
        read_prompts(str(tmp_path / name))


def test_a_column_that_was_named_must_be_there(tmp_path):
    path = write(tmp_path, ".jsonl", ["a"])
    with pytest.raises(ValueError, match=r"no column 'number' among \['id', 'prompt'\]; name the right one, .* seed"):
        read_prompts(Source(path, seed="number"))


@pytest.mark.parametrize(
    ("source", "cure"),
    [
        ([], "an empty list, expected at least one path"),
        ({"weight": 2}, "needs the path"),
        ({"path": "p.txt", "colunm": "x"}, "colunm.*it may have path, weight, prompt"),
        ({"path": "p.txt", "weight": 0}, "weight is 0, expected a number above 0"),
        ({"path": "p.txt", "prompt": 3}, "prompt is 3, expected a text"),
    ],
)
def test_a_source_that_is_written_wrongly_is_refused(source, cure):
    with pytest.raises(ValueError, match=cure):
        listed(source)


def test_a_missing_file_is_refused_with_the_full_path(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist \(looked for /"):
        read_prompts(str(tmp_path / "nowhere.txt"))


def test_a_hub_id_without_the_package_that_reads_it_is_refused_with_the_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install datasets"):
        read_prompts("someone/prompts")


def test_a_dataset_of_the_hub_is_read_as_the_package_gives_it(monkeypatch):
    class Image:
        def __init__(self, decode=True):
            self.decode = decode

    class Records(list):
        features = {"text": None, "image": Image()}  # noqa: RUF012

        def cast_column(self, key, feature):
            assert (key, feature.decode) == ("image", False)
            return self

    class Package:
        __version__ = "4.0.0"

        @staticmethod
        def load_dataset(name, split):
            assert (name, split) == ("someone/prompts", "test")
            return Records([{"text": "a", "image": {"bytes": None, "path": "/x.png"}}, {"text": "b", "image": None}])

    monkeypatch.setitem(__import__("sys").modules, "datasets", Package)
    source = Source("someone/prompts", prompt="text", split="test")
    assert list(read_prompts(source)) == [Prompt("a", "/x.png"), Prompt("b")]


@pytest.mark.parametrize("version", ["2.19.2", "1.18.0", ""])
def test_a_package_that_would_run_a_datasets_own_code_is_refused(monkeypatch, version):
    package = type("Package", (), {"__version__": version, "load_dataset": lambda *_: pytest.fail("it was asked")})
    monkeypatch.setitem(__import__("sys").modules, "datasets", package)
    with pytest.raises(ValueError, match=rf"datasets {version} runs code that comes with a dataset: pip install --upg"):
        read_prompts("someone/prompts")


def test_a_dataset_that_cannot_be_read_is_refused_in_one_line(monkeypatch):
    def fail(*args, **settings):
        raise ValueError("Unknown split\n'train'")

    package = type("Package", (), {"__version__": "4.0.0", "load_dataset": fail})
    monkeypatch.setitem(__import__("sys").modules, "datasets", package)
    with pytest.raises(
        ValueError, match=r"someone/prompts: neither a file .*Unknown split 'train'\); correct the path"
    ):
        read_prompts("someone/prompts")


@pytest.mark.parametrize("kind", [*KINDS, ".tar"])
def test_a_file_that_is_not_what_its_name_says_is_refused_as_a_bad_prompt_file(tmp_path, kind):
    path = tmp_path / f"p{kind}"
    path.write_bytes(b"\xff\xfe\x00PNG")
    with pytest.raises(ValueError, match="prompt file"):
        read_prompts(str(path))


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv"])
def test_byte_order_marks_and_windows_line_ends_are_no_part_of_prompts(tmp_path, kind):
    path = Path(write(tmp_path, kind, ["a cat", "a dog"]))
    content = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + content)
    assert read_prompts(str(path)).prompts == ["a cat", "a dog"]


ODD = [
    "\U0001f469\u200d\U0001f680 rocket",
    "e\u0301",
    "\u2028 line separator",
    "line feed\nand \x1c\x85\v\f others",
    "\u05e9\u05dc\u05d5\u05dd",
    "a" * 300_000,
]


@pytest.mark.parametrize("kind", KINDS)
def test_unicode_and_very_long_lines_come_back_as_they_were(tmp_path, kind):
    prompts = [p.strip() for p in ODD if kind != ".txt" or "\n" not in p]
    assert read_prompts(write(tmp_path, kind, prompts)).prompts == prompts


def test_many_lines_take_little_memory(tmp_path):
    """Columns, not objects: a hundred thousand prompts of 50 characters in 10 MB; the benchmark reads a million."""
    path = tmp_path / "many.txt"
    path.write_text("".join(f"a picture of thing number {i:06} in the evening light\n" for i in range(100_000)))
    found = read_prompts(str(path)).unique()
    assert len(found) == 100_000
    assert found[99_999].text == "a picture of thing number 099999 in the evening light"
    assert found.table.nbytes < 10_000_000


@pytest.mark.parametrize(
    "inside", [picture(), {"bytes": picture(), "path": None}], ids=["bytes", "as `datasets` has it"]
)
def test_pictures_inside_a_table_are_kept_as_files(tmp_path, monkeypatch, inside):
    monkeypatch.chdir(tmp_path)
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "a", "image": inside}]), tmp_path / "p.parquet")
    (record,) = read_prompts("p.parquet")
    assert read_picture(record.image) == picture()
    assert read_prompts("p.parquet")[0] == record
    assert len(list((tmp_path / ".cache" / "pictures").iterdir())) == 1


def test_duplicates_go_and_are_counted_but_not_records_that_differ():
    records = [Prompt("a"), Prompt("b"), Prompt("a"), Prompt("a", seed=1), Prompt("a", seed=1), Prompt("a", seed=2)]
    found = PromptSet.from_records(records).unique()
    assert [(record.text, record.seed) for record in found] == [("a", None), ("b", None), ("a", 1), ("a", 2)]
    assert found.num_duplicates == 2


@given(st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=30, unique=True), st.floats(0.01, 0.99))
def test_adding_prompts_moves_none_between_training_and_validation(prompts, fraction):
    some, all_ = (
        PromptSet.from_records([Prompt(p) for p in prompts[::2]]),
        PromptSet.from_records([Prompt(p) for p in prompts]),
    )
    (train, held_out), (all_train, all_held_out) = some.split(fraction), all_.split(fraction)
    assert set(train.prompts) <= set(all_train.prompts)
    assert set(held_out.prompts) <= set(all_held_out.prompts)
    assert sorted(all_train.prompts + all_held_out.prompts) == sorted(prompts)


def test_the_split_holds_out_about_the_fraction_and_more_of_it_only_adds():
    prompts = PromptSet.from_records([Prompt(f"prompt {i}") for i in range(4000)])
    small, large = prompts.split(0.05)[1].prompts, prompts.split(0.2)[1].prompts
    assert 150 < len(small) < 250
    assert 700 < len(large) < 900
    assert set(small) < set(large)


@pytest.mark.parametrize(("name", "begin"), [("a.txt", "b\n"), ("a.jsonl", '{"prompt": "b"}\n'), ("a.csv", "prompt\n")])
def test_a_line_without_end_is_refused_by_its_number(tmp_path, name, begin):
    """Some bytes and a hole of a tebibyte, which is text."""
    path = tmp_path / name
    path.write_text(begin)
    os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match=rf"prompt file {path}, line 2 has more than 16777216 letters: divide it"):
        read_prompts(str(path))


def test_a_cell_without_end_is_refused(tmp_path, monkeypatch):
    """A quotation mark that none closes."""
    monkeypatch.setattr(tables, "LINE_LETTERS", 100)
    (tmp_path / "a.csv").write_text('prompt\n"a\n' + 50 * "abc\n")
    with pytest.raises(ValueError, match=r"not a table \(field larger than field limit \(100\)\)"):
        read_prompts(str(tmp_path / "a.csv"))


def test_a_file_that_is_no_text_is_not_read_to_its_end(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\n\xff\n")
    os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match=rf"prompt file {path}, line 2 is not UTF-8 text"):
        read_prompts(str(path))
