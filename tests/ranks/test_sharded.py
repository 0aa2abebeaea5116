"""FSDP2 on gloo ranks on the CPU: the same run on 1, 2 and 4 ranks, resumed on another number, killed, evaluated.

Each run is a program of its own. A step's four samples are divided over the ranks, so that every run has the same ones.
"""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from srpo_lightning.run_folder import RunFolder
from srpo_lightning.training import strategies
from tests import processes, tiny
from tests.processes import Done

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
        "class_path": "srpo_lightning.training.strategies.ShardedStrategy",
        "init_args": {"shard_size": shard_size} | settings,
    }


def start(config: Path, *arguments: str, command: str = "fit", before: Callable[[], None] | None = None) -> Done:
    num_ranks = json.loads(config.read_text())["trainer"]["devices"]
    return processes.start([command, "--config", str(config), *arguments], num_ranks, before)


def fit(config: Path, *arguments: str) -> None:
    done = start(config, *arguments)
    assert done.returncode == 0, done.output


def whole(run: Path, step: int) -> dict:
    """A checkpoint's weights and averages, of a file or of a sharded folder."""
    path = RunFolder(run).checkpoint(step)
    if path.is_dir():
        dcp_to_torch_save(path, path.with_suffix(".whole"))
        path = path.with_suffix(".whole")
    return torch.load(path, weights_only=True)


