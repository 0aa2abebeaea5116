import functools
import itertools
import json
import operator
import sys

import pytest
import torch
from PIL import Image

from srpo_lightning.data import PromptData
from srpo_lightning.data.images import load_picture
from tests import tiny


def flat(batches, field: str) -> list:
    return functools.reduce(operator.iadd, (list(getattr(batch, field)) for batch in batches), [])


def steps(data: PromptData, count: int):
    return list(itertools.islice(data.train_dataloader(), count))


def prepared(data: PromptData) -> PromptData:
    data.prepare_data()
    return data


@pytest.fixture
def data(models, features):
    return prepared(tiny.new_data(models, features, seed=1))


def test_a_batch_holds_the_cached_features_of_its_prompts(data):
    (batch,) = steps(data, 1)
    assert batch.prompts == [data.train_prompts[i] for i in batch.indices]
    for row, prompt in enumerate(batch.prompts):
        assert torch.equal(batch.text.tensors["prompt_embeds"][row], data.cache[prompt]["prompt_embeds"])
        assert torch.equal(batch.text.tensors["pooled_prompt_embeds"][row], data.cache[prompt]["pooled_prompt_embeds"])


def test_plain_prompts_have_nothing_but_features(data):
    (batch,) = steps(data, 1)
    assert batch[3:] == (None,) * 6


def test_a_restored_data_module_goes_on_where_the_saved_one_stood(models, features, data):
    whole = [batch.prompts for batch in steps(data, 5)]
    saved = data.state_dict() | {"num_batches": 3}
    other = prepared(tiny.new_data(models, features, seed=1))
    other.load_state_dict(json.loads(json.dumps(saved)))
    assert [batch.prompts for batch in steps(other, 2)] == whole[3:]


def test_resumed_with_another_batch_size_no_prompt_comes_twice_and_none_is_left_out(models, features, data):
    first = flat(steps(data, 2), "prompts")
    other = prepared(tiny.new_data(models, features, seed=1, batch_size=3))
    other.load_state_dict(data.state_dict() | {"num_batches": 2})
    assert sorted(first + flat(steps(other, 1), "prompts")) == sorted(data.train_prompts)
    assert [segment.samples_per_step for segment in other.segments] == [2, 3]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_change_nothing(data, num_workers):
    expected = [batch.indices.tolist() for batch in steps(data, 3)]
    data.num_workers = num_workers
    assert [batch.indices.tolist() for batch in steps(data, 3)] == expected


def test_evaluation_takes_the_first_prompts_in_the_order_of_the_file(models, features):
    data = prepared(tiny.new_data(models, features, num_eval_prompts=2))
    assert [batch.prompts for batch in data.val_dataloader()] == [["c0", "c1"]]


def test_several_samples_of_a_prompt_have_numbers_of_their_own(models, features):
    """The number seeds the noise: no two samples of an evaluation share theirs."""
    data = prepared(tiny.new_data(models, features, eval_samples_per_prompt=3))
    batches = list(data.val_dataloader())
    assert sorted(map(int, flat(batches, "indices"))) == list(range(9))
    assert sorted(flat(batches, "prompts")) == sorted(["c0", "c1", "c2"] * 3)


