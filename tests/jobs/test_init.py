"""`init` writes a configuration that `fit` takes and that fits the memory; it asks on a terminal, or takes options."""

import json
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from srpo_lightning.cli import main
from srpo_lightning.config.arguments import read_config
from srpo_lightning.config.shipped import RECIPES, recipes
from srpo_lightning.jobs.estimate.units import GIB
from srpo_lightning.jobs.init import forms
from srpo_lightning.jobs.init.comments import commented, comments_of
from srpo_lightning.jobs.init.wishes import models
from tests.processes import LIMIT_S
from tests.refusals import refused

REPOSITORY = Path(__file__).parents[2]
PEAKS = {"full on 8": 38.6, "full": 78.1, "lora": 35.6, "qlora": 16.2, "offload": 10.8}
"""GiB per GPU, as docs/families.md and docs/memory.md have them."""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def predicted(folder, monkeypatch) -> list[str]:
    """Predictions of FLUX.1-dev's size, which take half a minute each, as written down; the forms that were asked."""
    asked = []

    def peaks(settings, wishes):
        policy = settings.model.policy.init_args
        form = "lora" if policy.get("adapter") else "full"
        form = "qlora" if policy.get("quantize") == "nf4" else form
        strategy = settings.trainer.strategy
        if not isinstance(strategy, str):
            form = "offload" if strategy.init_args.cpu_offload else f"full on {strategy.init_args.shard_size}"
        asked.append(form)
        return int(PEAKS[form] * GIB), 25 * GIB

    monkeypatch.setattr(forms, "peaks", peaks)
    monkeypatch.setattr(forms, "num_weights", lambda *_: 11.9e9)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return asked


def written(folder: Path, *options: str) -> Path:
    main(["init", "--output", "my.yaml", *options])
    return folder / "my.yaml"


def same(path: Path, files: list[str], **changes: object) -> bool:
    """Whether a file means what recipes mean, one upon the other, but for some settings of the trainer."""
    expected = read_config(*(str(RECIPES / f"{file}.yaml") for file in files))
    expected.trainer.default_root_dir = f"runs/{path.stem}"
    for name, value in changes.items():
        expected.trainer[name] = value
    found = read_config(str(path))
    return json.dumps(found.as_dict(), default=str) == json.dumps(expected.as_dict(), default=str)


@pytest.mark.parametrize(
    ("options", "files", "peak"),
    [
        (["--gpu_memory", "24GiB"], ["flux_srpo_qlora"], "16.2"),
        (["--gpu_memory", "48"], ["flux_srpo_lora"], "35.6"),
        (["--gpu_memory", "131GiB"], ["flux_srpo_1gpu"], "78.1"),
        (["--gpu_memory", "131GiB", "--method", "lora"], ["flux_srpo_lora"], "35.6"),
        (["--gpu_memory", "80GiB", "--gpus", "8"], ["flux_srpo"], "38.6"),
        (["--gpu_memory", "16GB"], ["flux_srpo_lora", "forms/host_offload"], "10.8"),
    ],
    ids=["24 GB", "48 GB", "141 GB", "141 GB, an adapter", "8 x 80 GB", "16 GB"],
)
def test_the_first_form_that_fits_is_written_as_its_recipe_has_it(predicted, folder, options, files, peak):
    path = written(folder, "--model", "flux_dev", *options)
    assert same(path, files)
    head = path.read_text().split("seed_everything")[0]
    assert f"predicted peak {peak} GiB per GPU" in head
    assert f"from {' and '.join(f'recipe:{file}' for file in files)}." in head
    assert max(map(len, path.read_text().splitlines())) < 140


def test_the_commands_that_are_told_take_a_path_with_spaces(predicted, folder, capsys):
    main(["init", "--model", "flux_dev", "--gpu_memory", "24GiB", "--output", "my own's.yaml"])
    head = (folder / "my own's.yaml").read_text().split("seed_everything")[0]
    told = [line.partition("srpo ")[2] for line in (capsys.readouterr().out + head).splitlines() if "--config" in line]
    assert len(told) == 4
    for command in told:
        assert shlex.split(command)[1:3] == ["--config", "my own's.yaml"]


def test_what_is_far_too_large_is_not_predicted(predicted, folder):
    """Weights alone say it: 66 GiB of them in full, and 22 GiB beside a LoRA."""
    written(folder, "--model", "flux_dev", "--gpu_memory", "24GiB")
    assert predicted == ["qlora"]


