"""The pages for beginners are followed command by command, small; what their runs write is what the docs list."""

import re
from pathlib import Path

import pytest

from srpo_lightning.cli import main
from srpo_lightning.run_folder import RunFolder
from tests.docs.snippets import REPOSITORY, Command, blocks, commands
from tests.test_run_folder import NAMES

DOCS = REPOSITORY / "docs"
SMALL = {
    "--trainer.val_check_interval": 1,
    "--trainer.enable_progress_bar": "false",
    "--checkpoint.every_n_steps": 1,
    "--data.num_eval_prompts": 4,
    "--data.eval_samples_per_prompt": 1,
    "--data.batch_size": 2,
    "--model.num_sample_steps": 2,
}
"""Settings that shrink a recipe of the built-in model, beside its steps."""

MOVING = "step-NNNNNNNN/WEIGHTS/NNNNN.webp"
OF_CLIPS = {"before_after.webp", f"samples/{MOVING}", f"predictions/{MOVING}"}
IDS = {"wandb_id", "mlflow_id", "trackio_id"}
ELSEWHERE = {
    "checkpoints/set_aside_*/*",
    "run.lock",
    "guard.jsonl",
    "lora/step-NNNNNNNN/*.safetensors",
    "fast_dev_run/*",
    *IDS,
    *OF_CLIPS,
}
"""Files that the run of the first page does not leave."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkout in which both pages are followed, one after the other."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "srpo_lightning"):
        (folder / name).symlink_to(REPOSITORY / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setattr("sys.argv", ["srpo_lightning"])
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        yield folder


def follow(page: str, folder: Path) -> list[Command]:
    """Write the page's files, and run its commands of this project."""
    found = blocks(DOCS / page)
    for block in found:
        if block.file:
            (folder / block.file).write_text(block.text)
    done = [command for block in found if block.kind == "shell" for command in commands(block) if command.ours]
    for command in done:
        main(made_small(command.ours))
    return done


def made_small(words: list[str]) -> list[str]:
    """A command that trains, with few steps of few samples; any other as it is."""
    if words[0] != "fit":
        return words
    settings = SMALL | {"--trainer.max_steps": 3 if "--ckpt_path" in words else 2}
    if "my_reward.yaml" not in words:
        settings["--model.objective.init_args.num_rollout_steps"] = 2
    return words + [str(word) for setting in settings.items() for word in setting]


@pytest.fixture(scope="module")
def laptop(folder):
    """The run of the first page."""
    follow("start_laptop.md", folder)
    return folder / "runs" / "emoji_demo"


def test_the_first_page_trains_resumes_measures_draws_and_exports(laptop, folder):
    run = RunFolder(laptop)
    assert [path.stem for path in run.checkpoints()][-1] == "step-00000003"
    assert len(run.predictions.pictures()) > 0
    assert "diffusers" in (folder / "my-model" / "README.md").read_text()


def patterns() -> dict[str, re.Pattern[str]]:
    """The files that docs/run_folder.md lists, by their names there."""
    names = re.findall(r"^\| `([^`]+)` \|", (DOCS / "run_folder.md").read_text(), re.MULTILINE)
    words = {"NNNNNNNN": r"\d{8}", "NNNNN": r"\d{5}", "WEIGHTS": "(base|policy|ema)", r"\*": ".*"}
    return {name: re.compile(_translated(re.escape(name), words)) for name in names}


def _translated(text: str, words: dict[str, str]) -> str:
    for word, pattern in words.items():
        text = text.replace(word, pattern)
    return text


def test_every_file_of_a_run_is_listed_and_every_file_that_is_listed_is_there(laptop):
    files = {str(path.relative_to(laptop)) for path in laptop.rglob("*") if path.is_file()}
    known = patterns()
    assert {file for file in files if not any(own.fullmatch(file) for own in known.values())} == set()
    unmet = {name for name, own in known.items() if not any(own.fullmatch(file) for file in files)}
    assert unmet == ELSEWHERE


def test_every_name_of_a_run_folder_is_listed():
    listed = patterns()
    for name in NAMES:
        file = name.removeprefix("run/")
        assert any(
            own.match(file) or known.startswith(re.sub(r"\d{8}", "NNNNNNNN", file)) for known, own in listed.items()
        ), file


def test_the_page_about_own_data_trains_on_own_prompts_and_by_an_own_reward(folder, capsys):
    follow("start_own_data.md", folder)
    assert RunFolder(folder / "runs" / "own_prompts").read_prompts() == ["sailboat", "owl", "umbrella", "fox"]
    assert RunFolder(folder / "runs" / "own_reward").checkpoints()
    said = capsys.readouterr().out
    assert "of the gradient is in all texts alike" in said
    assert "3d/flat" in said
