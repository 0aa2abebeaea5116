"""Ranks that see other things, die or freeze: all end, soon, and each with one line that says what it was."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from srpo_lightning.policies import FluxPolicy
from srpo_lightning.run_folder import RunFolder
from tests import processes, tiny
from tests.ranks.test_sharded import sharded

AGREEMENT = "error: rank 1 differs from rank 0 in the "


def write(models, features, run: Path, strategy="ddp", **trainer) -> Path:
    """Two ranks without callbacks."""
    settings = tiny.config(models, run, features)
    settings["trainer"] |= {"devices": 2, "strategy": strategy, "callbacks": [], "limit_val_batches": 0} | trainer
    path = run.with_suffix(".json")
    path.write_text(json.dumps(settings))
    return path


def only_rank_1_reads_on() -> None:
    """What follows on the command line after RANK1 is for that rank."""
    place = sys.argv.index("RANK1")
    own = sys.argv[place + 1 :]
    sys.argv[place:] = own if os.environ["RANK"] == "1" else []


def rank_1_reads_other_weights() -> None:
    is_vae = "VAE" in sys.argv
    if os.environ["RANK"] == "1":
        load = FluxPolicy.load

        def altered(self, *args) -> None:
            load(self, *args)
            with torch.no_grad():
                next(self.vae.parameters() if is_vae else self.transformer.parameters()).add_(1e-6)

        FluxPolicy.load = altered
    sys.argv = [word for word in sys.argv if word != "VAE"]


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["--data.train", "other.txt"], r"training prompts: 1 of them .* instead of 7 of them"),
        (["--data.evaluation", "other.txt"], r"evaluation prompts: 1 of them .* instead of 3 of them"),
        (["--model.objective.init_args.margin", "0.5"], r"model.objective.init_args.margin: 0.5 instead of 0.7; start"),
    ],
    ids=["training", "evaluation", "margin"],
)
def test_what_a_rank_alone_has_been_told_ends_both(models, features, tmp_path, settings, line):
    (tmp_path / "other.txt").write_text("a0 b\n")
    own = [str(tmp_path / word) if word == "other.txt" else word for word in settings]
    config = write(models, features, tmp_path / "run")
    done = processes.start(["fit", "--config", str(config), "RANK1", *own], 2, only_rank_1_reads_on)
    refused(done, line)
    assert not RunFolder(tmp_path / "run").checkpoint(2).exists()


def refused(done: processes.Done, line: str) -> None:
    """Both ranks with the same line, and without a trace."""
    assert done.returncode == 1, done.output
    found = errors(done.output)
    assert len(found) == 2, done.output
    assert found[0] == found[1]
    assert found[0].startswith(AGREEMENT)
    assert re.search(line, found[0]), found[0]
    assert "Traceback" not in done.output


@pytest.mark.parametrize("there", [[2], [], [2, 4]], ids=["older", "none", "of another run"])
def test_another_newest_checkpoint_on_one_rank_ends_both(models, features, tmp_path, finished_run, there):
    here, other = tmp_path / "here", tmp_path / "there"
    config = write(models, features, here, max_steps=6)
    for folder, steps in ((here, [2, 4]), (other, there)):
        for step in steps:
            RunFolder(folder).checkpoint(step).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(RunFolder(finished_run).checkpoint(step), RunFolder(folder).checkpoint(step))
    if there == [2, 4]:
        path = RunFolder(other).checkpoint(4)
        content = torch.load(path, weights_only=True)
        next(iter(content["state_dict"].values())).add_(1e-6)
        torch.save(content, path)
    own = ["--trainer.default_root_dir", str(other)]
    arguments = ["fit", "--config", str(config), "--ckpt_path", "last", "RANK1", *own]
    found = {2: "step-00000002.ckpt", 0: "--ckpt_path last: no checkpoint in", 4: "step-00000004.ckpt"}[
        max(there, default=0)
    ]
    refused(
        processes.start(arguments, 2, only_rank_1_reads_on),
        rf"checkpoint to go on from: {found}.* instead of step-00000004.ckpt .*see the same run folder",
    )


@pytest.mark.parametrize(
    ("strategy", "part", "name"),
    [
        ("ddp", [], "trained weights: a sum of"),
        (sharded(1, replicate_size=2), [], "trained weights, of which each has a part: a sum of"),
        (sharded(2), ["VAE"], "frozen weights of the policy: a sum of"),
    ],
    ids=["ddp", "replicated", "frozen"],
)
def test_other_weights_on_one_rank_end_both(models, features, tmp_path, strategy, part, name):
    config = write(models, features, tmp_path / "run", strategy)
    done = processes.start(["fit", "--config", str(config), *part], 2, rank_1_reads_other_weights)
    refused(done, name)


STRATEGIES = {
    "ddp": {
        "class_path": "srpo_lightning.training.strategies.ReplicatedStrategy",
        "init_args": {"timeout_minutes": 0.1},
    },
    "sharded": sharded(2, timeout_minutes=0.1),
}


@pytest.mark.parametrize(
    ("number", "strategy"),
    [(signal.SIGSTOP, "ddp"), (signal.SIGSTOP, "sharded"), (signal.SIGKILL, "sharded")],
    ids=["frozen", "frozen, sharded", "dead"],
)
def test_a_rank_that_freezes_or_dies_ends_the_other_in_the_time_that_was_set(
    models, features, tmp_path, number, strategy
):
    strike = {"class_path": "tests.faults.Terminate", "init_args": {"after": 2, "rank": 1, "number": int(number)}}
    config = write(models, features, tmp_path / "run", STRATEGIES[strategy], callbacks=[strike])
    output = outlived(["fit", "--config", str(config)], tmp_path, num_started=2)
    (line,) = errors(output)
    assert "another rank has ended, or has not answered" in line
    assert "Traceback" not in output


def test_a_rank_that_never_comes_ends_the_other_in_the_time_that_was_set(models, features, tmp_path):
    config = write(models, features, tmp_path / "run", STRATEGIES["ddp"])
    output = outlived(["fit", "--config", str(config)], tmp_path, num_started=1)
    (line,) = errors(output)
    assert "another rank has ended, or has not answered" in line


def outlived(arguments: list[str], folder: Path, num_started: int) -> str:
    """What rank 0 printed, of two, which ends by itself."""
    together = processes.torchrun(2)
    logs = [folder / f"{rank}.log" for rank in range(num_started)]
    ranks = [
        processes.launch(arguments, log, together | {"RANK": str(i), "LOCAL_RANK": str(i)})
        for i, log in enumerate(logs)
    ]
    try:
        ranks[0].join(processes.LIMIT_S)
        assert ranks[0].exitcode == 1, logs[0].read_text()
    finally:
        for rank in ranks:
            rank.kill()
    return logs[0].read_text()
