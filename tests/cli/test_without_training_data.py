"""What a run was trained on may be gone when it is evaluated, drawn with or exported."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from srpo_lightning.cli import main
from srpo_lightning.data import PromptData
from tests import tiny
from tests.refusals import refused


@pytest.fixture(scope="module")
def run(models, features, tmp_path_factory) -> Path:
    """A finished run on real pictures, of which nothing is left but the run folder and what it was evaluated on."""
    folder = tmp_path_factory.mktemp("gone")
    pictures = folder / "pictures"
    pictures.mkdir()
    for name in "ab":
        Image.new("RGB", (32, 32), "red").save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(name)
    shutil.copy(models.train, folder / "train.txt")
    config = tiny.config(models, folder / "run", features)
    config["data"] |= {"train": str(folder / "train.txt"), "images": str(pictures), "offline_ratio": 1.0}
    config["trainer"] |= {"max_steps": 1, "val_check_interval": 1}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["srpo_lightning"])
        main(["fit", "--config", str(folder / "config.json")])
    shutil.rmtree(pictures)
    (folder / "train.txt").unlink()
    return folder / "run"


@pytest.mark.parametrize("command", ["validate", "predict"])
def test_a_run_is_evaluated_and_drawn_with(run, command, tmp_path):
    here = shutil.copytree(run, tmp_path / "run")
    trainer = ["--trainer.default_root_dir", str(here)]
    main([command, "--config", str(here / "config.yaml"), *trainer, "--ckpt_path", "last"])


def test_a_run_is_exported_with_its_own_first_evaluation_prompt(run, tmp_path):
    main(["export", "--config", str(run / "config.yaml"), "--output", str(tmp_path / "out"), "--dtype", "float32"])
    text = (tmp_path / "out" / "README.md").read_text()
    assert "'c0'," in text
    assert "| training prompts | not known: their files cannot be read any more |" in text


def test_training_goes_on_with_what_it_was_trained_on_alone(run, tmp_path, capsys):
    here = shutil.copytree(run, tmp_path / "run")
    arguments = ["--config", str(here / "config.yaml"), "--trainer.default_root_dir", str(here)]
    refused(["fit", *arguments, "--ckpt_path", "last"], r"train.txt does not exist", capsys)


def test_where_a_part_of_the_training_prompts_is_evaluated_pictures_need_not_be_there(models, features, tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "a{i}", "image": "gone.png"}}\n' for i in range(40)))
    data = PromptData(
        str(tmp_path / "p.jsonl"), tiny.encoder_of(models), validation_fraction=0.3, offline_ratio=1.0,
        cache_dir=str(features),
    )  # fmt: skip
    assert 0 < len(data.read(trains=False).evaluation) < 40
    with pytest.raises(ValueError, match=r"gone.png cannot be read"):
        data.read(trains=True)