def write(path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def new_data(models, features, train, evaluation=None, **settings) -> PromptData:
    defaults = {"cache_dir": str(features), "batch_size": 2, "eval_batch_size": 2}
    return PromptData(train, tiny.encoder_of(models), evaluation or str(models.evaluation), **defaults | settings)


def test_seeds_negative_prompts_and_tags_travel_with_their_prompts(models, features, tmp_path):
    rows = [{"prompt": "a", "seed": 7, "tags": ["x"]}, {"prompt": "b", "negative_prompt": "c"}]
    file = write(tmp_path / "p.jsonl", *rows)
    data = prepared(new_data(models, features, file, file, eval_samples_per_prompt=2))
    first, second = data.val_dataloader()
    assert (first.seeds, first.negative_prompts, first.tags) == ([7, None], [None, "c"], [["x"], []])
    assert second.seeds is None  # the second sample of a prompt is another picture
    (batch,) = steps(data, 1)
    assert dict(zip(batch.prompts, batch.negative_prompts, strict=True)) == {"a": None, "b": "c"}


def test_several_sources_are_drawn_by_weight(models, features, tmp_path):
    (tmp_path / "x.txt").write_text("a\nb\n")
    (tmp_path / "y.txt").write_text("c\n")
    sources = [{"path": str(tmp_path / "x.txt"), "weight": 3}, str(tmp_path / "y.txt")]
    drawn = flat(steps(prepared(new_data(models, features, sources)), 8), "prompts")
    assert [drawn.count(prompt) for prompt in "abc"] == [6, 6, 4]


def test_a_part_of_the_training_prompts_can_be_held_out(models, features, tmp_path):
    (tmp_path / "p.txt").write_text("".join(f"a{i}\n" for i in range(40)))
    data = PromptData(
        str(tmp_path / "p.txt"), tiny.encoder_of(models), validation_fraction=0.3, cache_dir=str(features)
    )
    assert sorted(data.train_prompts + data.eval_prompts) == sorted(f"a{i}" for i in range(40))
    assert 0 < len(data.eval_prompts) < 40


@pytest.mark.parametrize(("evaluation", "fraction"), [(True, 0.1), (False, 0.0)])
def test_what_is_held_out_is_said_once(models, features, evaluation, fraction):
    with pytest.raises(ValueError, match="give a prompt file to the one, or to the other a part"):
        PromptData(
            str(models.train), tiny.encoder_of(models), str(models.evaluation) if evaluation else None, fraction,
            cache_dir=str(features),
        )  # fmt: skip


def test_a_fraction_that_leaves_nothing_is_refused(models, features):
    with pytest.raises(ValueError, match="leaves 0 prompts to evaluate and 7 to train: choose another"):
        PromptData(str(models.train), tiny.encoder_of(models), validation_fraction=1e-9, cache_dir=str(features)).read(
            trains=True
        )


def test_a_size_of_a_list_is_drawn_for_each_step_and_all_prompts_come(models, features):
    data = prepared(new_data(models, features, str(models.train), sizes=[(32, 16), (32, 32)]))
    batches = steps(data, 8)
    sizes = [batch.size for batch in batches]
    assert [sizes.count(size) for size in ((16, 32), (32, 32))] == [4, 4]
    assert sorted(flat(batches, "prompts")[:7]) == sorted(data.train_prompts)
    assert {batch.size: batch.prompts for batch in data.val_dataloader()} == {(16, 32): ["c0", "c2"], (32, 32): ["c1"]}


def test_prompts_with_sizes_of_their_own_come_in_batches_of_one_size(models, features, tmp_path):
    own = {f"a{i}": (16, 32) if i < 3 else (32, 48) for i in range(9)}
    rows = [{"prompt": prompt, "height": height, "width": width} for prompt, (height, width) in own.items()]
    file = write(tmp_path / "p.jsonl", *rows)
    data = prepared(new_data(models, features, file, file))
    batches = steps(data, 9)
    assert all(own[prompt] == batch.size for batch in batches for prompt in batch.prompts)
    assert [batch.size for batch in batches].count((16, 32)) == 3  # as the prompts are: 3 of 9
    assert sorted(flat(batches, "prompts")) == sorted([*own] * 2)
    assert all(own[prompt] == batch.size for batch in data.val_dataloader() for prompt in batch.prompts)


def test_a_size_without_whole_tokens_is_refused(models, features):
    with pytest.raises(ValueError, match=r"data.sizes\[1\]: 32 x 40 pixels, .*make it 32 or 48"):
        new_data(models, features, str(models.train), sizes=[(32, 32), (32, 40)])


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (40, 40 if number < 3 else 80), (60 * number, 0, 99)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"p{number}")
    return folder


