"""What `trainer.strategy: auto` becomes, for `fit` and for `estimate`."""

import json
from datetime import timedelta

import pytest
import yaml
from jsonargparse import Namespace

from srpo_lightning.config.arguments import choose_strategy, read_config
from srpo_lightning.jobs.estimate.devices import is_sharded, num_devices
from srpo_lightning.trainer_cli import devices_here
from srpo_lightning.training.strategies import ReplicatedStrategy, ShardedStrategy
from tests import tiny
from tests.ranks.test_sharded import config as config_of_ranks
from tests.ranks.test_sharded import fit

REPLICATED = Namespace(
    class_path="srpo_lightning.training.strategies.ReplicatedStrategy",
    init_args=Namespace(timeout_minutes=10.0, context_parallel=1),
)


@pytest.fixture
def config(models, features, tmp_path):
    return read_config(str(tiny.write_config(models, tmp_path / "run", features)))


@pytest.mark.parametrize(
    ("devices", "nodes", "sizes"), [(8, 1, (8, 1)), (8, 2, (8, 2)), (2, 4, (2, 4)), (1, 4, (4, 1))]
)
def test_several_devices_share_one_copy_per_node(config, devices, nodes, sizes):
    config.trainer.num_nodes = nodes
    line = choose_strategy(config, devices)
    assert is_sharded(config.trainer)
    chosen = config.trainer.strategy.init_args
    assert (chosen.shard_size, chosen.replicate_size) == sizes
    assert num_devices(config.trainer) == devices * nodes
    assert f"shard_size {sizes[0]} and replicate_size {sizes[1]}" in line


def test_one_device_is_left_alone(config):
    assert choose_strategy(config, 1) is None
    assert config.trainer.strategy == "auto"


def test_weights_in_4_bits_get_ddp(config):
    config["model.policy.init_args.quantize"] = "nf4"
    assert "4 bits cannot be divided" in choose_strategy(config, 2)
    assert config.trainer.strategy == REPLICATED


def test_what_was_asked_for_stays(config):
    config.trainer.strategy = "ddp_spawn"
    assert choose_strategy(config, 8) is None
    assert config.trainer.strategy == "ddp_spawn"


def test_ddp_waits_for_other_ranks_as_long_as_the_sharded_strategy_does(config):
    config.trainer.strategy = "ddp"
    assert choose_strategy(config, 8) is None
    assert config.trainer.strategy == REPLICATED
    assert ReplicatedStrategy(2)._timeout == ShardedStrategy(2, timeout_minutes=2)._timeout == timedelta(minutes=2)


@pytest.mark.parametrize(
    ("accelerator", "devices", "available", "count"),
    [
        ("auto", "auto", 4, 4),
        ("gpu", -1, 4, 4),
        ("cuda", [1, 3], 4, 2),
        ("auto", "2", 0, 2),
        ("cpu", 3, 4, 3),
        ("cpu", "auto", 4, 1),
        ("tpu", 8, 0, 1),
    ],
)
def test_devices_count_as_lightning_counts_them(config, monkeypatch, accelerator, devices, available, count):
    for package in ("fabric", "pytorch"):
        monkeypatch.setattr(f"lightning.{package}.accelerators.cuda.num_cuda_devices", lambda: available)
    config.trainer.accelerator, config.trainer.devices = accelerator, devices
    assert devices_here(config.trainer) == count


@pytest.mark.parametrize(("num_cores", "most"), [(2, 8), (8, 8), (64, 64)])
def test_a_cpu_has_no_more_ranks_than_cores_but_a_few_to_try_with(config, monkeypatch, num_cores, most):
    """Each would be a process with models of its own; a launcher's are there already."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(num_cores)))
    config.trainer.accelerator, config.trainer.devices = "cpu", most
    assert devices_here(config.trainer) == most
    config.trainer.devices = most + 1
    refusal = f"^trainer.devices is {most + 1}: .* {num_cores} cores here; set it to 1, .* or to {most} at most$"
    with pytest.raises(ValueError, match=refusal):
        devices_here(config.trainer)
    monkeypatch.setenv("WORLD_SIZE", str(most + 1))
    assert devices_here(config.trainer) == most + 1


def test_a_run_on_two_ranks_writes_down_what_was_chosen(models, features, tmp_path):
    path = config_of_ranks(models, features, tmp_path / "run", 2, strategy="auto", max_steps=1)
    fit(path)
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["strategy"]
    assert saved["class_path"] == "srpo_lightning.training.strategies.ShardedStrategy"
    assert (saved["init_args"]["shard_size"], saved["init_args"]["replicate_size"]) == (2, 1)
    assert (tmp_path / "run" / "checkpoints" / "step-00000001.ckpt").is_dir()
    assert json.loads(path.read_text())["trainer"]["strategy"] == "auto"
