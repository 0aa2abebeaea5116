"""`cache` that is killed and called again leaves what one that was never killed leaves."""

import json
import random
import signal
import time
from functools import partial
from pathlib import Path

import torch

from srpo_lightning import cli
from srpo_lightning.data import features
from srpo_lightning.jobs.cache import read_data
from tests import processes, tiny

NUM_PROMPTS = 60
NUM_KILLS = 8


def in_small_files(seconds: float | None, clock: Path) -> None:
    """Two prompts in each; end at any instruction after that much processor time, or write down how much it took."""
    features.per_file = lambda item_bytes: 2
    run, start_s = cli.run_job, time.process_time()

    def timed(*args) -> None:
        if seconds is not None:
            signal.setitimer(signal.ITIMER_PROF, seconds)
        run(*args)
        clock.write_text(str(time.process_time() - start_s))

    cli.run_job = timed


def encoded(config: Path) -> dict[str, torch.Tensor]:
    data = read_data(str(config))
    data.cache.open()
    return {text: data.cache[text]["prompt_embeds"] for text in data.selection.texts}


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix != ".parquet"}


def test_a_cache_killed_at_random_moments_and_called_again_is_the_one_that_was_not(models, tmp_path):
    prompts, clock, chance = tmp_path / "many.txt", tmp_path / "clock", random.Random(0)
    prompts.write_text("\n".join(f"a{i} b" for i in range(NUM_PROMPTS)))

    def cache(name: str, seconds: float | None) -> int:
        config = tmp_path / f"{name}.json"
        settings = tiny.config(models._replace(train=prompts), tmp_path / "run", tmp_path / name)
        config.write_text(json.dumps(settings))
        log, before = tmp_path / f"{name}.log", partial(in_small_files, seconds, clock)
        process = processes.launch(["cache", "--config", str(config)], log, before=before)
        process.join()
        assert process.exitcode in (0, -signal.SIGPROF), log.read_text()
        return process.exitcode

    assert cache("whole", None) == 0
    total_s, kills, number = float(clock.read_text()), 0, 0
    while kills < NUM_KILLS:
        number += 1
        while kills < NUM_KILLS and cache(f"killed-{number}", chance.uniform(1e-4, total_s)) != 0:
            kills += 1
        assert cache(f"killed-{number}", None) == 0
        whole, killed = (encoded(tmp_path / f"{name}.json") for name in ("whole", f"killed-{number}"))
        assert whole.keys() == killed.keys()
        assert all(torch.equal(whole[text], killed[text]) for text in whole)
        assert names(tmp_path / "whole") == names(tmp_path / f"killed-{number}")