def test_offline_steps_hold_the_latents_of_their_captions_pictures(models, features, pictures):
    settings = {"images": str(pictures), "offline_ratio": 0.25}
    data = prepared(new_data(models, features, str(models.train), **settings))
    batches = steps(data, 8)
    real = [batch for batch in batches if batch.x0 is not None]
    assert len(real) == 2
    assert sorted(flat(real, "prompts")) == ["p0", "p1", "p2", "p3"]
    assert all(prompt in data.train_prompts for batch in batches if batch.x0 is None for prompt in batch.prompts)
    encoder = tiny.image_encoder(models.pipeline)
    by_caption = dict(zip((f"p{i}" for i in range(4)), data.selection.pictures, strict=True))
    for batch in real:
        assert batch.size == (32, 32)
        for prompt, number, x0 in zip(batch.prompts, batch.indices, batch.x0, strict=True):
            assert prompt == f"p{number}"
            expected = encoder.encode(load_picture(by_caption[prompt])[None])[0]
            assert torch.allclose(x0, expected, atol=1e-5)


def test_training_records_that_name_pictures_need_no_second_source(models, features, pictures):
    settings = {"offline_ratio": 1.0, "sizes": [(32, 32), (16, 32)]}
    data = prepared(new_data(models, features, str(pictures), **settings))
    batches = steps(data, 4)
    assert all(batch.x0 is not None for batch in batches)
    assert {prompt: batch.size for batch in batches for prompt in batch.prompts} == {
        "p0": (32, 32), "p1": (32, 32), "p2": (32, 32), "p3": (32, 16),
    }  # fmt: skip


def test_offline_steps_without_pictures_are_refused(models, features):
    with pytest.raises(ValueError, match=r"no record names one: give data.images"):
        new_data(models, features, str(models.train), offline_ratio=0.5).read(trains=True)


def report(data: PromptData, caplog) -> str:
    with caplog.at_level("INFO"):
        data.prepare_data()
    return caplog.text


def test_what_was_left_out_and_cut_is_reported(models, features, tmp_path, caplog):
    train = tmp_path / "train.txt"
    train.write_text("a\n\nc0\na\n" + "b" * 40 + "\n")
    text = report(new_data(models, features, str(train)), caplog)
    assert "prompts: 3 to train, 3 to evaluate" in text
    assert "1 empty lines skipped" in text
    assert "1 duplicates skipped" in text
    assert "1 of those to evaluate are trained on too" in text
    assert f"prompts: 4 tokens in the median, 34 at 95 %, 42 at most, of {tiny.MAX_TOKENS}" in text
    assert f"prompts: 1 cut to the {tiny.MAX_TOKENS} tokens" in text
    assert "'" + "b" * 40 + "'" in text


def test_many_missing_prompts_are_refused_with_the_exact_command(models, tmp_path, monkeypatch):
    words = ["fit", "--config", "my.yaml", "--config=other.yaml", "--data.train", "my prompts.txt"]
    monkeypatch.setattr(sys, "argv", ["srpo_lightning", *words, "--trainer.max_steps", "3", "--model.seed=1"])
    data = new_data(models, tmp_path, str(models.train), max_prompts_to_encode=9)
    with pytest.raises(ValueError, match=r"10 of 10 prompts are not in") as error:
        data.prepare_data()
    assert str(error.value).endswith(
        "\n    python -m srpo_lightning cache --config my.yaml --config other.yaml --data.train 'my prompts.txt' "
        "--model.seed 1"
    )
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_missing_cache_beside_one_of_another_length_names_that(models, tmp_path):
    new_data(models, tmp_path, str(models.train), max_sequence_length=7).prepare_data()
    with pytest.raises(ValueError, match=r"there are .*sequence_length is 7, expected 12"):
        new_data(models, tmp_path, str(models.train), max_prompts_to_encode=0).prepare_data()