def assert_close(ours: dict, theirs: dict) -> None:
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for kind in ("state_dict", "ema"):
        for name, tensor in theirs[kind].items():
            torch.testing.assert_close(ours[kind][name], tensor, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def die_while_saving() -> None:
    """Let the second checkpoint kill each rank after its part of it."""
    save, calls = strategies.save, []

    def dying(state, checkpoint_id):
        save(state, checkpoint_id=checkpoint_id)
        calls.append(checkpoint_id)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    strategies.save = dying


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
    assert [p.name for p in RunFolder(two).checkpoints()] == ["step-00000002.ckpt", "step-00000004.ckpt"]
    assert not list(two.rglob("*.partial*"))
    assert_close(whole(two, 4), single)


def test_a_sharded_run_goes_on_in_one_process(models, features, folder, two, single):
    shutil.copytree(two, folder / "gathered")
    path = config(models, features, folder / "gathered", 1)
    fit(path, "--ckpt_path", str(RunFolder(folder / "gathered").checkpoint(2)))
    assert_close(whole(folder / "gathered", 4), single)


def test_a_run_of_one_process_goes_on_sharded_and_replicated_on_four_ranks(models, features, folder, single):
    """Hybrid sharding: two copies of two halves."""
    run = folder / "hybrid"
    fit(config(models, features, run, 1), "--trainer.max_steps", "2")
    fit(config(models, features, run, 4, strategy=sharded(2, replicate_size=2)), "--ckpt_path", "last")
    assert_close(whole(run, 4), single)


def test_sigterm_on_one_rank_lets_all_finish_the_step_save_and_leave(models, features, folder, single):
    run = folder / "terminated"
    terminate = {"class_path": "tests.faults.Terminate", "init_args": {"after": 2, "rank": 1}}
    path = config(models, features, run, 2)
    settings = json.loads(path.read_text())
    settings["checkpoint"]["every_n_steps"] = 100
    stopping = json.loads(json.dumps(settings))
    stopping["trainer"]["callbacks"].append(terminate)
    path.write_text(json.dumps(stopping))
    done = start(path)
    assert done.returncode == 143, done.output
    assert [p.name for p in RunFolder(run).checkpoints()] == ["step-00000002.ckpt"]
    path.write_text(json.dumps(settings))
    fit(path, "--ckpt_path", "last")
    assert_close(whole(run, 4), single)


def test_ranks_killed_while_they_save_leave_the_checkpoint_before(models, features, folder, single):
    run = folder / "killed"
    path = config(models, features, run, 2)
    died = start(path, before=die_while_saving)
    assert died.returncode == -signal.SIGKILL
    assert [p.name for p in RunFolder(run).checkpoints()] == ["step-00000002.ckpt"]
    (unfinished,) = (run / "checkpoints").glob("step-00000004.ckpt.partial-*")
    assert unfinished.is_dir()
    fit(path, "--ckpt_path", "last")
    assert_close(whole(run, 4), single)
    assert not list(run.rglob("*.partial*"))


def fill_the_disk_once() -> None:
    """The first rank finds no room for what it writes last of its first checkpoint."""
    finish, calls = strategies.finish_folder, []

    def full(*args) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finish(*args)

    strategies.finish_folder = full


def test_ranks_of_which_one_finds_no_room_go_on_together_without_that_checkpoint(models, features, folder, single):
    run = folder / "full"
    done = start(config(models, features, run, 2), before=fill_the_disk_once)
    assert done.returncode == 0, done.output
    assert "training goes on without a checkpoint of step 2: the disk is full" in done.output
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004.ckpt"]
    assert_close(whole(run, 4), single)


def test_with_parameters_in_host_memory_the_run_is_the_same(models, features, folder, single):
    run = folder / "offloaded"
    fit(config(models, features, run, 2, strategy=sharded(2, cpu_offload=True)))
    assert_close(whole(run, 4), single)


def test_bfloat16_parameters_travel_and_float32_masters_are_saved(models, features, folder, two, single):
    run = folder / "mixed"
    fit(config(models, features, run, 2, precision="bf16-mixed"))
    mixed = whole(run, 4)
    assert {tensor.dtype for tensor in mixed["state_dict"].values()} == {torch.float32}
    distances = [(mixed["state_dict"][name] - tensor).norm() for name, tensor in single["state_dict"].items()]
    assert 0 < sum(distances) / sum(tensor.norm() for tensor in single["state_dict"].values()) < 0.05


def test_evaluation_on_two_ranks_reads_weights_and_average(models, features, two):
    path = config(models, features, two, 2)
    settings = tiny.config(models, two, features)["trainer"]["callbacks"]
    evaluated = json.loads(path.read_text())
    evaluated["trainer"]["callbacks"] = settings[:3]
    path.write_text(json.dumps(evaluated))
    done = start(path, "--ckpt_path", str(RunFolder(two).checkpoint(2)), command="validate")
    assert done.returncode == 0, done.output
    records = RunFolder(two / "validation").read_metrics()
    assert [(r["step"], r["weights"]) for r in records] == [(2, "policy"), (2, "ema")]
    assert records[-1]["reward"] != records[-2]["reward"]


def test_sizes_that_do_not_make_the_number_of_ranks_are_refused(models, features, folder):
    done = start(config(models, features, folder / "refused", 2, strategy=sharded(4)))
    assert done.returncode != 0
    assert "shard_size 4 x replicate_size 1 is not the number of ranks, 2: set their product to it" in done.output


def test_a_checkpoint_of_another_policy_is_refused_before_its_tensors_are_read(models, features, two, tmp_path):
    wider = tiny.write_pipeline(tmp_path / "wider", width=24)
    done = start(
        config(models, features, two, 2), "--ckpt_path", "last", "--model.policy.init_args.pretrained", str(wider)
    )
    assert done.returncode != 0
    assert "this checkpoint is of another policy" in done.output, done.output


def test_an_average_in_float32_of_bfloat16_weights_goes_on_as_it_was(models, features, folder):
    """A checkpoint is read after the average has found its place."""
    paths = []
    for name in ("whole_average", "broken_average"):
        path = config(models, features, folder / name, 2, precision="bf16-mixed")
        settings = json.loads(path.read_text())
        settings["model"]["policy"]["init_args"]["dtype"] = "bfloat16"
        settings["trainer"]["callbacks"][0]["init_args"] = {"decay": 0.5, "dtype": "float32", "device": "host"}
        path.write_text(json.dumps(settings))
        paths.append(path)
    fit(paths[0])
    fit(paths[1], "--trainer.max_steps", "2")
    fit(paths[1], "--ckpt_path", "last")
    unbroken, broken = (whole(folder / path.stem, 4)["ema"] for path in paths)
    assert {tensor.dtype for tensor in unbroken.values()} == {torch.float32}
    for name, tensor in unbroken.items():
        assert torch.equal(broken[name], tensor), name
