"""What is taken for a prompt file or a picture, in folders and archives, and what is not."""

import os

import pyarrow
import pytest
from pyarrow import parquet

from srpo_lightning.data.picture_files import read_picture
from srpo_lightning.data.prompts import Prompt, read_prompts
from tests.data.archive import picture


def test_a_folder_of_pictures_has_its_captions_beside_them(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "sub/a.png"):
        (tmp_path / name).write_bytes(picture())
        (tmp_path / name).with_suffix(".txt").write_text(f"caption of {name}\n")
    assert list(read_prompts(str(tmp_path))) == [
        Prompt(f"caption of {name}", str((tmp_path / name).resolve())) for name in ("b.png", "sub/a.png")
    ]
    (tmp_path / "c.png").write_bytes(picture())
    with pytest.raises(ValueError, match=r"c.png and 0 other pictures have no caption: write one into c.txt"):
        read_prompts(str(tmp_path))


def test_a_folder_of_files_is_read_in_the_order_of_their_names(tmp_path):
    for name, prompts in (("1.parquet", ["a", "b"]), ("0.parquet", ["c"])):
        parquet.write_table(pyarrow.table({"prompt": prompts}), tmp_path / name)
    assert read_prompts(str(tmp_path)).prompts == ["c", "a", "b"]


def test_an_empty_folder_is_refused_with_what_it_could_hold(tmp_path):
    with pytest.raises(ValueError, match=r"neither pictures .* nor .txt, .jsonl, .csv, .parquet or .tar"):
        read_prompts(str(tmp_path))


def files(folder, *names: str):
    """Empty pictures, and texts that hold their own names."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture() if path.suffix == ".png" else path.name.encode())
    return str(folder)


def test_a_file_without_suffix_has_a_prompt_per_line(tmp_path):
    (tmp_path / "prompts").write_text("a\nb\n")
    assert read_prompts(str(tmp_path / "prompts")).prompts == ["a", "b"]
    (tmp_path / "prompts").write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"line 1 is JSON, not a prompt: name the file prompts.jsonl"):
        read_prompts(str(tmp_path / "prompts"))


def test_kinds_are_told_by_suffixes_of_any_case(tmp_path):
    (tmp_path / "P.CSV").write_text("prompt\na\n")
    assert read_prompts(str(tmp_path / "P.CSV")).prompts == ["a"]
    assert read_prompts(str(tmp_path)).prompts == ["a"]


def test_a_folder_of_text_files_has_a_prompt_per_line(tmp_path):
    assert read_prompts(files(tmp_path, "b.txt", "sub/a.txt", "c.TXT")).prompts == ["b.txt", "c.TXT", "a.txt"]


def test_what_programs_leave_for_themselves_is_passed_over(tmp_path):
    hidden = ["._a.txt", "._a.png", ".hidden.csv", ".ipynb_checkpoints/b.txt", "__MACOSX/c.png", "sub/.cache/d.txt"]
    (record,) = read_prompts(files(tmp_path, "a.png", "a.txt", *hidden))
    assert record == Prompt("a.txt", str((tmp_path / "a.png").resolve()))


def test_folders_that_are_linked_are_read_once(tmp_path):
    files(tmp_path / "there", "a.png", "a.txt")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there")
    (tmp_path / "there" / "round").symlink_to(tmp_path / "here")
    assert read_prompts(str(tmp_path / "here")).prompts == ["a.txt"]


@pytest.mark.parametrize(
    ("names", "cure"),
    [
        (["a.png", "a.txt", "m.csv"], "holds both m.csv and a.txt: name the one that is meant"),
        (["README.txt", "p.jsonl"], "holds both p.jsonl and README.txt: name the one that is meant"),
        (["a.png", "a.txt", "b.txt"], r"b.txt and 0 other captions have no picture beside them: add it"),
        (["a.heic"], r"a.heic and 0 other pictures have no caption"),
        (["a.txt", "more.jsonl.gz"], r"more.jsonl.gz in a folder of prompts is not read: write it as .txt, .jsonl"),
        (["a.txt", "more.tsv"], r"more.tsv in a folder of prompts is not read"),
    ],
)
def test_a_folder_of_which_a_part_would_be_left_out_is_refused(tmp_path, names, cure):
    with pytest.raises(ValueError, match=cure):
        read_prompts(files(tmp_path, *names))


def test_pictures_that_a_table_beside_them_names_are_relative_to_the_table(tmp_path):
    files(tmp_path, "sub/i/a.png")
    (tmp_path / "sub" / "p.jsonl").write_text('{"prompt": "a", "image": "i/a.png"}')
    (record,) = read_prompts(str(tmp_path))
    assert read_picture(record.image) == picture()


@pytest.mark.parametrize("name", ["a.png", "p.txt", "p.tar"])
def test_what_has_no_end_is_refused_before_it_is_opened(tmp_path, name):
    path = tmp_path / name
    os.mkfifo(path)
    if name != "a.png":
        with pytest.raises(ValueError, match=rf"{name} is a device or a pipe, which may have no end"):
            read_prompts(str(path))
    with pytest.raises(ValueError, match=rf"{name} is a broken link, a device or a pipe: replace it"):
        read_prompts(str(tmp_path))


def test_a_link_to_nowhere_is_refused_by_name(tmp_path):
    files(tmp_path, "a.png", "a.txt")
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"b.png is a broken link"):
        read_prompts(str(tmp_path))


def test_a_caption_of_many_bytes_is_refused_unread(tmp_path):
    files(tmp_path, "a.png", "a.txt")
    os.truncate(tmp_path / "a.txt", 1 << 33)  # sparse: no byte is on the disk
    with pytest.raises(ValueError, match=r"a.txt has 8589934592 bytes, at most 1048576 are read"):
        read_prompts(str(tmp_path))
