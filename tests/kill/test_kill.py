"""A run that is killed and resumed is the run that was never killed."""

import json
import random
import time
from pathlib import Path

import torch

from srpo_lightning.checkpoints import checkpoint_path, checkpoints
from srpo_lightning.cli import main
from tests import processes, tiny

NUM_STEPS = 40
NUM_KILLS = 2


def write_config(models, run: Path, features: Path) -> Path:
    settings = tiny.config(models, run, features)
    settings["trainer"] |= {"max_steps": NUM_STEPS, "accumulate_grad_batches": 2, "val_check_interval": 16}
    settings["trainer"]["callbacks"].append(
        {"class_path": "tests.faults.PromptLog", "init_args": {"path": str(run.with_suffix(".jsonl"))}}
    )
    path = run.with_suffix(".json")
    path.write_text(json.dumps(settings))
    return path


def kill_after_a_checkpoint(config: Path, run: Path, delay_s: float, *flags: str) -> None:
    """Start the run in a process of its own and SIGKILL it `delay_s` after its next checkpoint."""
    before = set(checkpoints(run))
    process = processes.launch(["fit", "--config", str(config), *flags], run.with_suffix(".log"))
    try:
        deadline = time.monotonic() + 120
        while not set(checkpoints(run)) - before:
            assert process.is_alive(), run.with_suffix(".log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(delay_s)
        assert process.is_alive(), "the run ended before it could be killed"
    finally:
        process.kill()
        process.join()


def assert_equal(a: object, b: object, where: str = "") -> None:
    """Bit for bit, through dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def prompts_by_step(path: Path) -> dict[int, list[str]]:
    """The last word on each micro-batch; one that was done twice must have had the same prompts twice."""
    seen: dict[int, list[str]] = {}
    for line in path.read_text().splitlines():
        step, prompts = json.loads(line)
        assert seen.setdefault(step, prompts) == prompts, step
    return seen


def test_a_killed_and_resumed_run_ends_with_the_same_state_bit_for_bit(models, features, tmp_path):
    """Weights, average, optimizer and counters after SIGKILL at random moments, and the same prompts on the way."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main(["fit", "--config", str(write_config(models, whole, features))])
    config, chance, flags = write_config(models, killed, features), random.Random(0), ()
    for _ in range(NUM_KILLS):
        kill_after_a_checkpoint(config, killed, chance.uniform(0, 0.4), *flags)
        flags = ("--ckpt_path", "last")
    assert checkpoints(killed)[-1].stem < checkpoint_path(killed, NUM_STEPS).stem
    main(["fit", "--config", str(config), *flags])
    a, b = (torch.load(checkpoint_path(run, NUM_STEPS), weights_only=True) for run in (whole, killed))
    for part in ("state_dict", "optimizer_states", "callbacks", "srpo", "PromptData", "global_step"):
        assert_equal(a[part], b[part], part)
    assert any(key.startswith("EMA") for key in a["callbacks"])
    expected = prompts_by_step(whole.with_suffix(".jsonl"))
    assert expected.keys() == set(range(2 * NUM_STEPS))
    assert prompts_by_step(killed.with_suffix(".jsonl")) == expected