def test_a_remote_cache_is_read_and_never_written(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    local = prepared(new_data(models, tmp_path / "there", str(models.train)))
    remote = new_data(models, f"file://{tmp_path / 'there'}", str(models.train), mirror_dir=str(tmp_path / "here"))
    for ours, theirs in zip(steps(prepared(remote), 3), steps(local, 3), strict=True):
        assert ours.prompts == theirs.prompts
        assert torch.equal(ours.text.tensors["prompt_embeds"], theirs.text.tensors["prompt_embeds"])
    assert len(list((tmp_path / "here").rglob("*.parquet"))) == len(list((tmp_path / "there").rglob("*.parquet"))) == 1
    (tmp_path / "more.txt").write_text("new")
    with pytest.raises(ValueError, match=r"1 of 4 prompts are not in file://.* only read.*\n.*--data.cache_dir FOLDER"):
        new_data(models, f"file://{tmp_path / 'there'}", str(tmp_path / "more.txt")).prepare_data()


def test_a_damaged_file_of_a_large_set_stops_the_run_before_its_first_step(models, tmp_path):
    data = prepared(new_data(models, tmp_path, str(models.train)))
    (path,) = tmp_path.rglob("*.parquet")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{path.name} has .* bytes, expected"):
        data.train_dataloader()
    with pytest.raises(ValueError, match=rf"{path.name} has .* bytes, expected"):
        new_data(models, tmp_path, str(models.train), max_prompts_to_encode=2).prepare_data()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_flipped_bit_stops_the_run_at_the_file(models, tmp_path, num_workers):
    data = prepared(new_data(models, tmp_path, str(models.train), num_workers=num_workers))
    (path,) = tmp_path.rglob("*.parquet")
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name} has other bytes than were written"):
        steps(data, 1)


def resumed_with(models, features, tmp_path, before: list[str], now: list[str], caplog, **settings) -> tuple:
    """A data module that goes on after two batches of another list of prompts, and what was said."""
    for name, prompts in (("before", before), ("now", now)):
        (tmp_path / f"{name}.txt").write_text("\n".join(prompts))
    first = prepared(new_data(models, features, str(tmp_path / "before.txt")))
    assert len(steps(first, 2)) == 2
    second = prepared(new_data(models, features, str(tmp_path / "now.txt"), **settings))
    second.load_state_dict(json.loads(json.dumps(first.state_dict() | {"num_batches": 2})))
    caplog.clear()
    with caplog.at_level("INFO"):
        batches = steps(second, len(now) // 2)
    return second, batches, caplog.text


def test_resumed_with_other_prompts_a_new_pass_begins_and_what_changed_is_said(models, features, tmp_path, caplog):
    before, now = [f"a{i}" for i in range(7)], [f"a{i}" for i in range(1, 7)] + ["b0", "b1"]
    data, batches, said = resumed_with(models, features, tmp_path, before, now, caplog)
    assert "training prompts: 2 added and 1 removed since the checkpoint was written: a new pass" in said
    assert sorted(flat(batches, "prompts")) == sorted(now)
    assert [segment.step for segment in data.segments] == [2]


@pytest.mark.parametrize("settings", [{"seed": 5}, {}], ids=["another seed", "another order"])
def test_resumed_with_the_same_prompts_in_another_order_a_new_pass_begins(models, features, tmp_path, caplog, settings):
    before = [f"a{i}" for i in range(8)]
    now = before if settings else before[::-1]
    _, batches, said = resumed_with(models, features, tmp_path, before, now, caplog, **settings)
    assert "training prompts: in another order, or drawn otherwise" in said
    assert sorted(flat(batches, "prompts")) == sorted(now)


def test_resumed_with_the_same_prompts_nothing_is_said(models, features, tmp_path, caplog):
    before = [f"a{i}" for i in range(8)]
    data, batches, said = resumed_with(models, features, tmp_path, before, before, caplog)
    assert "a new pass" not in said
    assert [segment.step for segment in data.segments] == [0]
    whole = steps(prepared(new_data(models, features, str(tmp_path / "now.txt"))), 6)
    assert flat(batches, "prompts") == flat(whole[2:], "prompts")
