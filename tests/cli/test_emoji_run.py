"""The configurations of the built-in models, started as a user starts it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from srpo_lightning.evaluation.pictures import LABEL_PX
from tests.processes import LIMIT_S, Done, start

REPOSITORY = Path(__file__).parents[2]


def as_a_user(arguments: list[str]) -> Done:
    """By a program that starts from nothing, and warns of nothing."""
    done = run_program(*arguments)
    assert "Warning" not in done.stderr, done.stderr
    return Done(done.returncode, done.stdout + done.stderr)


def run_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "srpo_lightning", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=LIMIT_S)


@pytest.mark.parametrize(
    ("config", "start"), [("emoji_srpo", start), ("emoji_demo", as_a_user), ("moving_demo", start)]
)
def test_the_built_in_configurations_train_two_steps_and_report(config, start, tmp_path):
    run = tmp_path / "run"
    flags = {
        "--trainer.default_root_dir": run,
        "--trainer.max_steps": 2,
        "--trainer.val_check_interval": 2,
        "--data.cache_dir": tmp_path / "features",
        "--data.num_eval_prompts": 4,
        "--data.eval_samples_per_prompt": 1,
        "--data.batch_size": 2,
        "--model.num_sample_steps": 2,
        "--model.objective.init_args.num_rollout_steps": 2,
    }
    words = [str(part) for flag in flags.items() for part in flag]
    done = start(["fit", "--config", f"configs/{config}.yaml", *words])
    assert done.returncode == 0, done.output
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {record["step"] for record in records} == {0, 2}
    assert (run / "checkpoints" / "step-00000002.ckpt").is_file()
    with Image.open(run / "before_after.png") as sheet:
        assert sheet.height == LABEL_PX + 3 * (2 * 64 + LABEL_PX)  # prompts over three rows with a name each
    assert (run / "before_after.webp").is_file() == (config == "moving_demo")
    assert "seconds per step" in done.output


def test_a_mistake_ends_with_one_line_and_status_1():
    done = run_program("fit", "--trainer.max_stepps", "2")
    assert done.returncode == 1
    assert "max_stepps" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
