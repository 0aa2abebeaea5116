"""Bad input is refused before training starts, with a message that names the cure."""

import pytest
import torch

from srpo_lightning.cli import main
from srpo_lightning.run_folder import RunFolder
from tests import tiny
from tests.refusals import refused


@pytest.fixture
def config(models, features, tmp_path) -> str:
    return str(tiny.write_config(models, tmp_path / "run", features))


POLICY, OBJECTIVE = "--model.policy.init_args", "--model.objective.init_args"


@pytest.mark.parametrize(
    ("flags", "cure"),
    [
        ([f"{POLICY}.pretrained", "/nowhere/flux"], "neither a folder here .* give the path of a downloaded model"),
        ([f"{POLICY}.height", "40"], "height is 40 pixels, which 16 does not divide: set it to 32 or 48"),
        ([f"{POLICY}.height", "-16"], "height"),
        ([f"{OBJECTIVE}.control_words.positive", "[]"], "control_words.positive is .*give at least one word"),
        ([f"{OBJECTIVE}.window", "[5, 60]"], "the last before the end of the schedule, step 50"),
        ([f"{OBJECTIVE}.window", "[0, 25]"], "start at 1"),
        ([f"{OBJECTIVE}.ground_truth_ratio", "1.5"], "ground_truth_ratio"),
        (["--model.reward.init_args.pretrained", "/nowhere/clip"], "neither a folder here .* give the path"),
        (["--data.train", "/nowhere/prompts.txt"], "prompt file /nowhere/prompts.txt does not exist"),
        (["--data.batch_size", "0"], "batch_size"),
        (["--data.encoder", "elsewhere"], "data.encoder follows model.policy"),
        (["--model.sead", "1"], "sead"),
        (["--ckpt_path", "last"], "no checkpoint in .*Point --trainer.default_root_dir at the run to resume"),
        (["--ckpt_path", "/nowhere/x.ckpt"], "x.ckpt does not exist: `last` takes the newest"),
    ],
    ids=lambda value: value[0].rsplit(".", 1)[-1] if isinstance(value, list) else "",
)
def test_a_bad_setting_is_refused_before_training_starts(config, tmp_path, capsys, flags, cure):
    refused(["fit", "--config", config, *flags], cure, capsys)
    assert not (tmp_path / "run").exists()


def test_an_empty_prompt_file_is_refused(config, tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    refused(["fit", "--config", config, "--data.train", str(empty)], "write one prompt per line", capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"])
def test_a_damaged_model_is_refused_with_the_cure(models, features, tmp_path, capsys, damage):
    broken = models._replace(pipeline=tiny.write_pipeline(tmp_path / "flux"))
    (broken.pipeline / damage).write_bytes(b"{ damaged")
    config = str(tiny.write_config(broken, tmp_path / "run", features))
    refused(["fit", "--config", config], "cannot be read .*copy or download the folder again", capsys)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_second_run_in_a_used_folder_is_refused(config, tmp_path, capsys):
    main(["fit", "--config", config, "--trainer.max_steps", "1"])
    path = RunFolder(tmp_path / "run").checkpoint(1)
    before = path.read_bytes()
    refused(["fit", "--config", config], "holds a run already: resume it with --ckpt_path last", capsys)
    assert path.read_bytes() == before


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_checkpoint_that_is_cut_off_is_refused(config, tmp_path, capsys, command):
    path = RunFolder(tmp_path / "run").checkpoint(1)
    path.parent.mkdir(parents=True)
    torch.save({"x": torch.arange(1000)}, path)
    path.write_bytes(path.read_bytes()[:-5])
    refused([command, "--config", config, "--ckpt_path", "last"], f"{path} is damaged: {path.name} is cut off", capsys)


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_checkpoint_of_another_policy_is_refused(models, config, features, tmp_path, capsys, command):
    main(["fit", "--config", config, "--trainer.max_steps", "1"])
    wide = models._replace(pipeline=tiny.write_pipeline(tmp_path / "wide", width=24))
    other = str(tiny.write_config(wide, tmp_path / "other", features))
    path = str(RunFolder(tmp_path / "run").checkpoint(1))
    refused([command, "--config", other, "--ckpt_path", path], "of another policy: set model.policy", capsys)


def test_a_checkpoint_that_carries_code_is_refused(config, tmp_path, capsys):
    """weights_only: what a pickle could run is not even read."""
    path = tmp_path / "evil.ckpt"
    torch.save({"srpo": tmp_path}, path)
    refused(["fit", "--config", config, "--ckpt_path", str(path)], "more than tensors, numbers and texts", capsys)
