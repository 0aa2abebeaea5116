"""A run that is killed and resumed leaves what one that was never killed leaves: every file, bit for bit."""

import json
import random
import signal
import time
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from srpo_lightning.run_folder import RunFolder
from tests import processes, tiny
from tests.report.made_up import content_of

NUM_STEPS = 8
NUM_KILLS = 20
AT_THE_START = 0.15  # of the kills are before the run begins: while settings are read and models built
SHARE = 0.4  # of a run at most between its kills: most go on after several
PARTS = ("state_dict", "optimizer_states", "ema", "callbacks", "srpo", "PromptData", "global_step", "evaluation_due")


def write_config(models, run: Path, features: Path) -> Path:
    """Evaluations after steps 4 and 8, checkpoints after every second; in a step there are two micro-batches."""
    settings = tiny.config(models, run, features)
    settings["trainer"] |= {"max_steps": NUM_STEPS, "accumulate_grad_batches": 2, "val_check_interval": 8}
    guard = {"class_path": "srpo_lightning.callbacks.OverOptimizationGuard", "init_args": {"action": "warn"}}
    log = {"class_path": "tests.faults.PromptLog", "init_args": {"path": str(run.with_suffix(".jsonl"))}}
    settings["trainer"]["callbacks"] += [guard, log]
    path = run.with_suffix(".json")
    path.write_text(json.dumps(settings))
    return path


def start_clock(path: Path) -> None:
    """Have this process write down the processor time until its run begins, and that of the run."""
    run, start_s = Trainer._run_stage, time.process_time()

    def timed(trainer):
        begun_s = time.process_time()
        run(trainer)
        path.write_text(json.dumps([begun_s - start_s, time.process_time() - begun_s]))

    Trainer._run_stage = timed


def end_after(seconds: float, is_at_start: bool) -> None:
    """Have this process end at any instruction, no handler being asked, as by SIGKILL, after that much processor time.

    So it matters to no machine how busy it is.
    """
    run = Trainer._run_stage

    def begin(trainer):
        signal.setitimer(signal.ITIMER_PROF, seconds)
        return run(trainer)

    if is_at_start:
        signal.setitimer(signal.ITIMER_PROF, seconds)
    else:
        Trainer._run_stage = begin


def fit(config: Path, run: Path, before) -> int:
    """How the next part of a run ends."""
    resumed = ["--ckpt_path", "last"] if RunFolder(run).checkpoints() else []
    process = processes.launch(["fit", "--config", str(config), *resumed], run.with_suffix(".log"), before=before)
    process.join()
    assert process.exitcode in (0, -signal.SIGPROF), run.with_suffix(".log").read_text()[-5000:]
    return process.exitcode


def content(run: Path) -> dict[str, bytes]:
    """All files of a run but those that say when, where and how long, and the checkpoints, which are archives."""
    files = [path for path in run.rglob("*") if path.is_file() and "logs" not in path.parts]
    names = {path: path.relative_to(run).as_posix() for path in files}
    own = {name: path.read_bytes() for path, name in names.items() if path.suffix not in (".ckpt", ".yaml", ".md")}
    own |= {"recipe.json": b""}
    if RunFolder(run).page.is_file():
        shown = content_of(RunFolder(run).page.read_text())
        parts = {part: shown[part] for part in ("findings", "last", "samples", "grid", "advice")}
        own |= {"report.html": json.dumps(parts).encode()}
    return own | {path.name: b"" for path in RunFolder(run).checkpoints()}


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
    for line in path.read_text().split("\n"):
        try:
            step, prompts = json.loads(line)
        except ValueError:  # the log itself was cut by a kill
            continue
        assert seen.setdefault(step, prompts) == prompts, step
    return seen


def assert_same_end(whole: Path, killed: Path) -> None:
    a, b = content(whole), content(killed)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name]] == []
    for path in RunFolder(whole).checkpoints():
        step = int(path.stem.removeprefix("step-"))
        saved, other = (torch.load(RunFolder(run).checkpoint(step), weights_only=True) for run in (whole, killed))
        for part in PARTS:
            assert_equal(saved[part], other[part], f"{path.name}: {part}")
    assert prompts_by_step(killed.with_suffix(".jsonl")) == prompts_by_step(whole.with_suffix(".jsonl"))


def test_runs_killed_at_twenty_moments_end_like_the_one_that_was_not(models, features, tmp_path):
    """In training, evaluation, saving, or before; runs are begun until there were so many kills, and each goes on."""
    whole, clock, chance = tmp_path / "whole", tmp_path / "clock", random.Random(0)
    assert fit(write_config(models, whole, features), whole, partial(start_clock, clock)) == 0
    start_s, run_s = json.loads(clock.read_text())
    seconds = {True: start_s, False: SHARE * run_s}
    kills = runs = 0
    while kills < NUM_KILLS:
        runs += 1
        killed = tmp_path / f"killed-{runs}"
        config = write_config(models, killed, features)
        while kills < NUM_KILLS:
            is_at_start = chance.random() < AT_THE_START
            end = partial(end_after, chance.uniform(1e-4, seconds[is_at_start]), is_at_start)
            if fit(config, killed, end) == 0:
                break
            kills += 1
        else:
            assert fit(config, killed, None) == 0
        assert_same_end(whole, killed)
