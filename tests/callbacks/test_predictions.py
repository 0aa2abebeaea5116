"""What `predict` draws, what it keeps, and what it says of both."""

import json
import shutil
import socket

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from srpo_lightning.callbacks import RunCheckpoint
from srpo_lightning.callbacks.predictions import Predictions, together
from srpo_lightning.evaluation.pictures import read_record, write_picture
from srpo_lightning.policies import FluxPolicy
from srpo_lightning.run_folder import PictureFolder, RunFolder
from tests import tiny
from tests.files.test_owners import ended


@pytest.fixture
def said(monkeypatch):
    """The lines that were printed."""
    lines = []
    monkeypatch.setattr("srpo_lightning.callbacks.predictions.rank_zero_info", lines.append)
    return lines


def predict(models, features, run, checkpoint=None, policy=None, data=None, **settings) -> list[int]:
    """The samples that were drawn for it."""
    drawn, module = [], tiny.new_module(models, **settings)
    if policy:
        module.policy = FluxPolicy(**{"pretrained": str(models.pipeline), "height": 32, "width": 32} | policy)
    sample = module.sample

    def record(batch):
        drawn.extend(batch.indices.tolist())
        return sample(batch)

    module.sample = record
    trainer = tiny.new_trainer(run, [Predictions()])
    data = tiny.new_data(models, features, **{"eval_batch_size": 1} | (data or {}))
    trainer.predict(module, data, ckpt_path=checkpoint, return_predictions=False)
    return drawn


def pictures(run) -> list:
    return sorted(run.rglob("*.png"))


def test_predictions_that_are_there_are_not_drawn_again(models, features, tmp_path, said):
    assert predict(models, features, tmp_path) == [0, 1, 2]
    folder = tmp_path / "predictions"
    names = [path.relative_to(folder).as_posix() for path in pictures(folder)]
    assert names == [f"step-00000000/policy/0000{i}.png" for i in range(3)]
    before = pictures(folder)[1].read_bytes()
    pictures(folder)[1].unlink()
    assert predict(models, features, tmp_path) == [1]
    assert pictures(folder)[1].read_bytes() == before
    assert predict(models, features, tmp_path) == []
    assert said == [
        f"predict: 3 pictures in {folder}: 3 drawn, 0 kept, 0 drawn again",
        f"predict: 3 pictures in {folder}: 1 drawn, 2 kept, 0 drawn again",
        f"predict: 3 pictures in {folder}: 0 drawn, 3 kept, 0 drawn again",
    ]


def test_the_metadata_has_a_line_for_every_picture_whatever_was_in_it(models, features, tmp_path):
    folder = tmp_path / "predictions"
    (foreign := folder / "step-00000001" / "policy" / "00000.png").parent.mkdir(parents=True)
    (folder / "metadata.jsonl").write_text('{"index": 0, "file": "no')
    (info := PngInfo()).add_itxt("srpo", "[1]")
    Image.new("RGB", (4, 4)).save(foreign, pnginfo=info)
    predict(models, features, tmp_path)
    once = (folder / "metadata.jsonl").read_text()
    records = [json.loads(line) for line in once.splitlines()]
    assert [record["prompt"] for record in records] == ["c0", "c1", "c2"]
    assert all(read_record(folder / record["file"]) == record for record in records)
    predict(models, features, tmp_path)
    assert (folder / "metadata.jsonl").read_text() == once


def test_what_a_killed_call_was_writing_is_removed(models, features, drawn, tmp_path):
    run = shutil.copytree(drawn, tmp_path / "run")
    left = pictures(run)[0].with_name(f"00000.png.partial-{socket.gethostname()}-{ended()}")
    left.write_bytes(b"half a picture")
    predict(models, features, run)
    assert not left.exists()
    assert len(pictures(run)) == 3


def test_the_metadata_is_not_there_while_it_is_not_true(models, features, tmp_path, monkeypatch):
    """Whoever kills a call finds none, instead of that of the call before."""
    predict(models, features, tmp_path)
    path, seen = tmp_path / "predictions" / "metadata.jsonl", []
    assert path.exists()
    monkeypatch.setattr("srpo_lightning.callbacks.predictions.write_picture", lambda *_: seen.append(path.exists()))
    predict(models, features, tmp_path, num_sample_steps=3)
    assert seen == [False] * 3


