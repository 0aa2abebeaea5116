"""Two gloo processes on the CPU, always started as a program: Lightning's launcher runs `sys.argv` again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from srpo_lightning.run_folder import RunFolder
from tests import tiny
from tests.processes import LIMIT_S

REPOSITORY = Path(__file__).parents[2]

PROGRAM = """
import json, os, sys
from srpo_lightning.cli import main
from srpo_lightning.draws import Draws
from srpo_lightning.objectives import SRPO

rollout = SRPO.rollout
def record(self, policy, conditions, draws):
    result = rollout(self, policy, conditions, draws)
    with open(f"{sys.argv[-1]}/rank{draws.rank}.jsonl", "a") as stream:
        stream.write(json.dumps([draws.step, float(result.noise.double().sum()), conditions.prompts]) + "\\n")
    return result
SRPO.rollout = record
main(sys.argv[1:-1])
"""


@pytest.fixture(scope="module")
def finished(models, features, tmp_path_factory) -> Path:
    """The folder of a run of four steps on two ranks, one prompt each; each rank's records lie beside it."""
    folder = tmp_path_factory.mktemp("ranks")
    settings = tiny.config(models, folder / "run", features)
    settings["data"]["batch_size"] = 1
    settings["trainer"] |= {"devices": 2, "strategy": "ddp"}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(folder / "program.py"), "fit", "--config", str(folder / "config.json"), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def records(folder: Path, rank: int) -> list:
    return [json.loads(line) for line in (folder / f"rank{rank}.jsonl").read_text().splitlines()]


def test_both_ranks_draw_the_same_noise_for_different_prompts(finished):
    zero, one = records(finished, 0), records(finished, 1)
    assert [step for step, _, _ in zero] == [step for step, _, _ in one] == [0, 1, 2, 3]
    assert [noise for _, noise, _ in zero] == [noise for _, noise, _ in one]
    assert all(a != b for (_, _, a), (_, _, b) in zip(zero, one, strict=True))


def test_the_run_is_logged_and_saved_once(finished):
    run = finished / "run"
    assert [path.name for path in RunFolder(run).checkpoints()] == ["step-00000002.ckpt", "step-00000004.ckpt"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["weights"]) for r in lines] == [
        (0, "policy"), (2, "policy"), (2, "ema"), (4, "policy"), (4, "ema"),
    ]  # fmt: skip


def test_every_picture_is_drawn_and_described_once(finished):
    samples = finished / "run" / "samples"
    described = [json.loads(line)["file"] for line in (samples / "metadata.jsonl").read_text().splitlines()]
    assert sorted(described) == sorted(path.relative_to(samples).as_posix() for path in samples.rglob("*.png"))
    assert len(list((samples / "step-00000004" / "policy").iterdir())) == 3


def test_the_checkpoint_counts_the_steps_of_a_rank_and_holds_finite_weights(finished):
    saved = torch.load(RunFolder(finished / "run").checkpoint(4), weights_only=True)
    assert saved["srpo"]["micro_step"] == saved["PromptData"]["num_batches"] == 4
    assert all(weights.isfinite().all() for weights in saved["state_dict"].values())
