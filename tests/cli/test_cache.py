"""`cache` from the command line: what it computes, what it says, and what a kill leaves."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.multiprocessing.spawn import start_processes

from srpo_lightning.cli import main
from srpo_lightning.data import features as encoded
from srpo_lightning.data import store
from srpo_lightning.data.manifest import MANIFEST
from srpo_lightning.jobs import cache
from srpo_lightning.jobs.cache import read_data
from tests import processes, tiny


def die_before_the_third_file() -> None:
    """Two prompts are in each."""
    write, folders = store.write_file, []

    def dying(folder, items):
        folders.append(folder)
        if len(folders) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(folder, items)

    encoded.per_file = lambda item_bytes: 2
    store.write_file = dying


@pytest.fixture
def small_files(monkeypatch):
    """Ten prompts in five files."""
    monkeypatch.setattr("srpo_lightning.data.features.per_file", lambda item_bytes: 2)


@pytest.fixture
def config(models, tmp_path) -> str:
    return str(tiny.write_config(models, tmp_path / "run", tmp_path / "cache"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.parquet")}


def change(config: str, **settings) -> None:
    content = json.loads(Path(config).read_text())
    content["data"] |= settings
    Path(config).write_text(json.dumps(content))


def features(config: str) -> dict[str, torch.Tensor]:
    data = read_data(config)
    data.cache.open()
    return {text: data.cache[text]["prompt_embeds"] for text in data.selection.texts}


def test_every_prompt_is_encoded_once_and_fit_finds_it(config, tmp_path, small_files, capsys, monkeypatch):
    main(["cache", "--config", config])
    out = capsys.readouterr().out
    assert "prompts: 0 of 10 are there; 10 to encode in 5 files on 1 x cpu, at most 0.0 MB of" in out
    assert "per second and" in out
    assert "10 prompts in 5 files, 0.0 MB, " in out
    assert "bytes each (832 before compression)" in out
    before = files(tmp_path)
    data = read_data(config)
    expected = data.cache.encoder.encode(data.selection.texts)
    assert all(
        torch.equal(found, own["prompt_embeds"]) for found, own in zip(features(config).values(), expected, strict=True)
    )
    monkeypatch.setattr("srpo_lightning.policies.flux.FluxTextEncoder._load", lambda self: pytest.fail("encoded again"))
    main(["cache", "--config", config])
    assert "10 of 10 are there; 0 to encode" in capsys.readouterr().out
    change(config, max_prompts_to_encode=0)
    main(["fit", "--config", config, "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"])
    assert files(tmp_path) == before


def test_more_prompts_add_files_and_pruning_takes_what_none_asks_for(config, tmp_path, small_files, capsys):
    main(["cache", "--config", config])
    before = files(tmp_path)
    (tmp_path / "more.txt").write_text("a0 b\nnew\n")
    change(config, train=str(tmp_path / "more.txt"))
    main(["cache", "--config", config])
    assert "4 of 5 are there; 1 to encode in 1 files" in capsys.readouterr().out
    assert before.items() < files(tmp_path).items()
    main(["cache", "--config", config, "--prune", "true"])
    assert len(files(tmp_path)) == 4  # of a0 a1, a6 c0, c1 c2, and new
    assert features(config).keys() == {"a0 b", "new", "c0", "c1", "c2"}


def test_several_processes_share_the_files(config, tmp_path, monkeypatch):
    """They are forked from one that has imported everything, which takes longer than they do."""
    monkeypatch.setattr(cache, "spawn", partial(start_processes, start_method="forkserver"))
    (tmp_path / "many.txt").write_text("".join(f"x{i}\n" for i in range(1200)))
    change(config, train=str(tmp_path / "many.txt"))
    main(["cache", "--config", config, "--num_processes", "2"])
    data = read_data(config)
    assert data.cache.open().num_items == 1203
    assert len(files(tmp_path)) == 2
    text = data.selection.texts[1100]
    assert torch.allclose(
        data.cache[text]["prompt_embeds"], data.cache.encoder.encode([text])[0]["prompt_embeds"], atol=1e-6
    )


def test_a_killed_job_goes_on_behind_its_finished_files(config, tmp_path, small_files, capsys):
    done = processes.start(["cache", "--config", config], before=die_before_the_third_file)
    assert done.returncode == -signal.SIGKILL, done.output
    finished = files(tmp_path)
    assert len(finished) == 2
    assert not list(tmp_path.rglob(MANIFEST))
    change(config, max_prompts_to_encode=9)
    with pytest.raises(SystemExit, match=r"half-written: 2 files are finished and will be kept"):
        main(["fit", "--config", config])
    main(["cache", "--config", config])
    assert "4 of 10 are there; 6 to encode in 3 files" in capsys.readouterr().out
    assert finished.items() < files(tmp_path).items()


def test_pictures_are_encoded_beside_their_captions(config, models, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32), (80 * number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"p{number}")
    change(config, images=str(folder), offline_ratio=0.5)
    main(["cache", "--config", config])
    out = capsys.readouterr().out
    assert "prompts: 0 of 13 are there" in out
    assert "pictures: 0 of 3 are there; 3 to encode in 1 files" in out
    main(["cache", "--config", config])
    assert "pictures: 3 of 3 are there" in capsys.readouterr().out


def test_sources_in_a_configuration_are_paths_or_arguments_or_lists_of_both(config, models, tmp_path):
    (tmp_path / "p.csv").write_text("caption,w,h\na cat,32,48\n")
    named = {"path": str(tmp_path / "p.csv"), "prompt": "caption", "width": "w", "height": "h", "weight": 2}
    for train, expected in ((named, ["a cat"]), ([str(models.evaluation), named], ["c0", "c1", "c2", "a cat"])):
        change(config, train=train, sizes=[[32, 16]])
        data = read_data(config)
        assert data.train_prompts == expected
        assert data.selection.train[-1].weight == 2
        assert data.selection.train[-1].prompts[0].size == (48, 32)
        assert data.sizes == [(16, 32)]


def test_a_missing_file_is_made_again(config, tmp_path, small_files, capsys, caplog):
    main(["cache", "--config", config])
    before = files(tmp_path)
    gone = next(tmp_path.rglob("*.parquet"))
    gone.unlink()
    with caplog.at_level("INFO"):
        main(["cache", "--config", config])
    assert f"{gone.name} is missing: its 2 items are made again" in caplog.text
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({"cache_dir": "s3://bucket/features"}, "from where features are only read: encode into a folder here"),
        ({"train": "/nowhere.txt"}, "prompt file /nowhere.txt does not exist"),
    ],
)
def test_what_cannot_be_encoded_is_refused_in_one_line(config, settings, cure):
    change(config, **settings)
    with pytest.raises(SystemExit, match=cure):
        main(["cache", "--config", config])
