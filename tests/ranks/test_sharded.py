"""FSDP2 on gloo ranks on the CPU: the same run on 1, 2 and 4 ranks, resumed on another number, killed, evaluated.

Each run is a program of its own. A step's four samples are divided over the ranks, so that every run has the same ones.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from srpo_lightning.checkpoints import checkpoint_path, checkpoints
from tests import tiny

REPOSITORY = Path(__file__).parents[2]
SAMPLES = 4


def config(models, features, run: Path, ranks: int, **trainer) -> Path:
    settings = tiny.config(models, run, features)
    settings["data"] |= {"batch_size": SAMPLES // ranks, "eval_batch_size": 1}
    settings["model"]["objective"]["init_args"]["shared_noise"] = False
    settings["trainer"] |= {"devices": ranks, "callbacks": settings["trainer"]["callbacks"][:1]} | trainer
    settings["trainer"] |= {"num_sanity_val_steps": 0, "val_check_interval": 4}
    if ranks > 1:
        settings["trainer"].setdefault("strategy", sharded(ranks))
    path = run.with_suffix(".yaml")
    path.write_text(json.dumps(settings))
    return path


def sharded(shard_size: int, **settings) -> dict:
    return {
        "class_path": "srpo_lightning.strategies.ShardedStrategy",
        "init_args": {"shard_size": shard_size} | settings,
    }


def start(config: Path, *arguments: str, command: str = "fit") -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "srpo_lightning", command, "--config", str(config), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240)


def fit(config: Path, *arguments: str) -> None:
    done = start(config, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def whole(run: Path, step: int) -> dict:
    """A checkpoint's weights and averages, of a file or of a sharded folder."""
    path = checkpoint_path(run, step)
    if path.is_dir():
        dcp_to_torch_save(path, path.with_suffix(".whole"))
        path = path.with_suffix(".whole")
    return torch.load(path, weights_only=True)


def assert_close(ours: dict, theirs: dict) -> None:
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for kind in ("state_dict", "ema"):
        for name, tensor in theirs[kind].items():
            torch.testing.assert_close(ours[kind][name], tensor, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def single(models, features, folder) -> dict:
    """Four steps in one process without a strategy."""
    fit(config(models, features, folder / "single", 1))
    return whole(folder / "single", 4)


@pytest.fixture(scope="module")
def two(models, features, folder) -> Path:
    """Two steps of the same run on two ranks, and their two checkpoints."""
    fit(config(models, features, folder / "two", 2), "--trainer.max_steps", "2")
    return folder / "two"


def test_a_run_on_two_ranks_goes_on_to_the_weights_of_one_process(models, features, two, single):
    path = config(models, features, two, 2)
    fit(path, "--ckpt_path", "last")
    assert [p.name for p in checkpoints(two)] == ["step-00000002.ckpt", "step-00000004.ckpt"]
    assert not list(two.rglob("*.partial"))
    assert_close(whole(two, 4), single)