def test_another_model_prompts_and_number_of_gpus_are_put_in(predicted, folder):
    (folder / "mine.txt").write_text("\n".join(f"prompt {number}" for number in range(100)))
    (folder / "held.txt").write_text("\n".join(f"other {number}" for number in range(12)))
    path = written(
        folder, "--model", "Tongyi-MAI/Z-Image", "--gpu_memory", "24GiB", "--gpus", "4", "--train", "mine.txt",
        "--evaluation", "held.txt", "--method", "qlora", "--pretrained", "me/my-z-image",
    )  # fmt: skip
    settings = read_config(str(path))
    assert settings.model.policy.class_path == "srpo_lightning.policies.ZImagePolicy"
    assert settings.model.policy.init_args.pretrained == "me/my-z-image"
    assert settings.model.objective.init_args.rollout_guidance == 4.0
    assert (settings.data.train, settings.data.evaluation) == ("mine.txt", "held.txt")
    trainer = settings.trainer
    assert (trainer.devices, trainer.accumulate_grad_batches, trainer.val_check_interval) == (4, 8, 40)
    (tracking,) = (own.init_args for own in trainer.callbacks if own.class_path.endswith("RewardTracking"))
    assert list(tracking.candidates) == ["held.txt"]
    text = path.read_text()
    assert "# 4 GPUs x 1 prompt x 8; the paper's global batch is 32" in text
    assert "# into runs/my/lora, for diffusers" in text


def test_a_part_of_own_prompts_is_held_out_where_no_others_are_given(predicted, folder):
    (folder / "mine.txt").write_text("\n".join(f"prompt {number}" for number in range(100)))
    settings = read_config(str(written(folder, "--model", "flux_dev", "--gpu_memory", "24GiB", "--train", "mine.txt")))
    assert (settings.data.evaluation, settings.data.validation_fraction) == (None, 0.05)
    (tracking,) = (own.init_args for own in settings.trainer.callbacks if own.class_path.endswith("RewardTracking"))
    assert list(tracking.candidates) == ["mine.txt"]
    (folder / "many.txt").write_text("\n".join(f"prompt {number}" for number in range(3000)))
    many = written(folder, "--model", "flux_dev", "--gpu_memory", "24GiB", "--train", "many.txt", "--overwrite", "true")
    (tracking,) = (
        own.init_args for own in read_config(str(many)).trainer.callbacks if own.class_path.endswith("RewardTracking")
    )
    assert not tracking.candidates  # each is a text that the judge compares with every picture
    (folder / "few.txt").write_text("a\nb")
    with pytest.raises(SystemExit, match=r"validation_fraction 0.05 leaves 0 prompts to evaluate"):
        written(folder, "--model", "flux_dev", "--gpu_memory", "24GiB", "--train", "few.txt", "--overwrite", "true")


def test_another_reward_has_no_margin_of_the_recipes(predicted, folder):
    path = written(folder, "--model", "flux_dev", "--gpu_memory", "24GiB", "--reward", "PickScore")
    settings = read_config(str(path))
    assert settings.model.reward.class_path == "srpo_lightning.rewards.PickScore"
    assert settings.model.objective.init_args.margin == 10
    assert "convert" not in path.read_text()  # a comment on HPSv2's file


REFUSED = {
    "nothing fits": (["--gpu_memory", "8GiB"], r"flux_dev does not fit 8.0 GiB .*LoRA, weights in the machine's memory "
                     r"takes 10.8 GiB, so 12.8 GiB of GPU memory or more are needed; `recipes` lists smaller models"),
    "another method": (["--gpu_memory", "48GiB", "--method", "full"], r"trained as asked: all weights, .* takes more "
                       r"than 66.5 GiB; LoRA would fit, with 35.6 GiB: --method lora"),
    "the machine": (["--gpu_memory", "24GiB", "--host_memory", "16GiB"], r"flux_dev does not fit 16.0 GiB of the "
                    r"machine's memory, .* takes 10.8 GiB and 25.0 GiB of the machine, so 25.0 GiB of the machine's "
                    r"memory or more"),
    "both": (["--gpu_memory", "8GiB", "--host_memory", "16GiB"], r"does not fit 8.0 GiB of GPU memory with 2.0 GiB "
             r"kept free and 16.0 GiB of .*, so 12.8 GiB of GPU memory and 25.0 GiB of the machine's memory or more"),
    "no GPU": ([], r"gpu_memory is not said, and there is no GPU here: give --gpu_memory, such as 24GiB"),
    "a size": (["--gpu_memory", "lots"], r"'lots' is no size of memory: write it as 80GiB"),
    "a method": (["--gpu_memory", "24GiB", "--method", "qlroa"], r"method is qlroa: choose among auto, .*did you mean"),
    "prompts": (["--gpu_memory", "24GiB", "--train", "nowhere.txt"], r"nowhere.txt"),
    "a reward": (["--gpu_memory", "24GiB", "--reward", "HPSv4"], r"reward is HPSv4: choose among HPS.*did you mean"),
    "a class": (["--gpu_memory", "24GiB", "--reward", "nowhere.Reward"], r"reward is nowhere.Reward: there is no"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_line_and_nothing_is_written(predicted, folder, case, capsys):
    options, cure = REFUSED[case]
    refused(["init", "--model", "flux_dev", "--output", "my.yaml", *options], cure, capsys)
    assert not list(folder.glob("*.yaml*"))


def test_the_built_in_model_is_refused_by_the_larger_of_what_it_takes(folder, monkeypatch, capsys):
    monkeypatch.setattr(forms, "peaks", lambda *_: (1 * GIB, 900 * GIB))
    monkeypatch.setattr(forms, "machine_memory", lambda: 8 * GIB)
    refused(["init", "--model", "builtin"], "the built-in model takes 900.0 GiB, where 8.0 GiB are there", capsys)


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        ([], r"model is not said: give --model, one of builtin, flux_dev, "),
        (["--model", "flux_dve"], r"model is flux_dve: choose among builtin, .*did you mean flux_dev\?"),
        (["--model", "."], r"model is ., a folder: name its model .*, and give it as --pretrained"),
        (["--model", "builtin", "--method", "lora"], r"the built-in model is small and trained in full, --method full"),
    ],
)
def test_a_model_that_is_none_is_refused(predicted, folder, options, cure, capsys):
    refused(["init", *options], cure, capsys)