@pytest.fixture(scope="module")
def drawn(models, features, tmp_path_factory):
    """A run with its predictions; read-only."""
    run = tmp_path_factory.mktemp("drawn")
    predict(models, features, run)
    return run


CHANGES = {
    "steps": {"num_sample_steps": 3},
    "guidance": {"sample_guidance": 2.0},
    "seed": {"seed": 4},
    "policy": {"policy": {"quantize_timesteps": True}},
    "size": {"policy": {"height": 16}},
    "size of the data": {"data": {"sizes": [(16, 32)]}},
    "length of the text": {"data": {"max_sequence_length": 5}},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_picture_that_would_be_another_is_drawn_again(models, features, drawn, tmp_path, said, change):
    run = shutil.copytree(drawn, tmp_path / "run")
    assert predict(models, features, run, **change) == [0, 1, 2]
    assert said == [f"predict: 3 pictures in {run / 'predictions'}: 0 drawn, 0 kept, 3 drawn again"]
    assert predict(models, features, run, **change) == []
    assert predict(models, features, drawn) == []


def test_another_prompt_is_drawn_again_and_what_lies_beside_it_is_told(models, features, drawn, tmp_path, said):
    run = shutil.copytree(drawn, tmp_path / "run")
    prompts = tmp_path / "other.txt"
    prompts.write_text("c0\nb7\n")
    assert predict(models._replace(evaluation=prompts), features, run) == [1]
    folder = run / "predictions"
    assert [read_record(path)["prompt"] for path in pictures(folder)] == ["c0", "b7", "c2"]
    assert said == [
        f"predict: 2 pictures in {folder}: 0 drawn, 1 kept, 1 drawn again; 1 of earlier calls lie beside them"
    ]


def test_a_seed_of_its_own_is_another_noise_even_where_it_is_the_runs(models, features, drawn, tmp_path):
    run = shutil.copytree(drawn, tmp_path / "run")
    prompts = tmp_path / "seeds.jsonl"
    prompts.write_text('{"prompt": "c0"}\n{"prompt": "c1", "seed": 3}\n{"prompt": "c2"}\n')
    assert predict(models._replace(evaluation=prompts), features, run) == [1]


@pytest.mark.parametrize("damage", [lambda png: png[:-20], lambda png: b"", lambda png: b"GIF89a",
                                    lambda png: png[:200] + bytes([png[200] ^ 1]) + png[201:]])  # fmt: skip
def test_a_damaged_picture_is_drawn_again(models, features, drawn, tmp_path, damage):
    run = shutil.copytree(drawn, tmp_path / "run")
    path = pictures(run)[1]
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert predict(models, features, run) == [1]
    assert path.read_bytes() == whole


def test_another_checkpoint_of_the_same_step_is_another_picture(models, features, tmp_path):
    for run, learning_rate in (("a", 1e-3), ("b", 1e-2)):
        module = tiny.new_module(models, optimizer=lambda params, lr=learning_rate: torch.optim.AdamW(params, lr=lr))
        trainer = tiny.new_trainer(tmp_path / run, [RunCheckpoint()], max_steps=1)
        trainer.fit(module, tiny.new_data(models, features))
    first, second = (RunFolder(tmp_path / run).checkpoint(1) for run in "ab")
    assert predict(models, features, tmp_path / "a", first) == [0, 1, 2]
    assert predict(models, features, tmp_path / "a", first) == []
    assert predict(models, features, tmp_path / "a", second) == [0, 1, 2]


def test_a_picture_that_one_rank_drew_and_another_kept_was_drawn():
    """Ranks fill their last batch up with pictures of another rank."""
    said = [("a", "kept"), ("a", "drawn"), ("b", "drawn again"), ("b", "kept"), ("c", "kept")]
    assert together(said) == {"a": "drawn", "b": "drawn again", "c": "kept"}


def test_a_clip_is_kept_without_its_moving_file_only_where_pillow_writes_none(tmp_path, monkeypatch):
    callback = Predictions()
    callback.folder = PictureFolder(tmp_path)
    record = {"file": "a.png", "num_frames": 5, "prompt": "a"}
    write_picture(tmp_path / "a.png", Image.new("RGB", (8, 8)), record)
    assert not callback.is_kept(record)
    monkeypatch.setattr("srpo_lightning.evaluation.pictures.features.check", lambda _: False)
    assert callback.is_kept(record)