def test_the_built_in_model_is_for_a_laptop_and_a_file_that_is_there_stays(folder, capsys):
    """With the true prediction, and the true parser."""
    path = written(folder, "--model", "builtin")
    assert same(path, ["emoji_demo"])
    assert "predicted peak 0." in path.read_text()
    before = path.read_text()
    refused(["init", "--model", "builtin", "--output", "my.yaml"], "my.yaml is there already: give another", capsys)
    assert path.read_text() == before
    path.write_text("")
    written(folder, "--model", "builtin", "--overwrite", "true")
    assert path.read_text() == before


def test_a_folder_of_weights_is_predicted_by_its_own_shape(folder, models, capsys):
    """With the true prediction, of a model of a few thousand weights: all of them fit 4 GiB, with HPSv2 beside them."""
    path = written(folder, "--model", "flux_dev", "--pretrained", str(models.pipeline), "--gpu_memory", "16GiB",
                   "--method", "lora")  # fmt: skip
    assert same_but_pretrained(path, str(models.pipeline))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("my.yaml: LoRA, ")]
    assert 2 < float(line.split("peak ")[1].split()[0]) < 14


def same_but_pretrained(path: Path, pretrained: str) -> bool:
    text = path.read_text()
    assert f"pretrained: {pretrained} " in text
    path.write_text(text.replace(f"pretrained: {pretrained} ", "pretrained: black-forest-labs/FLUX.1-dev "))
    return same(path, ["flux_srpo_lora"])


@pytest.mark.parametrize("name", recipes())
def test_comments_stay_with_their_settings(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    again = commented(yaml.safe_load(text), comments_of(text))
    assert yaml.safe_load(again) == yaml.safe_load(text)
    assert comments_of(again) == comments_of(text)
    behind = [line for line in text.splitlines() if " #" in line and not line.lstrip().startswith("#")]
    assert len(comments_of(text)) == len(behind)


def test_every_family_can_be_named():
    families = {path.stem for path in (RECIPES / "families").glob("*.yaml")}
    assert models().keys() == {"builtin", "flux_dev", *families}


def test_on_a_terminal_it_asks_and_asks_again_after_an_answer_that_cannot_be_used(folder):
    """A pseudo-terminal: a typo, then the model; own prompts, of a file that is not there first; the rest by Enter."""
    (folder / "mine.txt").write_text("\n".join(f"thing {number}" for number in range(100)))
    told, answers = "", ["bulitin", "builtin", "nowhere.txt", "mine.txt", "", "laptop.yaml"]
    expected = [
        "Model (builtin, flux_dev",
        "did you mean builtin?",
        "Training prompts",
        "nowhere.txt",
        "Held-out prompts",
    ]
    terminal, other = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "srpo_lightning", "init"], stdin=other, stdout=other, stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}, cwd=folder,
    )  # fmt: skip
    os.close(other)
    try:
        while piece := read_piece(terminal):
            told += piece
            if told.rstrip(" ").endswith(("]:", ":")) and told.endswith(": ") and answers:
                os.write(terminal, f"{answers.pop(0)}\n".encode())
        assert process.wait(LIMIT_S) == 0, told
    finally:
        process.kill()
        os.close(terminal)
    assert not answers, told
    places = [told.index(text) for text in expected]
    assert places == sorted(places), told
    assert "train: srpo fit --config laptop.yaml" in told
    settings = read_config(str(folder / "laptop.yaml"))
    assert (settings.data.train, settings.data.validation_fraction) == ("mine.txt", 0.05)
    assert settings.trainer.default_root_dir == "runs/laptop"


def read_piece(terminal: int) -> str:
    """What the program has written; nothing when it has ended, which Linux tells as an error."""
    try:
        return os.read(terminal, 1 << 16).decode()
    except OSError:
        return ""
